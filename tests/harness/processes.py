"""Processes of `python -m nightsplit` that begin with the libraries loaded, and with nothing of ours.

Python and its libraries take seconds of a core to load, far more than a small run takes. So one process that
has loaded them waits, and each worker is a fork of it: a process of its own, with its own folder, environment,
output and signals. Where the beginning itself is looked at, `Fresh` starts one the way a user does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LIBRARIES = [
    "torch._dynamo", "matplotlib.figure", "msgpack", "msgspec", "pandas", "pika", "redis", "rich.live",
    "pydantic", "safetensors.torch", "sklearn.metrics", "typer", "zstandard",
]  # fmt: skip
"""What our modules import: loaded once, and forked."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LIBRARIES)


class Process:
    """A command line of nightsplit at work, forked; what may be asked of it is named as in `subprocess.Popen`.

    Args:
        arguments: of the command line.
        folder: where it works.
        out, err: files that its output is appended to.
        environment: added to ours.
    """

    def __init__(
        self, arguments: list[str], folder: Path, out: Path, err: Path, environment: Mapping[str, str] = {}
    ) -> None:
        self.args, self.out, self.err = arguments, out, err
        self._process = FORKS.Process(target=_run, args=(arguments, folder, out, err, {**os.environ, **environment}))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        atexit.register(self.kill)

    @property
    def returncode(self) -> int | None:
        """Exit code; the negative signal that ended it; None while it works."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        atexit.unregister(self.kill)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, when it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Fresh(subprocess.Popen[bytes]):
    """The same, begun by a Python of its own, as a user begins it."""

    def __init__(
        self, arguments: list[str], folder: Path, out: Path, err: Path, environment: Mapping[str, str] = {}
    ) -> None:
        self.out, self.err = out, err
        with out.open("ab") as out_file, err.open("ab") as err_file:
            super().__init__(
                [sys.executable, "-m", "nightsplit", *arguments], cwd=folder, env={**os.environ, **environment},
                stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
            )  # fmt: skip


def _run(arguments: list[str], folder: Path, out: Path, err: Path, environment: Mapping[str, str]) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module("nightsplit", run_name="__main__", alter_sys=True)


def open_files(folder: Path) -> list[Path]:
    """Files below `folder` that this process holds open."""
    held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    return [path for path in held if path.is_relative_to(folder.resolve())]
