"""A message that cannot be applied ends in the dead letter queue with its reason; the next one is processed."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgpack
import msgspec
import pytest
import torch
import zstandard

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.handshake import PROGRESS
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, TensorSpec
from nightsplit.simulation.broker import MemoryBroker
from tests.harness.night import Night, tiny_config

F32 = torch.float32
TOLD = Reveals.ACTIVATIONS
TARGET = TensorSpec(F32, ("batch",), reveals=Reveals.LABELS)
CONTRACT = Payload(
    Kind.SMASHED,
    {"smashed": TensorSpec(F32, ("batch", 8), "fp16", True, Reveals.ACTIVATIONS), "targets": TARGET},
)
HELLO = Payload(
    Kind.HELLO,
    scalars={"incarnation": ScalarSpec(str, Reveals.NOTHING), "contract": ScalarSpec(int, Reveals.NOTHING)},
)
SMASHED, TARGETS = 0, 1
"""Rows of the header: tensors by name."""
NAME, CODEC, ZSTD, DTYPE, SHAPE, PARAMETER, NBYTES = range(7)
"""Columns of such a row."""

Make = Callable[[Header], bytes]


def encoded(header: Header, payload: Payload = CONTRACT, **changed: torch.Tensor) -> bytes:
    tensors = {"smashed": torch.randn(8, 8), "targets": torch.zeros(8)} | changed
    return b"".join(wire.encode(Message(header, tensors), payload, 2**24))


def specified(name: str, spec: TensorSpec, tensor: torch.Tensor) -> Make:
    """Well encoded by another contract."""
    payload = replace(CONTRACT, tensors={**CONTRACT.tensors, name: spec})
    return lambda header: encoded(header, payload, **{name: tensor})


def split(body: bytes) -> tuple[dict, list[bytes]]:
    """A good body's header map and the bytes of its tensors."""
    at = 4 + int.from_bytes(body[:4], "big")
    fields, parts = msgpack.unpackb(body[4:at]), []
    for row in fields["tensors"]:
        at += -at % wire.ALIGNMENT
        parts.append(body[at : at + row[NBYTES]])
        at += row[NBYTES]
    return fields, parts


def joined(header: object, parts: list[bytes], gap: bytes = b"\0") -> bytes:
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    body = len(packed).to_bytes(4, "big") + packed
    for part in parts:
        body += gap * (-len(body) % wire.ALIGNMENT) + part
    return body


def spelled(change: Callable[[dict], object]) -> Make:
    """A good body whose header map is changed, or replaced by what `change` returns."""

    def make(header: Header) -> bytes:
        fields, parts = split(encoded(header))
        return joined(change(fields) or fields, parts)

    return make


def field(name: str, value: object) -> Make:
    return spelled(lambda fields: fields.update({name: value}))


def row(tensor: int, column: int, value: object) -> Make:
    return spelled(lambda fields: fields["tensors"][tensor].__setitem__(column, value))


def rows(change: Callable[[list], list]) -> Make:
    return spelled(lambda fields: fields.update(tensors=change(fields["tensors"])))


def frame(data: bytes) -> Make:
    """In place of the compressed activations; the header tells the frame's true length."""

    def make(header: Header) -> bytes:
        fields, parts = split(encoded(header))
        fields["tensors"][SMASHED][NBYTES] = len(data)
        return joined(fields, [data, parts[TARGETS]])

    return make


def value(four_bytes: bytes) -> Make:
    """The encoder refuses what is not finite, so the last of the raw float32 targets is changed in the bytes."""
    return lambda header: encoded(header)[:-4] + four_bytes


def another(**changes: object) -> Make:
    return lambda header: encoded(replace(header, **changes))


def longer(fields: dict) -> bytes:
    """The header's map with its first key once more at its end."""
    assert len(fields) < 15
    packed = msgpack.packb(fields)
    return bytes([packed[0] + 1]) + packed[1:] + msgpack.packb("wire") + msgpack.packb(1)


