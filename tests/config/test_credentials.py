import ssl

import pytest

from nightsplit.console.keys.ca import Authority
from nightsplit.shared.credentials import Credentials, expect_private, hosts_of
from nightsplit.shared.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "places"),
    [
        ("amqps://north:secret@broker.example:5671/v", [("broker.example", 5671)]),
        ("amqps://north@one:1,two:2,three/v", [("one", 1), ("two", 2), ("three", None)]),
        ("rediss://[2001:db8::7]:6380/0", [("2001:db8::7", 6380)]),
        ("redis://localhost:port/0", [("localhost", None)]),
    ],
)
def test_places(address, places):
    assert list(hosts_of(address)) == places


@pytest.mark.parametrize(
    "address",
    [
        "amqp://localhost:5672/", "amqp://guest:guest@127.0.0.1/", "redis://127.9.9.9:6379", "redis://[::1]/0",
        "amqps://broker.example/", "rediss://10.0.0.7:6379/0", "amqps://one,two/",
    ],
)  # fmt: skip
def test_a_private_line(address):
    expect_private(address)


@pytest.mark.parametrize(
    "address",
    [
        "amqp://broker.example/", "amqp://10.0.0.7/", "redis://redis:6379/0", "amqp://localhost:1,broker.example/",
        "amqp://localhost@broker.example/", "amqp://127.0.0.1.example/", "amqp://", "amqp://[2001:db8::7]:5672/",
    ],
)  # fmt: skip
def test_a_line_that_others_could_read(address):
    with pytest.raises(ConfigError) as error:
        expect_private(address)
    assert error.value.number == 111


@pytest.fixture
def handed(tmp_path):
    authority = Authority(tmp_path / "authority")
    authority.issue("north", tmp_path / "certificate.pem", tmp_path / "key.pem")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "password").write_text("secret\n")
    return Credentials(*(tmp_path / name for name in ("ca.pem", "certificate.pem", "key.pem", "password")))


def test_what_was_handed_over_can_be_used(handed):
    context = handed.tls()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert handed.secret() == "secret"


@pytest.mark.parametrize("broken", ["ca", "certificate", "key", "password"])
@pytest.mark.parametrize("how", ["missing", "another thing"])
def test_what_cannot_be_used_is_113(handed, broken, how):
    path = getattr(handed, broken)
    if how == "missing":
        path.unlink()
    elif broken == "password":
        path.write_bytes(b"\xff")
    else:
        path.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(ConfigError) as error:
        (handed.secret if broken == "password" else handed.tls)()
    assert error.value.number == 113
    assert path.name in error.value.sentence


def test_a_key_of_another_certificate(handed, tmp_path):
    Authority(tmp_path / "authority").issue("south", tmp_path / "other.pem", handed.key)
    with pytest.raises(ConfigError, match="E113"):
        handed.tls()


def test_an_authority_is_made_once(tmp_path):
    assert Authority(tmp_path).pem == Authority(tmp_path).pem
    (tmp_path / "ca.key").write_text("nothing")
    with pytest.raises(ConfigError, match="backup"):
        Authority(tmp_path)
