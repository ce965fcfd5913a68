"""Cost of evaluating encrypted sequences, and how exact it is.

    python -m benchmarks.speed.encrypted [--quick] [--rounds N] [--json FILE]

Sequences of 5 frames of 32 features, a classifier of 16 units that was trained on the exclusive or of two events, both
parts of he_clstm without a broker. Seconds are CPU seconds of the server in a process of its own with one thread:
reading keys and ciphertexts, evaluation, blinding, writing. Every round has new keys, 4,096 new sequences in batch
packing, and several ciphertexts of 64 in slot packing; the first of each is not counted, it encodes the weights.
Two processes over one is of wall-clock time, with the server's own processes: it needs two cores that nobody else uses.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.accuracy.events import xor_of_events
from benchmarks.speed.common import Worker, scratch
from benchmarks.speed.convolution import CIRCUIT, UNIT, convolved
from benchmarks.speed.figures import Figure, Results, arguments
from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.server_worker.query.pool import Evaluate, evaluation_pool
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.he.sequences import packing_of, parameters_for
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.site_worker.protocols.he_clstm import HeClstmSite
from nightsplit.site_worker.query.keys import SecretKeys
from nightsplit.site_worker.query.store import Origin, Query

FRAMES, FEATURES, HIDDEN = 5, 32, 16
SIDE, FILTERS, IMAGES = 28, 4, 4096

FIGURES = [
    Figure("slots_s", "refresh, slots: s per ciphertext of 64", 0.6, 1.0, lower_is_better=True),
    Figure("slots_error", "  largest error of a logit, in thousandths", 1.0, 5.0, lower_is_better=True),
    Figure("slots_keys_mb", "  public keys, MB"),
    Figure("slots_kb", "  KB per sequence, all directions"),
    Figure("batch_ms", "refresh, batch of 4096: ms per sequence", 2.0, 3.5, lower_is_better=True),
    Figure("batch_error", "  largest error of a logit, in thousandths", 1.0, 5.0, lower_is_better=True),
    Figure("batch_auc_loss", "  AUC plain - encrypted, in ten-thousandths", 1.0, 5.0, lower_is_better=True),
    Figure("batch_flips", "  decisions that changed", 0.0, 0.0, lower_is_better=True),
    Figure("batch_keys_mb", "  public keys, MB"),
    Figure("batch_kb", "  KB per sequence, all directions", 18.0, 35.0, lower_is_better=True),
    Figure("one_shot_ms", "one_shot, batch of 4096: ms per sequence", 2.0, 3.2, lower_is_better=True),
    Figure("one_shot_error", "  largest error of a logit, in thousandths", 1.0, 5.0, lower_is_better=True),
    Figure("one_shot_auc_below", "  AUC below that of refresh, in thousandths", 2.0, 9.0, lower_is_better=True),
    Figure("one_shot_flips", "  decisions that changed", 0.0, 0.0, lower_is_better=True),
    Figure("one_shot_kb", "  KB per sequence, all directions", 18.0, 35.0, lower_is_better=True),
    Figure("two_over_one", "two processes over one, sequences per second", 1.8, 1.5),
    Figure(
        "convolution_ms", "convolution, 4 filters, 28 x 28, 4096 images: ms per image", 1.5, 2.5, lower_is_better=True
    ),
    Figure("convolution_error", "  largest error, in thousandths", 1.0, 5.0, lower_is_better=True),
]


def trained(recurrent: bool) -> SequenceClassifier:
    """A network trained on a task beyond logistic regression; the same weights at every call."""
    torch.manual_seed(1)
    classifier = SequenceClassifier(FRAMES, FEATURES, HIDDEN, recurrent)
    sequences, labels = xor_of_events(4000, FRAMES, FEATURES, seed=1)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(15):
        for x, y in zip(sequences.split(200), labels.split(200), strict=True):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(classifier(x)[:, 0], y).backward()
            optimizer.step()
    return classifier.double()


class Setting:
    """Both parts with new keys, for one packing."""

    def __init__(self, network: SequenceClassifier, packing: str) -> None:
        classifier = ClassifierWeights.of(network.state_dict())
        ckks = parameters_for(classifier)
        with scratch() as folder:
            rotations = packing_of(packing, ckks, classifier).rotations
            secret, self.public = SecretKeys.make(ckks, folder, rotations)
        self.capacity = packing_of(packing, ckks, classifier).capacity
        self._packing = packing
        self._site, self._server = HeClstmSite(classifier, secret), HeClstmServer(classifier, bytes(32))
        self.queries, self.seconds, self.up, self.down, self.refreshed = 0, 0.0, 0, 0, 0

    @property
    def sent(self) -> int:
        """Bytes of ciphertexts of the last query, both ways; `refreshed` are those between two of its frames."""
        return self.up + self.down

    def query(self, sequences: FloatArray) -> Query:
        """A query with these sequences."""
        self.queries += 1
        origins = tuple(Origin(1, row, "") for row in range(1, len(sequences) + 1))
        return Query(
            self.queries, self.public.sha256, self._packing, origins, sequences,
            step=0, sent=False, state=None, blinding="", logits=None, refusal=None,
        )  # fmt: skip

    def first_pieces(self, sequences: FloatArray) -> list[bytes]:
        """Return the first message of the site."""
        return self._site.encrypt_step(self.query(sequences))

    def judged(self, sequences: FloatArray) -> FloatArray:
        """The logits of a query, all its messages one after the other; CPU seconds and bytes are counted."""
        query, self.seconds, self.up, self.down, self.refreshed = self.query(sequences), 0.0, 0, 0, 0
        answer: list[bytes] = []
        for step in range(self._site.steps):
            query = replace(query, step=step)
            pieces = self._site.encrypt_step(query)
            if answer:  # it goes up again, encrypted afresh, behind the features
                self.refreshed = sum(map(len, [*answer, *pieces[-len(answer) :]]))
            began = time.process_time()
            before, after = (f"{query.number}/{at}" for at in (step - 1, step))
            answer = self._server.answer(self.public, step, self._packing, pieces, before, after)
            self.seconds += time.process_time() - began
            self.up, self.down = self.up + sum(map(len, pieces)), self.down + sum(map(len, answer))
            if step < self._site.steps - 1:
                query = replace(query, state=self._site.decrypt_state(query, answer))
        return self._site.decrypt_logits(query, answer)


def _drawn(n: int) -> tuple[torch.Tensor, FloatArray]:
    sequences, labels = xor_of_events(n, FRAMES, FEATURES, seed=time.time_ns() % 2**62)
    return sequences.double(), labels.numpy()


def answer_queries(line: Connection, recurrent: bool, packing: str, queries: int) -> None:
    """Says, over so many queries that are full: seconds of one, largest error, AUC, and the like."""
    prepare_torch(1, "cpu")
    network = trained(recurrent)
    setting = Setting(network, packing)
    setting.judged(_drawn(setting.capacity)[0].numpy())
    seconds, found, plain, truth = [], [], [], []
    for _ in range(queries):
        sequences, labels = _drawn(setting.capacity)
        found.append(setting.judged(sequences.numpy()))
        seconds.append(setting.seconds)
        with torch.no_grad():
            plain.append(network(sequences)[:, 0].numpy())
        truth.append(labels)
    encrypted, clear, labels = map(np.concatenate, (found, plain, truth))
    aucs = roc_auc_score(labels, clear), roc_auc_score(labels, encrypted)
    line.send({
        "seconds": statistics.median(seconds),
        "error": 1000 * np.abs(encrypted - clear).max(),
        "auc": aucs[0],
        "auc_loss": 1e4 * (aucs[0] - aucs[1]),
        "flips": float(((encrypted > 0) != (clear > 0)).sum()),
        "keys_mb": len(setting.public.content) / 1e6,
        "kb": setting.sent / setting.capacity / 1e3,
        "ms": 1000 * statistics.median(seconds) / setting.capacity,
    })  # fmt: skip


def accuracy(rounds: int) -> dict[str, float]:
    """Both settings and packings; `rounds` ciphertexts of slots for each of a batch."""
    found = {}
    for name, recurrent, packing, queries in [
        ("slots", True, "slots", rounds), ("batch", True, "batch", 1), ("one_shot", False, "batch", 1),
    ]:  # fmt: skip
        with Worker(answer_queries, recurrent, packing, queries) as worker:
            found |= {f"{name}_{key}": value for key, value in worker.hear().items()}
    found["slots_s"] = found["slots_seconds"]
    found["one_shot_auc_below"] = 1000 * (found["batch_auc"] - found["one_shot_auc"])
    return {figure.key: found[figure.key] for figure in FIGURES if figure.key in found}


def two_processes() -> dict[str, float]:
    """The server's own processes, beside one of them alone, before and after; they count as others' programs."""
    network, secret = trained(True), bytes(32)
    setting, classifier = Setting(network, "slots"), ClassifierWeights.of(network.state_dict())
    pieces = setting.first_pieces(_drawn(setting.capacity)[0].numpy())

    def seconds(evaluate: Evaluate, queries: int) -> float:
        began = time.perf_counter()
        wait([evaluate(setting.public, 0, "slots", pieces, "", "1") for _ in range(queries)])
        return time.perf_counter() - began

    with evaluation_pool(classifier, secret, 1) as one, evaluation_pool(classifier, secret, 2) as two:
        for evaluate in (one, two):
            seconds(evaluate, 120)  # until each process has come up, and has encoded the weights
        alone = [seconds(one, 40)]
        both = seconds(two, 40)
        alone.append(seconds(one, 40))
    return {"two_over_one": statistics.mean(alone) / both}


def convolve(line: Connection, side: int) -> None:
    """Says CPU milliseconds per image of 28 x 28, and the largest error."""
    prepare_torch(1, "cpu")
    generator = np.random.default_rng(1)
    filters, bias = generator.normal(0, 0.3, (FILTERS, 3, 3)), generator.normal(0, 0.3, FILTERS)
    images = generator.uniform(size=(IMAGES, side, side))
    with scratch() as folder:
        secret, public = SecretKeys.make(CIRCUIT, folder)
    arithmetic, top = Arithmetic(CIRCUIT, PublicKeys(public.relin, b"")), CIRCUIT.top
    pixels = [
        [CIRCUIT.read(secret.encrypt(images[:, row, column], top), top) for column in range(side)]
        for row in range(side)
    ]
    began = time.process_time()
    outputs = convolved(arithmetic, filters, bias, pixels)
    seconds = time.process_time() - began
    tensors = (torch.from_numpy(one[:, None] if one.ndim == 3 else one) for one in (images, filters, bias))
    clear = nn.functional.avg_pool2d(nn.functional.conv2d(*tensors).square(), 2).numpy()
    error = max(
        np.abs(UNIT**2 * secret.decrypt(one) - clear[:, number, row, column]).max()
        for number, rows in enumerate(outputs)
        for row, ciphertexts in enumerate(rows)
        for column, one in enumerate(ciphertexts)
    )
    line.send((1000 * seconds / IMAGES * (SIDE - 2) ** 2 / (side - 2) ** 2, 1000 * error))


def convolution(side: int) -> dict[str, float]:
    """Measure as `convolve`; smaller images are counted by their outputs."""
    with Worker(convolve, side) as worker:
        milliseconds, error = worker.hear()
    return {"convolution_ms": milliseconds, "convolution_error": error}


def main() -> None:
    options = arguments(__doc__ or "", rounds=3).parse_args()
    results = Results(FIGURES, options.patience, options.retries, None)
    for number in range(2 if options.quick else options.rounds):
        results.console.print(f"round {number + 1}:")
        results.round("judging", partial(accuracy, 2 if options.quick else 16))
        results.round("two processes", two_processes)
        results.round("convolution", partial(convolution, 8 if options.quick else SIDE))
    results.finish("Encrypted sequences", options.json)


if __name__ == "__main__":
    main()