def unstated(data: bytes) -> bytes:
    """A frame that does not say how much it holds."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(2**27))

UNPLACED: dict[str, tuple[Make, int]] = {
    "empty": (lambda h: b"", 301),
    "a pickle": (lambda h: pickle.dumps({"smashed": [1.0] * 8}), 301),
    "JSON": (lambda h: json.dumps({"kind": "smashed", "seq": h.seq}).encode(), 301),
    "a header that claims megabytes": (lambda h: b"\x00\xff\xff\xff" + encoded(h)[4:], 301),
    "a header that is no msgpack": (lambda h: joined(b"\xc1" * 64, []), 301),
    "a header that is a list": (spelled(lambda fields: list(fields.items())), 301),
    "a field too many": (field("comment", "hello"), 301),
    "a field too few": (spelled(lambda fields: {k: v for k, v in fields.items() if k != "fence"}), 301),
    "a repeated field": (spelled(longer), 301),
    "nested lists that claim to be long": (lambda h: joined((b"\xdd" + b"\x00\x00\x10\x00") * 2000, []), 301),
    "a name that is too long": (field("sender", "n" * 201), 301),
    "a name with a line break": (field("run", "night\n"), 301),
    "a negative seq": (field("seq", -1), 301),
    "a seq beyond 64 bits": (field("seq", 2**63), 301),
    "a seq in words": (field("seq", "one"), 301),
    "a version that is a bool": (field("version", True), 301),
    "a scalar that is a list": (field("scalars", {"loss": [1.0]}), 301),
    "a row too short": (rows(lambda rows: [rows[0][:-1], rows[1]]), 301),
    "another wire version": (field("wire", 2), 302),
    "an unknown kind": (field("kind", "smushed"), 303),
    "a greeting without its contract": (
        lambda h: b"".join(
            wire.encode(
                Message(replace(h, kind=Kind.HELLO, seq=0), scalars={"incarnation": "x", "contract": 1}), HELLO, 2**20
            )
        ),
        304,
    ),
    "an unknown dtype": (row(SMASHED, DTYPE, "complex64"), 305),
    "an unknown codec": (row(SMASHED, CODEC, "pickle"), 305),
    "a negative dimension": (row(SMASHED, SHAPE, [-8, -8]), 306),
    "cut off in its header": (lambda h: encoded(h)[:20], 309),
    "another run": (another(run="day"), 310),
    "another sender": (another(sender="south"), 310),
    "another receiver": (another(receiver="south"), 310),
}
"""Nobody can tell the place of these in north's sequence: they change nothing at all."""

COUNTED: dict[str, tuple[Make, int]] = {
    "another batch size": (lambda h: encoded(h, smashed=torch.randn(5, 8), targets=torch.zeros(5)), 306),
    "another bottom version": (another(version=99), 304),
    "a kind of another system": (another(kind=Kind.HEAD_GRADIENT), 303),
    "a tensor too many": (specified("more", TARGET, torch.zeros(8)), 304),
    "a tensor too few": (
        lambda h: b"".join(
            wire.encode(Message(h, {"targets": torch.zeros(8)}), Payload(Kind.SMASHED, {"targets": TARGET}), 2**20)
        ),
        304,
    ),
    "a tensor of another name": (row(SMASHED, NAME, "mashed"), 304),
    "a tensor twice": (rows(lambda rows: [rows[0], rows[0], rows[1]]), 304),
    "tensors out of order": (rows(lambda rows: rows[::-1]), 304),
    "scalars where there are none": (field("scalars", {"loss": 0.5}), 304),
    "a wrong dtype": (
        specified("targets", TensorSpec(torch.int64, ("batch",), reveals=TOLD), torch.zeros(8).long()),
        305,
    ),
    "another codec": (
        specified("smashed", TensorSpec(F32, ("batch", 8), "bf16", zstd=True, reveals=TOLD), torch.randn(8, 8)),
        305,
    ),
    "not compressed": (
        specified("smashed", TensorSpec(F32, ("batch", 8), "fp16", reveals=TOLD), torch.randn(8, 8)),
        305,
    ),
    "a parameter that the codec has not": (row(SMASHED, PARAMETER, 999), 305),
    "a wrong shape": (
        specified("smashed", TensorSpec(F32, ("batch", 9), "fp16", zstd=True, reveals=TOLD), torch.randn(8, 9)),
        306,
    ),
    "tensors that disagree on the batch": (row(TARGETS, SHAPE, [4]), 306),
    "NaN": (value(b"\x00\x00\xc0\x7f"), 307),
    "infinity": (value(b"\x00\x00\x80\xff"), 307),
    "too large": (lambda h: encoded(h, smashed=torch.randn(400_000, 8), targets=torch.zeros(400_000)), 308),
    "a shape that lies": (
        rows(lambda rows: [[*rows[0][:SHAPE], [2**24, 8], *rows[0][PARAMETER:]], [*rows[1][:SHAPE], [2**24], 0, 32]]),
        308,
    ),
    "truncated": (lambda h: encoded(h)[:-5], 309),
    "trailing bytes": (lambda h: encoded(h) + b"x", 309),
    "a gap that is not empty": (lambda h: joined(*split(encoded(h)), gap=b"x"), 309),
    "fewer bytes than its shape takes": (lambda h: row(TARGETS, NBYTES, 28)(h)[:-4], 309),
    "a decompression bomb": (frame(BOMB), 311),
    "no zstd frame": (frame(b"not a frame at all"), 311),
    "a zstd frame of unknown size": (frame(unstated(bytes(128))), 311),
    "a zstd frame that breaks off": (frame(zstandard.ZstdCompressor().compress(bytes(range(128)))[:-8]), 311),
}
"""Their headers name their place: each counts as a batch of north that taught nothing."""

POISON = {**COUNTED, **UNPLACED}


