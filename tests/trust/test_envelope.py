"""Envelopes: what verifies, what does not, and what a broker can read."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from msgspec.structs import replace

from nightsplit.shared.errors import Refused
from nightsplit.shared.trust.envelope import Sealer
from nightsplit.shared.trust.identity import Identity
from nightsplit.shared.trust.run_keys import RunKeys
from nightsplit.shared.wire.message import ENVELOPE_BYTES, SERVER
from tests.harness.night import tiny_config

DIGEST, OTHER_DIGEST = "ab" * 32, "cd" * 32
CONTENT = b"LDL 119.0 of patient 7"
IDENTITIES = {name: Identity(secrets.token_bytes(32)) for name in (SERVER, "north", "south")}
PARTIES = {name: identity.public for name, identity in IDENTITIES.items()}


def sealer(folder: Path, name: str, run: str = "lipids", digest: str = DIGEST, identity: str = "") -> Sealer:
    return Sealer(run, digest, name, IDENTITIES[identity or name], PARTIES, RunKeys(folder / name))


def introduced(folder: Path, first: Sealer, second: Sealer) -> None:
    """Let two workers of a test know each other's run keys, as after the handshake."""
    first.keys.learn(second._name, second.keys.public)
    second.keys.learn(first._name, first.keys.public)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Sealer, Sealer]:
    north, server = sealer(tmp_path, "north"), sealer(tmp_path, SERVER)
    introduced(tmp_path, north, server)
    return north, server


def refused(receiver: Sealer, sender: str, body: bytes) -> None:
    with pytest.raises(Refused) as found:
        receiver.open(sender, receiver._name, body)
    assert found.value.number == 317


def test_a_sealed_message_is_read_by_its_receiver_and_its_sender_alone(pair, tmp_path):
    north, server = pair
    body = north.seal(SERVER, CONTENT)
    assert len(body) == len(CONTENT) + ENVELOPE_BYTES
    assert CONTENT not in body
    assert b"north" not in body
    opened = server.open("north", SERVER, body)
    assert (opened.content, opened.sealed, opened.run_key) == (CONTENT, True, north.keys.public)
    assert north.open("north", SERVER, body).content == CONTENT  # its own dead letter
    south = sealer(tmp_path, "south")
    introduced(tmp_path, south, server)
    with pytest.raises(Refused):
        south.open("north", SERVER, body)


def test_a_signed_message_is_readable_and_verified(pair):
    north, server = pair
    body = north.sign(SERVER, CONTENT)
    assert CONTENT in body
    assert not server.open("north", SERVER, body).sealed
    refused(server, "south", body)


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("mode", ["seal", "sign"])
def test_every_flipped_byte_is_refused(pair, mode, count):
    north, server = pair
    for _ in range(count):
        body = getattr(north, mode)(SERVER, CONTENT)
        for place in range(len(body)):
            damaged = bytearray(body)
            damaged[place] ^= 1 << secrets.randbelow(8)
            refused(server, "north", bytes(damaged))
        assert server.open("north", SERVER, body).content == CONTENT


@pytest.mark.parametrize("mode", ["seal", "sign"])
@pytest.mark.parametrize("change", [{"identity": "south"}, {"run": "glucose"}, {"digest": OTHER_DIGEST}])
def test_another_signer_run_or_digest_is_refused(pair, tmp_path, mode, change):
    """A19, A20, E3: whoever holds the broker has neither the key of a party nor that of the run."""
    _, server = pair
    forger = sealer(tmp_path / "forger", "north", **change)
    introduced(tmp_path, forger, server)
    refused(server, "north", getattr(forger, mode)(SERVER, CONTENT))


def test_a_message_on_another_way_is_refused(pair):
    """A message of the server to north is none from north to the server, nor one for south."""
    north, server = pair
    body = server.seal("north", CONTENT)
    refused(server, "north", body)
    with pytest.raises(Refused):
        north.open(SERVER, "south", body)


def test_a_message_of_the_same_run_that_was_begun_again_cannot_be_opened(pair, tmp_path):
    """A20: the tape of run A in run B with the same id and file."""
    north, _ = pair
    again = sealer(tmp_path / "again", SERVER)
    refused(again, "north", north.seal(SERVER, CONTENT))


def test_nothing_opens_when_the_run_key_is_deleted(pair):
    """Forward secrecy: identities and envelopes alone do not reveal a finished run."""
    north, server = pair
    body = north.seal(SERVER, CONTENT)
    server.keys.delete()
    server._ciphers.clear()
    refused(server, "north", body)


def test_no_key_meets_a_nonce_twice(pair, tmp_path):
    north, server = pair
    prefixes = {north.seal(SERVER, CONTENT)[:61] for _ in range(100)}
    restarted = Sealer("lipids", DIGEST, "north", IDENTITIES["north"], PARTIES, RunKeys(tmp_path / "north"))
    prefixes |= {restarted.seal(SERVER, CONTENT)[:61] for _ in range(100)}
    assert len(prefixes) == 200
    assert server.open("north", SERVER, restarted.seal(SERVER, CONTENT)).content == CONTENT


@pytest.mark.parametrize("body", [b"", b"NSE1", b"NSE1" + bytes(200), secrets.token_bytes(300), b"NSE1\2" + bytes(300)])
def test_what_is_no_envelope_is_refused(pair, body):
    refused(pair[1], "north", body)


def test_a_key_that_gives_no_secret_is_refused(pair):
    """The all-zero point of X25519 (RFC 7748, section 6.1)."""
    body = pair[0].seal(SERVER, CONTENT)
    refused(pair[1], "north", body[:5] + bytes(32) + body[37:])


def test_ciphers_are_remembered_for_verified_messages_only(pair):
    north, server = pair
    server.open("north", SERVER, north.seal(SERVER, CONTENT))
    before = len(server._ciphers)
    for _ in range(20):
        body = bytearray(north.seal(SERVER, CONTENT))
        body[37:53] = secrets.token_bytes(16)  # another process
        refused(server, "north", bytes(body))
    assert len(server._ciphers) == before


def test_the_largest_message_fits_into_what_the_broker_takes(pair):
    north, _ = pair
    config = tiny_config(("north",))
    keyed = replace(config, parties={name: key.text for name, key in PARTIES.items() if name in (SERVER, "north")})
    assert config.content_bytes == config.wire.message_bytes
    assert len(north.seal(SERVER, bytes(keyed.content_bytes))) == config.wire.message_bytes
