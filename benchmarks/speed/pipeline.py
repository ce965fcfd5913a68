"""Split training over RabbitMQ against the same model in one process, on the same cores.

    python -m benchmarks.speed.pipeline [--quick] [--rounds N] [--json FILE] [--broker URL] [--only NAME ...]

A site process and a server process, one thread each, with persistent and confirmed messages and a
window of 4, are timed at the server from batch `warmup` on; before and after them, in the same round,
the uncut model in one plain PyTorch process with two threads. A worker keeps freed memory
(`prepare_torch`); the last comparison gives the one process the same advantage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.speed import split
from benchmarks.speed.cases import Case
from benchmarks.speed.common import Place, Worker, fresh_name, queues_of, rabbitmq, scratch
from benchmarks.speed.figures import Figure, Results, arguments


@dataclass(frozen=True)
class Row:
    """A case and the figure that it gives.

    Attributes:
        key: of the ratio.
        what: in words.
        case: what is trained.
        seconds: how long the clock of a full round runs, about.
        bounds: aim and floor of the ratio.
    """

    key: str
    what: str
    case: Case
    bounds: tuple[float, float] | tuple[None, None] = (None, None)


SMALL, WIDE = Case("small", 64, 64, 3), Case("wide", 64, 64, 3, batches=40, warmup=8)
PEER_32 = Case("peer", 32, 32, 1, batches=500, warmup=60)
PEER_128 = replace(PEER_32, batch=128, batches=200, warmup=24)
ROWS = {
    "small_fp16": Row("small_fp16_over_2t", "small model, fp16", SMALL, (0.80, 0.65)),
    "small_int8": Row("small_int8_over_2t", "small model, int8", replace(SMALL, codec="int8"), (0.90, 0.65)),
    "peer_b32": Row("peer_cnn_b32_over_2t", "peers' CNN, batch 32", PEER_32, (0.80, 0.65)),
    "peer_b128": Row("peer_cnn_b128_over_2t", "peers' CNN, batch 128", PEER_128, (0.80, 0.65)),
    "peer_b32_pooled": Row(
        "peer_cnn_b32_pooled_over_2t", "peers' CNN, batch 32, cut after the pooling",
        replace(PEER_32, cut=3),
    ),
    "peer_b128_pooled": Row(
        "peer_cnn_b128_pooled_over_2t", "peers' CNN, batch 128, cut after the pooling", replace(PEER_128, cut=3)
    ),
    "peer_b32_threads": Row(
        "peer_cnn_b32_threads_over_2t", "peers' CNN, batch 32, server with 2 threads",
        replace(PEER_32, server_threads=2),
    ),
    "peer_b128_threads": Row(
        "peer_cnn_b128_threads_over_2t", "peers' CNN, batch 128, server with 2 threads",
        replace(PEER_128, server_threads=2),
    ),
    "heavy": Row("heavy_over_2t", "compute-heavy server", WIDE),
}  # fmt: skip
OVERHEADS = {"small_fp16": "engine_overhead", "peer_b32": "engine_overhead_b32"}
FIGURES = [
    figure
    for name, row in ROWS.items()
    for figure in (
        Figure(row.key, f"{row.what}: over one process with 2 threads", *row.bounds),
        Figure(row.key.replace("_over_2t", "_over_1t"), "  the same over one thread"),
        Figure(row.key.replace("_over_2t", "_over_2t_tuned"), "  the same over 2 threads that keep freed memory"),
        Figure(f"{name}_samples_per_s", "  samples per second"),
        Figure(f"{name}_uncut_2t_samples_per_s", "  samples per second in one process, 2 threads"),
        Figure(f"{name}_cpu_ms_per_batch", "  CPU ms per batch, all processes"),
        Figure(f"{name}_transport_cpu_share", "  share of broker and link threads in it"),
    )
] + [
    Figure("heavy_over_roof", "compute-heavy server: over the slower stage alone", 0.97, 0.90),
    Figure("engine_overhead", "share of the engine in the server's busy time", 0.05, 0.10, lower_is_better=True),
    Figure("engine_overhead_b32", "  the same for the peers' CNN, batch 32"),
    Figure("transport_cpu_share", "share of broker and link threads in all CPU time (small, fp16)"),
    Figure("site_memory_growth", "growth of a site's memory with its backlog", 0.0, 0.10, lower_is_better=True),
    Figure("site_start_mb", "  MB before"),
    Figure("site_backlog_mb", "  MB with the backlog at the broker"),
]


def train_split(case: Case, place: Place) -> dict[str, Any]:
    """One run over the broker; returns the server's report."""
    run = fresh_name("bench")
    with (
        scratch() as folder,
        queues_of(place.broker(), list(case.queues(run))),
        Worker(split.server, case, run, place, folder) as server,
        Worker(split.site, case, run, place, folder) as site,
    ):
        site_ids = site.hear()
        server.hear()
        server.say(site_ids)
        site.say("go")
        heard: dict[str, Any] = server.hear()
        site.hear()
        return heard


