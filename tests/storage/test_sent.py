"""Copies of sent messages: found again in the next process once they are forced to disk, and removed when released."""

import pytest

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.sent import SentMessages


def body_of(seq):
    return bytes([seq]) * (100 + seq)


def kept(folder, *seqs, receiver="north"):
    sent = SentMessages(folder)
    for seq in seqs:
        sent.keep(receiver, seq, f"id-{seq}", [body_of(seq)[:50], memoryview(body_of(seq)[50:])])
    return sent


def found(sent, *seqs, receiver="north"):
    return [seq for seq in seqs if sent.find(receiver, seq) == (f"id-{seq}", body_of(seq))]


def test_what_was_forced_to_disk_is_found_in_the_next_process(tmp_path):
    kept(tmp_path, 1, 2, 3).sync()
    later = kept(tmp_path, 4)
    assert found(later, 1, 2, 3, 4) == [1, 2, 3, 4]
    assert found(SentMessages(tmp_path), 1, 2, 3, 4) == [1, 2, 3]
    assert later.find("south", 1) is None
    assert later.find("north", 5) is None


def test_a_crash_repeats_messages(tmp_path):
    kept(tmp_path, 1, 2, 3).sync()
    again = kept(tmp_path, 2, 3, 4)
    again.sync()
    assert found(again, 1, 2, 3, 4) == [1, 2, 3, 4]


def test_released_messages_are_removed_file_by_file(tmp_path):
    for seqs in ((1, 2), (3, 4)):
        kept(tmp_path, *seqs).sync()
    kept(tmp_path, 1, receiver="south").sync()
    sent = SentMessages(tmp_path)
    sent.release("north", 3)
    assert found(sent, 1, 2, 3, 4) == [3, 4]
    assert found(sent, 1, receiver="south") == [1]
    assert len(list((tmp_path / "north").iterdir())) == 1


def test_a_damaged_file_and_a_full_disk_end_in_a_number(tmp_path, monkeypatch):
    sent = kept(tmp_path, 1)
    sent.sync()
    (file,) = (tmp_path / "north").iterdir()
    file.write_bytes(b"\xff" + file.read_bytes())
    with pytest.raises(StateError, match=r"E501.*damaged"):
        sent.find("north", 1)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nightsplit.shared.storage.sent.write_atomic", full)
    with pytest.raises(StateError, match=r"E501.*No space left"):
        kept(tmp_path, 2).sync()
