"""Kinds and ranges of messages allowed at each position of a stream; all others are refused.

    item         half      a site sends                  the server answers
    training     first     smashed                       cut_gradient; with a head: head_input
                 second    head_gradient, or a report    cut_gradient; noted
    averaging    first     bottom                        average; with a head: noted
                 second    report                        average; noted if no site sent a bottom
    evaluation   first     smashed                       noted; with a head: head_input
                 second    report                        noted

In a run that learns by targets, head_target and cut_target take the place of gradients; its contract has only one of
the two. Any answer may be `refused` instead. A site that uploads once gets no answer. `finish` follows the last
answer; it comes earlier only if the run may end early.
"""

from collections.abc import Mapping

from nightsplit.shared.config.run import RunSection, TaskSection
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.learning.bounds import NORM_MAX, check_bounded, is_bounded
from nightsplit.shared.protocols.plan import Purpose, evaluations
from nightsplit.shared.protocols.stream import Half, Slot, StreamSequence
from nightsplit.shared.wire.message import Kind, Message

Kinds = tuple[frozenset[Kind], frozenset[Kind]]
"""Kinds that the site may send at a position, and those that the server may answer."""


def _kinds(up: set[Kind], down: set[Kind]) -> Kinds:
    return frozenset(up), frozenset(down | {Kind.REFUSED})


_EVALUATION = (Purpose.VALIDATION, Purpose.TEST)
WITHOUT_HEAD: Mapping[Purpose, Kinds] = {
    Purpose.TRAIN: _kinds({Kind.SMASHED}, {Kind.CUT_GRADIENT, Kind.CUT_TARGET}),
    Purpose.AVERAGE: _kinds({Kind.BOTTOM}, {Kind.AVERAGE}),
    **dict.fromkeys(_EVALUATION, _kinds({Kind.SMASHED}, {Kind.NOTED})),
}
WITH_HEAD: Mapping[tuple[Purpose, Half], Kinds] = {
    (Purpose.TRAIN, "first"): _kinds({Kind.SMASHED}, {Kind.HEAD_INPUT}),
    (Purpose.TRAIN, "second"): _kinds(
        {Kind.HEAD_GRADIENT, Kind.HEAD_TARGET, Kind.REPORT}, {Kind.CUT_GRADIENT, Kind.CUT_TARGET, Kind.NOTED}
    ),
    (Purpose.AVERAGE, "first"): _kinds({Kind.BOTTOM}, {Kind.NOTED}),
    (Purpose.AVERAGE, "second"): _kinds({Kind.REPORT}, {Kind.AVERAGE, Kind.NOTED}),
    **{(part, "first"): _kinds({Kind.SMASHED}, {Kind.HEAD_INPUT}) for part in _EVALUATION},
    **{(part, "second"): _kinds({Kind.REPORT}, {Kind.NOTED}) for part in _EVALUATION},
}


def kinds_at(sequence: StreamSequence, slot: Slot) -> Kinds:
    """Return the kinds allowed at a position, without the farewell."""
    if sequence.has_head:
        return WITH_HEAD[slot.item.purpose, slot.half]
    up, down = WITHOUT_HEAD[slot.item.purpose]
    return up, frozenset() if sequence.plan.uploads_once else down


def check_upload(message: Message, sequence: StreamSequence, task: TaskSection) -> Slot:
    """Check a site's message and return its position.

    Raises:
        Refused: 304 it does not belong there, or has targets that are invalid for the task; 306 its batch has
            another size; 312 weights that are not finite.
    """
    slot = sequence.slot(message.header.seq)
    _check_kind(message, kinds_at(sequence, slot)[0])
    if message.header.version != slot.item.version:
        raise _misplaced(
            message, f"was made by bottom version {message.header.version}, "
            f"item {slot.item.number} needs {slot.item.version}"
        )  # fmt: skip
    _check_rows(message, slot)
    _check_targets(message, task)
    if message.header.kind is Kind.BOTTOM:
        check_bounded("the weights", *message.tensors.values())
    return slot


def check_answer(message: Message, sequence: StreamSequence, run: RunSection) -> Slot:
    """Check the server's message and return the position that it answers.

    Raises:
        Refused: 304 it does not belong there, or reports an evaluation that is impossible; 306 its batch has
            another size.
    """
    header = message.header
    slot = sequence.slot(header.seq)
    _check_kind(message, kinds_at(sequence, slot)[1])
    if header.reply_to != header.seq:
        raise _misplaced(message, f"answers message {header.reply_to}")
    _check_rows(message, slot)
    _check_progress(message, sequence, run, header.seq)
    return slot


def check_farewell(message: Message, sequence: StreamSequence, run: RunSection) -> None:
    """Check that a run may end here: at its end, or with its `patience` exhausted; Refused 304 if not."""
    seq = message.header.seq
    _check_progress(message, sequence, run, seq - 1)
    at_best, at_last = (evaluations(epoch, run.epochs, run.evaluate_every) for epoch in _progress(message))
    exhausted = 0 < run.patience <= at_last - at_best
    if seq != sequence.last_answer and (sequence.plan.uploads_once or not exhausted):
        raise _misplaced(message, "ends a run that is not at its end")


def _check_kind(message: Message, kinds: frozenset[Kind]) -> None:
    if message.header.kind not in kinds:
        raise _misplaced(message, f"comes where {' or '.join(sorted(kinds)) or 'nothing'} belongs")


def _check_rows(message: Message, slot: Slot) -> None:
    for name in ("smashed", "gradient", "displacement", "activations"):
        tensor = message.tensors.get(name)
        if tensor is not None and len(tensor) != len(slot.item.rows):
            rows = f"{len(tensor)} rows, item {slot.item.number} has {len(slot.item.rows)}"
            raise mismatch(f"{name} of {message.header.message_id} has {rows}.", 306)


def _check_targets(message: Message, task: TaskSection) -> None:
    targets = message.tensors.get("targets")
    if targets is None:
        return
    if task.kind == "multiclass":
        valid, allowed = bool(((targets >= 0) & (targets < task.classes)).all()), f"0 to {task.classes - 1}"
    elif task.kind == "binary":
        valid, allowed = bool(((targets == 0) | (targets == 1)).all()), "0 and 1"
    else:
        valid, allowed = is_bounded(targets), f"numbers up to {NORM_MAX:g}"
    if not valid:
        raise _misplaced(message, f"has targets other than {allowed}")


def _check_progress(message: Message, sequence: StreamSequence, run: RunSection, seq: int) -> None:
    """Check that the epochs are ones that the site itself has evaluated up to message `seq`."""
    best, last = _progress(message)
    possible = best <= last and all(_is_evaluated(epoch, run) for epoch in (best, last) if epoch)
    if possible and last and not sequence.plan.uploads_once:
        possible = sequence.completing_seq(sequence.plan.end(last)) <= seq
    if not possible:
        raise _misplaced(message, f"reports epoch {best} as the best, and {last} as the last evaluated one")


def _is_evaluated(epoch: int, run: RunSection) -> bool:
    return 0 < epoch <= run.epochs and (epoch % run.evaluate_every == 0 or epoch == run.epochs)


def _progress(message: Message) -> tuple[int, int]:
    return int(message.scalars["best"]), int(message.scalars["judged"])


def _misplaced(message: Message, reason: str) -> Refused:
    return mismatch(f"{message.header.message_id} {reason}.")