def measure(name: str, case: Case, place: Place) -> dict[str, float]:
    """One row, by key; the ratio that it is for comes first."""
    batches = max(8, (case.batches - case.warmup) // 4)
    with Worker(split.uncut, case, False) as plain, Worker(split.uncut, case, True) as tuned:
        one, two = plain.ask(("whole", 1, batches)), plain.ask(("whole", 2, batches))
        tuned_two = tuned.ask(("whole", 2, batches))
        stages = tuned.ask(("stages", 1, batches)) if name == "heavy" else None
        heard = train_split(case, place)
        # Before and after, since the machine drifts.
        two = (two + plain.ask(("whole", 2, batches))) / 2
        tuned_two = (tuned_two + tuned.ask(("whole", 2, batches))) / 2
        plain.say(None)
        tuned.say(None)
    key, speed = ROWS[name].key, heard["samples_per_s"]
    values = {
        key: speed / two,
        key.replace("_over_2t", "_over_1t"): speed / one,
        key.replace("_over_2t", "_over_2t_tuned"): speed / tuned_two,
        f"{name}_samples_per_s": speed,
        f"{name}_uncut_2t_samples_per_s": two,
    }
    cpu = heard["cpu"]
    if place.pid:
        everything = cpu["workers"] + cpu["broker"]
        values[f"{name}_cpu_ms_per_batch"] = 1e3 * everything / (case.batches - case.warmup)
        values[f"{name}_transport_cpu_share"] = (cpu["links"] + cpu["broker"]) / everything
        if name == "small_fp16":
            values["transport_cpu_share"] = values[f"{name}_transport_cpu_share"]
    if stages:
        values["heavy_over_roof"] = speed * max(stages) / case.batch
    if name in OVERHEADS:
        waited = heard["times"].pop("waiting", 0.0)
        values[OVERHEADS[name]] = 1 - sum(heard["times"].values()) / (heard["seconds"] - waited)
    return values


def measure_memory(place: Place, backlog: int) -> dict[str, float]:
    """A site's memory beside an unattended backlog."""
    batches = backlog // (SMALL.batch * 16 * 32 * 32 * 2) + 200
    case, run = replace(SMALL, window=10**6, batches=batches), fresh_name("bench")
    with scratch() as folder, queues_of(place.broker(), list(case.queues(run))):
        split.open_run(case, run, place, folder)
        with Worker(split.site, case, run, place, folder, backlog) as site:
            before, after = site.hear()
    return {"site_memory_growth": after / before - 1, "site_start_mb": before / 1e6, "site_backlog_mb": after / 1e6}


def shorter(case: Case) -> Case:
    """A quarter of the timed batches."""
    return replace(case, batches=case.warmup + (case.batches - case.warmup) // 4)


def main() -> None:
    parser = arguments(__doc__ or "", rounds=5)
    parser.add_argument("--only", nargs="+", choices=[*ROWS, "memory"], help="measure these rows alone")
    options = parser.parse_args()
    chosen = options.only or [*ROWS, "memory"]
    with rabbitmq(options.broker) as place:
        results = Results(FIGURES, options.patience, options.retries, place.pid)
        for number in range(2 if options.quick else options.rounds):
            results.console.print(f"round {number + 1}:")
            for name in chosen:
                if name in ROWS:
                    case = shorter(ROWS[name].case) if options.quick else ROWS[name].case
                    results.round(name, partial(measure, name, case, place))
        if "memory" in chosen:
            results.round("memory", partial(measure_memory, place, 200 * 10**6 if options.quick else 2 * 10**9))
    results.finish("Split training over RabbitMQ, window 4, persistent and confirmed", options.json)


if __name__ == "__main__":
    main()
