"""nightsplit keys: a consortium is provisioned, works over TLS with a user for each worker, and shuts a site out."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from contextlib import closing
from pathlib import Path

import pika
import pytest

from nightsplit.broker.rabbitmq.address import read_addresses
from nightsplit.console.cli import run
from nightsplit.console.keys.accounts import ADMIN
from nightsplit.console.keys.admin import administrator
from nightsplit.console.keys.bundle import Keys
from nightsplit.console.keys.request import read_request
from nightsplit.server_worker.config import ServerConfig
from nightsplit.shared.config.load import load
from nightsplit.shared.trust.identity import read_identity
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload
from nightsplit.site_worker.config import PolicyConfig, SiteConfig
from tests.harness.centre import SITES, Centre
from tests.harness.services import wait_until
from tests.harness.workers import Hospital

INIT = ["keys", "init", "--broker", "broker.example", "--store", "store.example:6380", "--folder"]


@pytest.fixture
def keys(tmp_path, capsys):
    """A folder of keys; nothing answers at its addresses."""
    folder = tmp_path / "keys"
    here = ["--broker", "localhost:1", "--store", "localhost:1", "--management", "localhost:1"]
    assert run(["keys", "init", *here, "--folder", str(folder)]) == 0
    capsys.readouterr()
    return folder


def test_what_is_made_for_the_centre(tmp_path, capsys):
    folder = tmp_path / "keys"
    assert run([*INIT, str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"made {folder}: ")
    server = load(folder / "centre/server/server.toml", ServerConfig).server
    assert server.broker == "amqps://server@broker.example:5671/nightsplit"
    assert server.store == "rediss://server@store.example:6380/0"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run([*INIT, str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} already has its keys; nothing is changed\n"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = json.loads((folder / "centre/definitions.json").read_text())
    assert [user["name"] for user in told["users"]] == ["admin", "server"]


def requested(keys, name="north"):
    """The request of a hospital, made in a folder of its own."""
    assert run(["keys", "request", name, "--folder", str(keys.with_name(name))]) == 0
    return str(keys.with_name(name) / f"{name}.request")


def admit(keys, name="north"):
    assert run(["keys", "new-site", requested(keys, name), "--folder", str(keys)]) == 0


def test_what_is_handed_to_a_hospital(keys, capsys):
    admit(keys)
    said = capsys.readouterr().out
    assert f"made {keys}/sites/north: hand it to north" in said
    words = said.splitlines()[1]
    assert f"north is {words}: compare" in said
    assert said.count("adds the account when it starts") == 2
    handed = keys / "sites/north"
    assert {path.name for path in handed.iterdir()} == {
        "ca.pem", "certificate.pem", "password", "site.toml", "policy.toml", "README.md",
    }  # fmt: skip
    own = keys.with_name("north")
    assert {path.name for path in own.iterdir()} == {"identity.key", "key.pem", "north.request"}
    site = load(handed / "site.toml", SiteConfig).site
    assert site.name == "north"
    assert site.broker == "amqps://north@localhost:1/nightsplit"
    assert load(handed / "policy.toml", PolicyConfig) == PolicyConfig(min_batch=8)
    assert "nightsplit doctor site.toml" in (handed / "README.md").read_text()
    assert run(["keys", "new-site", str(own / "north.request"), "--folder", str(keys)]) == 0
    assert "nothing is changed" in capsys.readouterr().out


def private_keys_in(folder):
    return [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


def test_no_private_key_of_a_hospital_is_at_the_centre(keys):
    """docs/explanation/attacks.md, K2."""
    admit(keys)
    assert {path.relative_to(keys).as_posix() for path in private_keys_in(keys)} == {
        "authority/ca.key", "centre/service.key", "centre/server/key.pem",
    }  # fmt: skip
    own = keys.with_name("north")
    secret = (own / "identity.key").read_bytes(), (own / "key.pem").read_bytes()
    assert not any(part in path.read_bytes() for path in keys.rglob("*") if path.is_file() for part in secret)


def test_a_certificate_is_renewed_for_the_same_identity_alone(keys, capsys):
    admit(keys)
    certificate = keys / "sites/north/certificate.pem"
    before = certificate.read_bytes()
    capsys.readouterr()
    assert run(["keys", "renew", requested(keys), "--folder", str(keys)]) == 0
    assert f"made {certificate}" in capsys.readouterr().out
    assert certificate.read_bytes() != before
    other = keys.with_name("impostor")
    run(["keys", "request", "north", "--folder", str(other)])
    for verb in ("renew", "new-site"):
        assert run(["keys", verb, str(other / "north.request"), "--folder", str(keys)]) == 1
        assert "E113" in capsys.readouterr().err
    assert run(["keys", "renew", requested(keys, "south"), "--folder", str(keys)]) == 1
    assert "has no site south" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["name", "identity", "certificate_request", "signature"])
def test_a_request_that_was_exchanged_on_its_way_is_refused(keys, capsys, key):
    """Each part of another request, whose maker signed that one."""
    genuine, other = (tomllib.loads(Path(requested(keys, name)).read_text()) for name in ("north", "south"))
    changed = keys.with_name("changed.request")
    changed.write_text("".join(f"{n} = {json.dumps(v)}\n" for n, v in {**genuine, key: other[key]}.items()))
    assert run(["keys", "new-site", str(changed), "--folder", str(keys)]) == 1
    assert "E113" in capsys.readouterr().err
    assert not (keys / "sites").exists()


def test_parties_are_those_that_are_admitted(keys, capsys):
    admit(keys)
    admit(keys, "south")
    run(["keys", "revoke", "south", "--folder", str(keys)])
    capsys.readouterr()
    assert run(["keys", "parties", "--folder", str(keys)]) == 0
    table = tomllib.loads(capsys.readouterr().out)["parties"]
    assert list(table) == ["server", "north"]
    identity = read_identity(keys.with_name("north") / "identity.key").public
    assert table["north"] == identity.text
    assert run(["keys", "show", str(keys.with_name("north") / "north.request")]) == 0
    assert capsys.readouterr().out.split(maxsplit=1)[1].startswith(identity.words)


def test_what_is_secret_is_readable_by_its_owner_alone(keys):
    admit(keys)
    places = [*keys.rglob("*"), *keys.with_name("north").iterdir()]
    secret = [path for path in places if path.suffix == ".key" or path.name in ("key.pem", "password")]
    secret.append(keys / "centre/admin_password")
    assert len(secret) == 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}


@pytest.mark.parametrize("name", ["server", "admin", "default"])
def test_a_name_that_is_reserved(keys, capsys, name):
    assert run(["keys", "new-site", requested(keys, name), "--folder", str(keys)]) == 1
    assert capsys.readouterr().err.startswith("E103 ")


@pytest.mark.parametrize("name", ["North", "a.b", "", "x" * 64, "north/../../x"])
def test_a_name_that_is_none(tmp_path, capsys, name):
    assert run(["keys", "request", name, "--folder", str(tmp_path / "own")]) == 1
    assert capsys.readouterr().err.startswith("E103 ")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("action", ["new-site", "renew", "revoke", "parties"])
def test_there_are_no_keys_yet(tmp_path, capsys, action):
    argument = {"revoke": ["north"], "parties": []}.get(action)
    if argument is None:
        argument = [requested(tmp_path / "keys")]
    assert run(["keys", action, *argument, "--folder", str(tmp_path / "keys")]) == 1
    assert "nightsplit keys init" in capsys.readouterr().err


def test_revoking_says_when_broker_and_store_could_not_be_told(keys, capsys):
    admit(keys)
    assert run(["keys", "revoke", "south", "--folder", str(keys)]) == 1
    assert "has no site south" in capsys.readouterr().err
    assert run(["keys", "revoke", "north", "--folder", str(keys)]) == 1
    assert capsys.readouterr().err.startswith("E211 ")
    assert not (keys / "sites/north").exists()
    assert "north off" in (keys / "centre/users.acl").read_text()


@pytest.mark.parametrize("broker", ["evil.example#@host", "host:0", "host?x", "a@b@c", "one,,two", "::1", "host/v"])
def test_c4_an_address_that_is_none_makes_no_keys(broker, tmp_path, capsys):
    for arguments in (["--broker", broker, "--store", "host"], ["--broker", "host", "--store", broker]):
        assert run(["keys", "init", *arguments, "--folder", str(tmp_path / "keys")]) == 1
        assert capsys.readouterr().err.startswith("E107")
        assert not (tmp_path / "keys").exists()


def test_the_services_may_be_at_an_ipv6_address(tmp_path):
    folder = tmp_path / "keys"
    assert run(["keys", "init", "--broker", "[2001:db8::7]", "--store", "[::1]:7000", "--folder", str(folder)]) == 0
    addresses = Keys(folder)._load_addresses()
    assert addresses.ports == (5671, 15671, 7000)
    assert addresses.hosts == {"2001:db8::7", "::1", "localhost", "127.0.0.1"}
    assert (
        'broker = "amqps://server@[2001:db8::7]:5671/nightsplit"' in (folder / "centre/server/server.toml").read_text()
    )


def as_by_an_earlier_version(centre):
    """Give the files of a centre the content that an earlier version wrote: no right to see `up`, an open port."""
    conf, told, acl = (centre / name for name in ("rabbitmq.conf", "definitions.json", "users.acl"))
    conf.write_text(re.sub(r"^prometheus.tcp.*\n", "", conf.read_text(), flags=re.MULTILINE))
    told.write_text(told.read_text().replace("(\\\\.(up|ask))?", ""))
    acl.write_text(acl.read_text().replace(" +time", ""))


def test_a_centre_of_an_earlier_version_is_brought_up_to_date(keys, capsys):
    bundle = Keys(keys)
    for site in ("north", "south"):
        bundle.new_site(read_request(Path(requested(keys, site))))
    bundle.revoke("south")
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    moved = keys.rename(keys.with_name("moved"))  # as by a volume: the services see it under its first name
    as_by_an_earlier_version(moved / "centre")
    capsys.readouterr()
    assert run([*INIT, str(moved)]) == 0
    said = capsys.readouterr().out
    assert f"up to date in {moved}/centre: rabbitmq.conf, definitions.json, users.acl (before: FILE.old)" in said
    assert said.count("takes them when it starts") == 2
    assert "restart RabbitMQ and Redis" in said
    after = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file() and path.suffix != ".old"}
    assert {path.relative_to(moved): text for path, text in after.items()} == {
        path.relative_to(keys): text for path, text in before.items()
    }
    assert "prometheus.tcp" not in (moved / "centre/rabbitmq.conf.old").read_text()
    assert run([*INIT, str(moved)]) == 0
    assert "nothing is changed" in capsys.readouterr().out


@pytest.fixture
def centre(tmp_path):
    with Centre(tmp_path / "centre") as centre:
        yield centre


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(200)
def test_a_night_over_tls_with_a_user_for_each_worker(centre, tmp_path):
    undisturbed = Hospital(tmp_path / "calm").in_peace()
    hospital = centre.hospital(tmp_path / "run")
    with closing(hospital):
        hospital.start("server")
        for site in SITES:
            hospital.start(site)
        hospital.wait_for_steps(20)
        forge(centre)
        hospital.wait_for_end()
    assert hospital.models() == undisturbed
    letters = json.loads(hospital.call("dlq", "list", "server.toml", "--json").stdout)["dead_letters"]
    assert [letter["number"] for letter in letters] == [317]
    assert letters[0]["reason"] == "E317 Message cannot be verified"  # all that the finished run can still read


def forge(centre):
    """Who may publish anywhere sends what claims to be from north."""
    header = Header("lipids", "north", SERVER, Kind.SMASHED, 10_000)
    body = b"".join(wire.encode(Message(header, {}, {}), Payload(Kind.SMASHED), 2**20))
    parameters = read_addresses(centre.broker(ADMIN), 30, administrator(centre.keys.folder / "centre"))
    with closing(pika.BlockingConnection(parameters)) as connection:
        properties = pika.BasicProperties(message_id=header.message_id, user_id=ADMIN)
        connection.channel().basic_publish("nightsplit.lipids.north", "up", body, properties)


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(200)
def test_a_site_that_is_revoked_is_out_at_once(centre, tmp_path, capsys):
    with closing(centre.hospital(tmp_path / "run", epochs=2000)) as hospital:
        hospital.start("server")
        for site in SITES:
            hospital.start(site)
        hospital.wait_for_steps(20)
        assert run(["keys", "revoke", "south", "--folder", str(centre.keys.folder)]) == 0
        assert "its connections are closed" in capsys.readouterr().out
        wait_until(lambda: hospital.processes["south"].poll() is not None, 60, "south to leave")
        assert "E202 Broker refuses access" in (hospital.folder / "south.log").read_text()
        assert hospital.processes["north"].poll() is None
        assert hospital.processes["server"].poll() is None


def test_a_plain_line_to_another_machine_is_refused(tmp_path, capsys):
    addresses = {"broker": "amqp://guest:guest@broker.example:5672/", "store": "redis://10.0.0.7:6379/0"}
    for key, address in addresses.items():
        hospital = Hospital(tmp_path / key, **{key: address})
        assert run(["open", str(hospital.folder / "server.toml")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("E111 Unencrypted connection to another host: ")
        assert "guest" not in said
    with closing(Hospital(tmp_path / "some", broker="amqp://localhost:1,broker.example:5672/")) as hospital:
        assert run(["open", str(hospital.folder / "server.toml")]) == 1
        assert "broker.example" in capsys.readouterr().err


def findings(hospital, file):
    told = json.loads(hospital.call("doctor", file, "--json").stdout)
    return told["ok"], {finding["check"]: finding for finding in told["checks"]}


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.campaign
@pytest.mark.timeout(200)
def test_the_rights_of_a_site_suffice_for_its_commands(centre, tmp_path, capsys):
    folder = centre.hospital(tmp_path / "run").folder
    assert run(["open", str(folder / "server.toml")]) == 0

    def see():
        told = []
        for command in (["doctor"], ["status"], ["dlq", "list"]):
            capsys.readouterr()
            run([*command, str(folder / "north.toml"), "--json"])
            told.append(json.loads(capsys.readouterr().out))
        checks, status, letters = told
        assert letters["dead_letters"] == []
        return checks["ok"], {found["check"]: found for found in checks["checks"]}["broker"], status

    healthy, found, status = see()
    assert healthy, found
    assert found["found"] == "reached; all 3 queues exist"
    assert status["broker"] is None
    # Its manifest is the first message to a site.
    assert status["at_broker"] == {"north": {"up": 0, "down": 1, "dead": 0}}

    keys = centre.keys.folder
    as_by_an_earlier_version(keys / "centre")
    centre.keys.services().update_broker()
    healthy, found, status = see()
    assert healthy, found
    assert status["at_broker"]["north"].items() >= {"down": 1, "dead": 0}.items()
    if centre.node.version >= (4, 2, 7):  # earlier ones show a depth to everybody
        assert "the user lacks the configure right on queue 'nightsplit.lipids.north.up'" in found["found"]
        assert "nightsplit keys init brings" in found["fix"]
        assert status["at_broker"]["north"]["up"] is None
        assert status["broker"].startswith("E202 Broker refuses access: ")
        assert "north.up'. " in status["broker"]
        assert "north.ask'. " in status["broker"]

    capsys.readouterr()
    assert run([*INIT, str(keys)]) == 0
    said = capsys.readouterr().out
    assert "the broker has the permissions of this version\nthe store has the permissions of this version\n" in said
    assert see()[0:2] == (True, {**found, "found": "reached; all 3 queues exist", "fix": None})


@pytest.mark.rabbitmq
@pytest.mark.redis
@pytest.mark.timeout(200)
def test_doctor_tries_what_is_forbidden(centre, tmp_path):
    hospital = centre.hospital(tmp_path / "run")
    assert hospital.call("open", "server.toml").returncode == 0

    healthy, found = findings(hospital, "north.toml")
    assert healthy, found
    assert re.fullmatch(
        rf"RabbitMQ {'.'.join(map(str, centre.node.version))}, (Redis|Valkey) [\d.]+", found["servers"]["found"]
    )
    assert found["servers"]["fix"] is None
    assert found["rights"]["found"] == "tried 10 forbidden operations; all were refused"
    assert "TLSv1.3, certificate until" in found["TLS"]["found"]
    assert found["TLS"]["fix"] is None
    assert "passes" in found["passage"]["found"]
    assert "agrees" in found["clock"]["found"]
    assert found["power cut"]["fix"] is None, found["power cut"]
    healthy, found = findings(hospital, "server.toml")
    assert healthy, found
    assert found["rights"]["found"] == "tried 2 forbidden operations; all were refused"
    assert found["broker"]["found"].endswith("all 9 queues exist, with the run's limits")

    centre.node.ctl("set_permissions", "-p", "nightsplit", "north", ".*", ".*", ".*")
    healthy, found = findings(hospital, "north.toml")
    assert not healthy
    assert found["rights"]["found"].startswith("7 of 10 forbidden operations are permitted: publish to any queue")
    centre.node.ctl("set_permissions", "-p", "nightsplit", "north", "^$", "^$", "^$")
    healthy, found = findings(hospital, "north.toml")
    assert not healthy
    assert found["passage"]["found"].startswith("E202 ")
    (centre.keys.folder / "sites/north/key.pem").unlink()
    healthy, found = findings(hospital, "north.toml")
    assert not healthy
    assert found["TLS"]["found"].startswith("E113 ")
