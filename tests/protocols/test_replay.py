"""A run is trained again from its tape: the same weights, to the bit, and a sentence where that cannot be."""

import os
import random
from dataclasses import replace

import pytest
import torch

from nightsplit.console.replay import Replay
from nightsplit.server_worker.tape import FOLDER, Tape, TapedLink
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.engine.order import Exclude
from nightsplit.shared.errors import StateError
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Reveals, TensorSpec
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.store import MemoryStore
from tests.harness.night import Night, each_system, tiny_config


class PowerCut(Tape):
    """Keeps only what was forced to disk when its process is gone."""

    kept = 0

    def sync(self):
        super().sync()
        if self._file is not None:
            self.kept = self._file.tell()

    def close(self):
        super().close()
        if self._file is not None:
            os.truncate(self._file.name, self.kept)


class TapedBroker(MemoryBroker):
    """Records what the server receives, as its worker does."""

    def __init__(self, folder):
        super().__init__()
        self.tape = folder

    def link(self, consume, prefetch, owner):
        link = super().link(consume, prefetch, owner)
        return TapedLink(link, PowerCut(self.tape)) if owner == SERVER else link


def taped_night(folder, **run):
    return Night(tiny_config(tape=True, **run), folder, TapedBroker(folder / FOLDER), prefetch=16)


def replayed(night, until=None, store=None):
    replay = Replay(night.config, night.folder, night.broker.tape, store or night.store, "cpu")
    replay.run(until)
    return replay


def weights_of(night):
    """sha256 of what the server ended with: the best top, and the last."""
    role = night.roles[SERVER]
    return weights_sha256(role.best_weights), weights_sha256(role.weights())


@pytest.mark.parametrize("order", ["strict", "fair"])
@each_system
def test_a_shaken_run_and_its_replay_end_with_equal_weights(system, order, tmp_path):
    """Workers die at random all along: what the broker forgot has to be on the tape."""
    night = taped_night(tmp_path, **system._asdict(), average_every=3, order=order, epochs=2)
    night.shaken(seed=3)
    replay = replayed(night)
    assert replay.engine.finished
    assert replay.engine.position == sum(night.roles[SERVER].applied.values())
    assert replay.weights() == weights_of(night)
    assert replay.weights() != replayed(night, until=0).weights()
    assert len(list((tmp_path / FOLDER).glob("*.tape"))) > 1, "the server was never started again"


def test_a_fair_run_is_replayed_in_the_order_of_its_journal(tmp_path):
    """Otherwise the test above could not fail."""
    night = taped_night(tmp_path, order="fair", window=3)
    night.shaken(seed=3)
    turned = MemoryStore()
    senders = [night.store.journal_entry(position) for position in range(1, replayed(night).engine.position + 1)]
    first = senders.index(next(sender for sender in senders if sender != senders[0]))
    senders[first - 1], senders[first] = senders[first], senders[first - 1]
    for position, sender in enumerate(senders, 1):
        turned.claim_position(position, sender)
    assert replayed(night, store=turned).weights() != replayed(night).weights()


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_a_site_that_was_left_out_is_left_out_at_the_same_place(order, tmp_path):
    night = taped_night(tmp_path, order=order, quorum=2, epochs=2)
    for name in (SERVER, "north", "south", "east"):
        night.start(name)
    turns = 0
    while SERVER not in night.finished:
        if (turns := turns + 1) == 12:
            night.kill("east")
            night.decide = lambda: Exclude("east") if "east" in night.server.active_sites else None
        for name in list(night.engines):
            night.step(name)
    assert set(night.roles[SERVER].excluded) == {"east"}
    replay = replayed(night)
    assert replay.weights() == weights_of(night)
    assert replay.engine.position == sum(night.roles[SERVER].applied.values()) + 1


def test_nothing_of_the_run_is_changed(tmp_path):
    night = taped_night(tmp_path, order="fair").run()
    waiting = {queue.name: night.broker.depth(queue) for queues in night.queues.values() for queue in queues}
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    pointer, position = night.store.pointer(), replayed(night).engine.position
    assert night.store.pointer() == pointer
    assert night.store.journal_entry(position) is not None
    assert night.store.journal_entry(position + 1) is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert waiting == {queue.name: night.broker.depth(queue) for queues in night.queues.values() for queue in queues}


@pytest.mark.parametrize("order", ["strict", "fair"])
@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_until_gives_the_weights_of_a_server_that_stood_there(protocol, order, tmp_path):
    night = taped_night(tmp_path, protocol=protocol, order=order, window=3)
    seen, losses = {}, {}
    for name in night.workers:
        night.start(name)
    server = night.engines[SERVER]
    while SERVER not in night.finished:
        position, lines = server.position, len(night.lines)
        for name in list(night.engines):
            night.step(name)
        if server.position > position:
            assert server.position == position + 1
            seen[server.position] = weights_sha256(night.roles[SERVER].weights())
            trained = [line for line in night.lines[lines:] if line.metrics["event"] == "train"]
            losses[server.position] = trained[0].metrics["loss"] if trained else None
    assert len(seen) > 20
    assert len(set(seen.values())) > 20
    for position in random.Random(1).sample(sorted(seen), 5):
        replay = replayed(night, until=position)
        assert replay.engine.position == position
        assert replay.weights()[1] == seen[position]
        assert replay.last.loss == losses[position]
        assert replay.last.refused is None


