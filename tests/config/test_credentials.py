import ssl

import pytest

from nightsplit.console.keys.ca import Authority
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import ConfigError


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
