"""The site worker for encrypted queries to the model of a finished run: submits sequences and collects scores."""

import csv
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

import torch

from nightsplit.broker.connect import open_broker
from nightsplit.broker.sealed import sealed
from nightsplit.broker.topology import query_queues
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import StateError
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.he.sequences import parameters_for, rotations_of, steps_of
from nightsplit.shared.protocols.he_clstm import SPEC, classifier_of, load_trained, stages_of
from nightsplit.shared.protocols.query import CHUNKS_MAX, CONTRACT
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.runtime.process import StopSignal, lock_folder, prepare_torch
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.policy import Gate, check_policy
from nightsplit.site_worker.predict import select_dataset
from nightsplit.site_worker.protocols.he_clstm import HeClstmSite
from nightsplit.site_worker.query.client import QueryClient
from nightsplit.site_worker.query.keys import SECRET, SecretKeys
from nightsplit.site_worker.query.store import QueryStore
from nightsplit.site_worker.rounds.trainer import compute_outputs
from nightsplit.site_worker.worker import SiteWorker

PUBLIC = "public.keys"
"""File name of the public keys, beside the secret key."""
WEIGHTS = ("bottom.safetensors", "model.safetensors")
"""Weights of all stages but the last: after a split run, or after rounds."""


class QuerySiteWorker:
    """Worker for the queries of one site, which are in `queries.db` of its state folder, beside its keys.

    `path` is the site.toml of the finished run; ConfigError if a file is wrong, the policy forbids queries (108), or
    the run's model cannot be evaluated on ciphertexts (105).
    """

    def __init__(self, path: Path, overrides: Sequence[str] = (), stop: StopSignal | None = None) -> None:
        self._stop = stop or StopSignal()
        self.site = SiteWorker(path, overrides, stop=self._stop)
        run = self.site.run_config
        check_policy(self.site.policy, run, SPEC.payloads(run, Shapes()), self.site.policy_file)
        self._front, last = stages_of(self.site.run_config, self.site.run_folder)
        self._classifier = classifier_of(last)
        self.ckks = parameters_for(self._classifier)
        self._keys_folder = self.site.state_folder / "keys"

    @property
    def steps(self) -> int:
        """Number of messages of a query in each direction."""
        return steps_of(self._classifier)

    def submit(self, data: Path | None) -> int:
        """Store sequences for `work`, which encrypts and sends them; return their number.

        `data` is that of `select_dataset`; RunError 605 if the run has not finished here, 604 if its model does not
        fit.
        """
        prepare_torch(self.site.config.threads, self.site.config.device)
        load_trained(self._front, self.site.model_folder, WEIGHTS)
        with lock_folder(self.site.state_folder):
            dataset = select_dataset(self.site, data)
            features = compute_outputs(self._front.eval(), dataset.inputs, "cpu").double().numpy()
            with closing(self._open_store()) as queries:
                queries.submit(dataset.patients, features)
        return len(features)

    def work(self, idle_seconds: float | None = None) -> bool:
        """Send the submitted sequences and collect their scores, in the site's shifts.

        Return whether every query is answered or refused, or exit after `idle_seconds` without an event.
        """
        site, run = self.site, self.site.run_config.run
        limit = site.run_config.wire.message_bytes
        queues = query_queues(run.id, site.config.name, site.run_config.wire.queue_bytes)
        route = Route(outgoing=queues.up, incoming=queues.down, dead=queues.dead)
        with lock_folder(site.state_folder), closing(self._open_store()) as queries:
            secret, public = self._load_keys()
            role = HeClstmSite(self._classifier, secret)
            broker = open_broker(site.config.broker, site.base, limit, site.credentials)
            while site.wait_for_shift():
                link = site.open_link(broker, route, 2 * CHUNKS_MAX, idle_seconds)
                if link is None:
                    return False
                name, routes = site.config.name, {SERVER: route}
                with closing(site.make_exit_log()) as log, sealed(link, site.sealer, name, routes, seals=False) as link:
                    gate = Gate(site.policy_file, site.run_config)
                    size = site.run_config.content_bytes
                    mailbox = Mailbox(run.id, name, link, routes, CONTRACT.get, size, gate, log)
                    if QueryClient(mailbox, role, public, queries).run(site.off_duty, idle_seconds):
                        return True
                if idle_seconds is not None:
                    return False
        return False

    def new_keys(self) -> None:
        """Delete the keys; the next query makes new ones. StateError 512 if open queries need the present ones."""
        with lock_folder(self.site.state_folder):
            with closing(self._open_store()) as queries:
                waiting = len(queries.open())
            if waiting:
                remedy = "collect their scores first: nightsplit query."
                raise StateError(512, f"{waiting} queries are not answered yet.", remedy)
            for name in (SECRET, PUBLIC):
                (self._keys_folder / name).unlink(missing_ok=True)

    def write_scores(self, file: TextIO) -> tuple[int, int]:
        """Write a CSV of all answers: submission, row, patient, logit and probability.

        Return the numbers of sequences that are not answered yet, and that were refused.
        """
        scores = csv.writer(file, lineterminator="\n")
        scores.writerow(["submission", "row", "patient", "logit", "probability"])
        with closing(self._open_store()) as queries:
            waiting, refused = queries.count_waiting(), 0
            for query in queries.all():
                if query.refusal is not None:
                    refused += len(query.origins)
                    continue
                if query.logits is None:
                    waiting += len(query.origins)
                    continue
                probabilities = torch.sigmoid(torch.tensor(query.logits)).tolist()
                for origin, logit, probability in zip(query.origins, query.logits, probabilities, strict=True):
                    scores.writerow([*origin, f"{logit:.6f}", f"{probability:.6g}"])
        return waiting, refused

    def _open_store(self) -> QueryStore:
        return QueryStore(self.site.state_folder / "queries.db")

    def _load_keys(self) -> tuple[SecretKeys, PublicKeys]:
        path = self._keys_folder / PUBLIC
        if path.exists():
            return SecretKeys.read(self.ckks, self._keys_folder), PublicKeys.of(path.read_bytes())
        secret, public = SecretKeys.make(self.ckks, self._keys_folder, rotations_of(self.ckks, self._classifier))
        write_atomic(path, public.content)
        return secret, public