def first_batch(rows=8, version=0):
    """What north's first message could look like."""
    payload = sketch(tiny_config())[Kind.SMASHED]
    smashed = TensorSpec(torch.float32, ("batch", 8), "fp16", reveals=Reveals.ACTIVATIONS)
    payload = replace(payload, tensors={**payload.tensors, "smashed": smashed})
    header = Header("night", "north", SERVER, Kind.SMASHED, 1, version=version)
    message = Message(header, {"smashed": torch.ones(rows, 8), "targets": torch.zeros(rows)})
    return b"".join(wire.encode(message, payload, 2**20))


POISON = {
    "wrong shape": (first_batch(rows=5), 306),
    "another bottom version": (first_batch(version=99), 304),
    "truncated": (first_batch()[:-5], 309),
    "no message at all": (b"hello", 301),
}


@pytest.mark.parametrize("name", POISON)
def test_a_poison_message_is_replayed_to_the_same_weights_and_named(name, tmp_path):
    body, number = POISON[name]
    night = taped_night(tmp_path, epochs=1, window=1)
    night.work(SERVER, 0.1)
    with night.broker.link([], 8, "attacker") as link:
        link.publish(night.queues["north"].up, "poison", [body])
    night.run()
    assert night.broker.peek(night.queues["north"].dead)[0].headers["number"] == str(number)
    replay = replayed(night)
    assert replay.weights() == weights_of(night)
    ends = [replayed(night, until=position).last for position in range(1, replay.engine.position + 1)]
    refused = [last for last in ends if last.refused is not None]
    assert {last.message for last in ends} >= {"night/north/server/smashed/2", "night/south/server/smashed/1"}
    if number == 301:  # nobody knows whose turn it would have been
        assert refused == []
    else:
        (last,) = refused
        assert (last.message.split("/")[1:3], last.refused.split()[0], last.loss) == (
            ["north", "server"],
            f"E{number}",
            None,
        )


def test_copies_of_messages_change_nothing(tmp_path):
    night = taped_night(tmp_path, epochs=2).run()
    expected = replayed(night)
    (file,) = (tmp_path / FOLDER).glob("*.tape")
    (tmp_path / FOLDER / "000002.tape").write_bytes(file.read_bytes())
    file.rename(tmp_path / FOLDER / "000003.tape")
    again = replayed(night)
    assert (again.weights(), again.engine.position) == (expected.weights(), expected.engine.position)


# -- what can be wrong with a tape ---------------------------------------------------------------


@pytest.fixture
def night(tmp_path):
    return taped_night(tmp_path, epochs=1).run()


def failure(night, number=508, **arguments):
    with pytest.raises(StateError) as caught:
        replayed(night, **arguments)
    assert caught.value.number == number
    return str(caught.value)


def test_no_tape(night, tmp_path):
    night.broker.tape = tmp_path / "elsewhere"
    assert str(tmp_path / "elsewhere") in failure(night, 507)


def entries(file):
    """Where each entry of a tape's file begins."""
    content, starts, at = file.read_bytes(), [], 0
    while (at := content.find(b"NSTP", at)) >= 0:
        starts.append(at)
        at += 1
    return starts


def tape_of(night):
    (file,) = night.broker.tape.glob("*.tape")
    return file


def test_a_flipped_byte_is_named_with_the_message_that_is_missing(night):
    file = tape_of(night)
    whole = file.read_bytes()
    start, end = entries(file)[7:9]
    file.write_bytes(whole[: end - 3] + bytes([whole[end - 3] ^ 1]) + whole[end - 3 :][1:])
    sentence = failure(night)
    assert f"Damaged: {file.name} at byte {start}." in sentence
    assert "message " in sentence
    position = int(sentence.rpartition("--until ")[2].split(".")[0])
    assert 0 < position < sum(night.roles[SERVER].applied.values())
    stopped = replayed(night, until=position)
    file.write_bytes(whole)
    assert stopped.weights() == replayed(night, until=position).weights()


@pytest.mark.parametrize("left", ["half an entry", "half a head", "garbage"])
def test_a_file_that_ends_early(night, left):
    file = tape_of(night)
    whole = file.read_bytes()
    start, end = entries(file)[15:17]
    file.write_bytes(
        {"half an entry": whole[: end - 9], "half a head": whole[: start + 5], "garbage": whole[:start] + bytes(99)}[
            left
        ]
    )
    sentence = failure(night)
    assert f"{file.name} from byte {start} on" in sentence
    assert "is missing" in sentence


def test_a_file_that_is_gone(night):
    tape_of(night).rename(night.broker.tape / "000002.tape")
    (night.broker.tape / "000001.tape").write_bytes(b"")
    replayed(night)
    (night.broker.tape / "000002.tape").unlink()
    assert "a hello of north that fits run.toml" in failure(night)


def test_another_run_toml(night):
    night.config = tiny_config(tape=True, epochs=2)
    assert "that fits run.toml" in failure(night)


def test_a_journal_that_was_lost(tmp_path):
    night = taped_night(tmp_path, order="fair", epochs=1).run()
    assert "order journal" in failure(night, store=MemoryStore())


def test_a_run_that_is_not_over_leads_as_far_as_its_server_came(tmp_path):
    night = taped_night(tmp_path, epochs=2, window=2)
    night.work(SERVER, 0.1)
    for _ in range(3):
        for name in (*night.config.run.sites, SERVER):
            night.work(name, 0.05)
    applied = sum(night.roles[SERVER].applied.values())
    assert applied > 5
    assert f"--until {applied}" in failure(night)
    assert replayed(night, until=applied).weights()[1] == weights_of(night)[1]
    assert isinstance(night.lines[0], Record)
