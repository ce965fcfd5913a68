"""Explanation of a run to a hospital: the messages that it will send, in numbers, and those that it has sent."""

from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path

from nightsplit.console.exit_log import show_log
from nightsplit.console.ui.text import counted, screen
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import RunError
from nightsplit.shared.protocols.blocks import sequence_for
from nightsplit.shared.protocols.build import SplitModel, WholeModel, build_model
from nightsplit.shared.protocols.rounds import RoundSequence
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.wire.message import FROM_SITES, UNSEQUENCED
from nightsplit.shared.wire.schema import BATCH, TELLS, Payload, Reveals
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.worker import SiteWorker


def explain_run(path: Path) -> None:
    """Print the messages that a site will send and has sent; raises as `SiteWorker`, and DataError as its data."""
    site = SiteWorker(path)
    model, splits = build_model(site.run_config, site.run_folder), site.load_splits()
    console = screen()
    for sentence in (*_readers(site), *_amounts(site, model, splits), *_contents(model)):
        console.print(sentence, soft_wrap=True)
    console.print()
    with suppress(RunError):  # 605: nothing yet
        console.print(f"{site.config.name} has sent:")
        show_log(WorkerFile(path), as_json=False)
        return
    console.print("nothing so far")


def _readers(site: SiteWorker) -> Iterator[str]:
    run = site.run_config
    yield f"Run {run.run.id}, {run.run.protocol}: {site.config.name} sends to the server, which can read and keep it."
    if run.parties:
        yield "Messages are signed and sealed: the broker reads names, kinds, sizes and hours, and nothing else."
    else:
        yield "The run has no keys: whoever administers the broker can read everything, too."


def _amounts(site: SiteWorker, model: SplitModel | WholeModel, splits: Splits) -> Iterator[str]:
    run, counts = site.run_config, splits.counts
    yield f"The data: {', '.join(f'{number} {part}' for part, number in counts.items())} samples."
    if isinstance(model, WholeModel):
        rounds = RoundSequence.of(run, len(splits.train), model.layout)
        sent = f"{counted(rounds.updates, 'update')} of {model.layout.length:,} weights"
        yield f"At most {sent}, in {counted(rounds.last, 'message')}; each update depends on all training samples."
        return
    sequence = sequence_for(run, len(splits.train), len(splits.validation), len(splits.test))
    plan, last = sequence.plan, sequence.last
    times = 1 if spec_of(run).uploads_once else run.run.epochs
    ahead, batch = counted(plan.unanswered, "batch"), run.run.batch_size
    yield f"At most {counted(last, 'message')}; each training sample is in {counted(times, 'message')} or more."
    yield f"In a night without an answer {ahead} of {batch} to {2 * batch - 1} samples may leave."


def _contents(model: SplitModel | WholeModel) -> Iterator[str]:
    for kind, payload in model.contract.items():
        if kind in FROM_SITES and kind not in UNSEQUENCED:
            told = [revealed for revealed in Reveals if revealed in payload.reveals and revealed is not Reveals.NOTHING]
            yield f"- {kind}: {_numbers(payload)}"
            yield from (f"    {revealed}: {TELLS[revealed]}" for revealed in told)


def _numbers(payload: Payload) -> str:
    """Describe the tensors of a message: numbers for each sample, or in all."""
    texts = []
    for name, tensor in payload.tensors.items():
        size = prod(length for length in tensor.shape if isinstance(length, int))
        each = " for each sample" if BATCH in tensor.shape else ""
        texts.append(f"{name}, {counted(size, 'number')}{each} ({tensor.codec})")
    return "; ".join(texts) or "figures"
