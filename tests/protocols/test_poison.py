"""A message that cannot be applied ends in the dead letter queue with its reason; the next one is processed."""

import pickle
from dataclasses import replace

import pytest
import torch

from broker.rabbitmq import RabbitBroker
from shared import wire
from shared.contract import Payload, TensorSpec
from shared.message import SERVER, Header, Kind, Message
from tests.protocols.night import Night, tiny_config

CONTRACT = Payload(
    {"smashed": TensorSpec(torch.float32, ("batch", 8), "fp16"), "targets": TensorSpec(torch.float32, ("batch",))}
)


def encoded(header: Header, payload: Payload = CONTRACT, **changed: torch.Tensor) -> bytes:
    tensors = {"smashed": torch.randn(8, 8), "targets": torch.zeros(8)} | changed
    return b"".join(wire.encode(Message(header, tensors), payload, 2**24))


def with_spec(name: str, spec: TensorSpec) -> Payload:
    return replace(CONTRACT, tensors={**CONTRACT.tensors, name: spec})


def not_finite(header: Header) -> bytes:
    """The encoder refuses NaN, so the last of the raw float32 targets is made one in the bytes."""
    return encoded(header)[:-4] + b"\x00\x00\xc0\x7f"


POISON = {
    "wrong shape": (
        lambda h: encoded(h, with_spec("smashed", TensorSpec(torch.float32, ("batch", 9))), smashed=torch.randn(8, 9)),
        306,
    ),
    "another batch size": (lambda h: encoded(h, smashed=torch.randn(5, 8), targets=torch.zeros(5)), 306),
    "wrong dtype": (
        lambda h: encoded(h, with_spec("targets", TensorSpec(torch.int64, ("batch",))), targets=torch.zeros(8).long()),
        305,
    ),
    "not finite": (not_finite, 307),
    "a tensor too many": (
        lambda h: encoded(h, with_spec("more", TensorSpec(torch.float32, ("batch",))), more=torch.zeros(8)),
        304,
    ),
    "kind of another system": (lambda h: encoded(replace(h, kind=Kind.HEAD_GRADIENT)), 303),
    "unknown kind": (lambda h: encoded(h).replace(b"kind\xa7smashed", b"kind\xa7smushed"), 303),
    "too large": (lambda h: encoded(h, smashed=torch.randn(400_000, 8), targets=torch.zeros(400_000)), 308),
    "truncated": (lambda h: encoded(h)[:-5], 309),
    "trailing bytes": (lambda h: encoded(h) + b"x", 309),
    "a pickle": (lambda h: pickle.dumps({"smashed": [1.0] * 8}), 301),
    "empty": (lambda h: b"", 301),
    "another run": (lambda h: encoded(replace(h, run="day")), 310),
    "another sender": (lambda h: encoded(replace(h, sender="south")), 310),
    "another bottom version": (lambda h: encoded(replace(h, version=99)), 304),
}  # fmt: skip


def poisoned_run(night: Night, bodies: list[bytes]) -> dict[bytes, dict[str, str]]:
    """Poison lies in north's queue before north begins; the run must end all the same.

    Returns:
        Headers of the dead letters by their body.
    """
    night.work(SERVER, 0.1)
    with night.broker.link([], 8, "attacker") as link:
        for number, body in enumerate(bodies):
            link.publish(night.queues["north"].up, f"poison/{number}", [body])
        while link.unconfirmed:
            link.receive(0.1)
    night.together()
    for site in night.config.run.sites:
        assert night.roles[site].finished
        assert night.roles[SERVER].applied[site] == night.roles[site].sequence.last
    letters = {}
    with night.broker.link([night.queues["north"].dead], 64, "reader") as link:
        while (letter := link.receive(0.5)) is not None:
            letters[letter.body] = letter.headers
    return letters


def header(q: int) -> Header:
    """Of north's message q in a run of window 1, as it should be."""
    return Header("night", "north", SERVER, Kind.SMASHED, q, version=q - 1)


@pytest.mark.parametrize("name", POISON)
def test_poison_ends_in_dead_letters_with_its_reason(name, tmp_path):
    make, number = POISON[name]
    body = make(header(1))
    letters = poisoned_run(Night(tiny_config(epochs=1, window=1), tmp_path), [body])
    assert list(letters) == [body]
    assert letters[body]["number"] == str(number), letters[body]["reason"]
    assert letters[body]["reason"].startswith(f"E{number} ")
    assert letters[body]["sender"] == "north"


def test_all_poison_in_one_queue_over_rabbitmq(rabbitmq, tmp_path):
    # Poison is there before the genuine message of its number can be: north waits for each answer.
    bodies = [make(header(q)) for q, (make, _) in enumerate(POISON.values(), 2)]
    night = Night(tiny_config(("north",), epochs=6, window=1), tmp_path, RabbitBroker(rabbitmq.vhost()))
    letters = poisoned_run(night, bodies)
    found = {name: int(letters[body]["number"]) for name, body in zip(POISON, bodies, strict=True)}
    assert found == {name: number for name, (_, number) in POISON.items()}


def test_a_refused_batch_is_counted_and_the_genuine_one_is_a_duplicate(tmp_path):
    night = Night(tiny_config(epochs=1, window=1), tmp_path)
    poisoned_run(night, [POISON["wrong shape"][0](header(1))])
    assert night.roles[SERVER].refusals == {"north": 1}


def test_an_unusable_answer_counts_as_one_without_a_gradient(tmp_path):
    """The site refuses as the server does: the step is skipped, the run goes on to its end."""
    night = Night(tiny_config(("north",), epochs=1, window=1), tmp_path)
    night.work(SERVER, 0.1)
    answer = Header("night", SERVER, "north", Kind.CUT_GRADIENT, 1, reply_to=1)
    payload = Payload({"gradient": TensorSpec(torch.float32, ("batch", 8), "fp16")}, {"best": int, "judged": int})
    message = Message(answer, {"gradient": torch.randn(3, 8)}, {"best": 0, "judged": 0})
    with night.broker.link([], 8, "attacker") as link:
        link.publish(night.queues["north"].down, "poison", [b"".join(wire.encode(message, payload, 2**20))])
    night.together()
    assert night.roles["north"].finished
    assert night.roles["north"].bottom.version == night.roles["north"].sequence.last