def config(sites: tuple[str, ...] = ("north", "south"), epochs: int = 1) -> RunConfig:
    """Window 1: at any moment it is clear which of north's numbers was not sent yet."""
    plain = tiny_config(sites, epochs=epochs, window=1)
    return msgspec.structs.replace(plain, wire=msgspec.structs.replace(plain.wire, zstd=True))


def header(q: int) -> Header:
    """Of north's message q, as it should be."""
    return Header("night", "north", SERVER, Kind.SMASHED, q, version=q - 1)


def inject(night: Night, *bodies: bytes) -> None:
    with night.broker.link([], 8, "attacker") as link:
        for number, body in enumerate(bodies):
            link.publish(night.queues["north"].up, f"poison/{number}", [body])
        while link.unconfirmed:
            link.receive(0.1)


def finish(night: Night) -> None:
    """Go on to the end; every message of every site was applied."""
    night.run()
    for site in night.config.run.sites:
        assert night.roles[site].finished
        assert night.roles[SERVER].applied[site] == night.roles[site].sequence.last


def test_there_are_more_than_thirty_kinds():
    assert len(POISON) > 30


@pytest.mark.parametrize("name", POISON)
def test_poison_in_a_running_run(name, calm, tmp_path):
    make, number = POISON[name]
    night = Night(config(), tmp_path, MemoryBroker())  # which carries more than the run allows

    def go_on(enough: Callable[[], bool]) -> None:
        for _ in range(1000):
            if enough():
                return
            for worker in list(night.engines):
                night.step(worker)
        pytest.fail("the run hangs")

    for worker in night.workers:
        night.start(worker)
    applied = night.server.applied
    go_on(lambda: applied["north"] >= 2)
    q = night.roles["north"].next_seq
    assert night.config.run.window == 1
    body = make(header(q))
    inject(night, body)
    go_on(lambda: bool(night.broker.peek(night.queues["north"].dead)))

    (letter,) = night.broker.peek(night.queues["north"].dead)
    assert letter.body == body
    assert letter.headers["number"] == str(number), letter.headers["reason"]
    assert letter.headers["reason"].startswith(f"E{number} ")
    assert (letter.headers["sender"], letter.headers["queue"]) == ("north", night.queues["north"].up.name)
    age = datetime.now(UTC) - datetime.fromisoformat(letter.headers["time"])
    assert timedelta(0) <= age < timedelta(minutes=5)

    # The genuine message of the number, or the one behind it, trains; then everything to the end.
    steps = night.roles[SERVER].steps
    go_on(lambda: applied["north"] > q and night.roles[SERVER].steps > steps)
    finish(night)
    assert night.roles[SERVER].refusals == ({"north": 1} if name in COUNTED else {})
    assert night.broker.depth(night.queues["north"].dead) == 1
    assert (night.fingerprint() == calm(config()).fingerprint()) is (name in UNPLACED)


def test_all_poison_in_one_queue_over_rabbitmq(rabbitmq, tmp_path):
    # Poison is there before the genuine message of its number can be: north waits for each answer.
    bodies = [make(header(q)) for q, (make, _) in enumerate(POISON.values(), 2)]
    night = Night(config(("north",), epochs=8), tmp_path, RabbitBroker(rabbitmq.vhost()))
    night.work(SERVER, 0.1)
    inject(night, *bodies)
    finish(night)
    letters = {}
    with night.broker.link([night.queues["north"].dead], 128, "reader") as link:
        while len(letters) < len(bodies):
            letter = link.receive(10.0)
            assert letter is not None, f"{len(letters)} of {len(bodies)} letters"
            letters[letter.body] = letter.headers
    found = {name: int(letters[body]["number"]) for name, body in zip(POISON, bodies, strict=True)}
    assert found == {name: number for name, (_, number) in POISON.items()}


def test_an_unusable_answer_counts_as_one_without_a_gradient(tmp_path):
    """The site refuses as the server does: the step is skipped, the run goes on to its end."""
    night = Night(config(("north",)), tmp_path)
    night.work(SERVER, 0.1)
    answer = Header("night", SERVER, "north", Kind.CUT_GRADIENT, 1, reply_to=1)
    payload = Payload(Kind.CUT_GRADIENT, {"gradient": TensorSpec(F32, ("batch", 8), "fp16", zstd=True)}, PROGRESS)
    message = Message(answer, {"gradient": torch.randn(3, 8)}, {"best": 0, "judged": 0})
    with night.broker.link([], 8, "attacker") as link:
        link.publish(night.queues["north"].down, "poison", [b"".join(wire.encode(message, payload, 2**20))])
    night.run()
    assert night.roles["north"].finished
    assert night.roles["north"].bottom.version == night.roles["north"].sequence.last
    (letter,) = night.broker.peek(night.queues["north"].dead)
    assert (letter.headers["number"], letter.headers["sender"]) == ("306", SERVER)
    assert letter.headers["queue"] == night.queues["north"].down.name
