"""Real services for tests: a private RabbitMQ node and a private Redis server.

Each runs in a folder of its own, on free ports of this machine, as whoever runs the tests; nothing
of an installed service is read or changed. Several can run side by side. A node that is killed
keeps its folder and its ports, so `start()` brings the same queues back.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from unittest.mock import patch

import redis

from nightsplit.broker.rabbitmq import version
from tests.harness.listeners import listeners

# The wrappers on PATH change to the user of the installed service; the scripts themselves do not.
RABBITMQ_SCRIPTS = Path(os.environ.get("NIGHTSPLIT_RABBITMQ", "/usr/lib/rabbitmq/bin"))
"""Folder of rabbitmq-server and rabbitmqctl; the environment may name another version than the installed one."""
REDIS_PROGRAM = os.environ.get("NIGHTSPLIT_REDIS", "redis-server")
"""A Redis or Valkey server: its path, or its name on PATH; likewise."""
START_S = 60.0
STOP_S = 20.0
VHOSTS_AT_A_TIME = 8


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago.

    Below those that systems give to outgoing connections: one of these could take it while a service is restarted.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Service:
    """A process in its own process group, with a folder and a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def answers(self) -> bool:
        raise NotImplementedError

    def listeners(self) -> set[tuple[IPv4Address | IPv6Address, int]]:
        """Each address and port on which it listens."""
        assert self._process is not None
        return listeners(self._process.pid)

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    def start(self) -> None:
        """Start, or start again after `stop` or `kill`; returns when the service answers."""
        if self._process is not None:
            return
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.command()[0]} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask it to finish in order; kill it when it does not."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            self.kill()

    def kill(self) -> None:
        """End the whole process group at once (SIGKILL), as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        """Kill and start again."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()  # nobody needs what it holds, and an orderly end of RabbitMQ takes seconds
        atexit.unregister(self.kill)


class RabbitNode(Service):
    """A RabbitMQ node of its own. Log in as guest; take a fresh `vhost()` per test."""

    def __init__(self, folder: Path, scripts: Path = RABBITMQ_SCRIPTS) -> None:
        super().__init__(folder)
        self._scripts = scripts
        self.port = free_port()
        self.name = f"nightsplit-{os.getpid()}-{self.port}@localhost"
        self._distribution_port = free_port()
        self._numbers = itertools.count(1)
        self._vhosts: list[str] = []
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            # Far below what anybody should run with: a test must not depend on an empty disk.
            "disk_free_limit.absolute = 50MB\n"
            "vm_memory_high_watermark.relative = 0.4\n"
            "log.file.level = warning\n"
        )
        (folder / "enabled_plugins").write_text("[].\n")
        (folder / "data").mkdir(exist_ok=True)
        (folder / "log").mkdir(exist_ok=True)

    @property
    def url(self) -> str:
        """Address of the default vhost."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"

    def command(self) -> list[str]:
        server = self._scripts / "rabbitmq-server"
        _require(server.exists(), "RabbitMQ", "rabbitmq-server")
        return [str(server)]

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        return inherited | {
            "HOME": str(self.folder),  # where Erlang keeps the cookie that `ctl` shows
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            # Erlang's schedulers spin before they sleep, which takes the cores from the test itself.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    @cached_property
    def version(self) -> tuple[int, ...]:
        """The server's version, such as (4, 3, 6)."""
        return tuple(int(part) for part in self.ctl("version").strip().split("."))

    def answers(self) -> bool:
        # The node listens after its queues are recovered, so an AMQP greeting means ready.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
                line.sendall(b"AMQP\x00\x00\x09\x01")
                return line.recv(1) == b"\x01"
        except OSError:
            return False

    def ctl(self, *arguments: str) -> str:
        """Output of `rabbitmqctl`, about two seconds later."""
        done = subprocess.run(
            [str(self._scripts / "rabbitmqctl"), "-q", "-n", self.name, *arguments],
            env=self.environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def vhost(self) -> str:
        """URL of a fresh virtual host, with lazy queues."""
        if not self._vhosts:
            self._vhosts = [f"test{next(self._numbers)}" for _ in range(VHOSTS_AT_A_TIME)]
            # One call for many, since starting rabbitmqctl is what takes the time.
            names = ", ".join(f'<<"{name}">>' for name in self._vhosts)
            self.ctl(
                "eval",
                f'[begin rabbit_vhost:add(V, <<"test">>),'
                f" rabbit_auth_backend_internal:set_permissions("
                f'<<"guest">>, V, <<".*">>, <<".*">>, <<".*">>, <<"test">>),'
                f' rabbit_policy:parse_set(V, <<"lazy">>, <<".*">>,'
                f' <<"{{\\"queue-mode\\":\\"lazy\\"}}">>, 0, <<"queues">>, <<"test">>)'
                f" end || V <- [{names}]].",
            )
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{self._vhosts.pop(0)}"


@contextmanager
def declared_as(queue_type: Literal["classic", "quorum"]) -> Iterator[None]:
    """Within the block, a single node of any version gets queues of this type."""
    with patch.object(version, "FIRST_UNSYNCED", (99,) if queue_type == "classic" else (0,)):
        yield


def for_quorum_queues(url: str) -> str:
    """The address of one node by two names, as if it were a cluster: its queues are quorum queues."""
    host = re.search(r"127\.0\.0\.1(:\d+)", url)
    assert host is not None, url
    return url.replace(host[0], f"{host[0]},localhost{host[1]}")


class RedisServer(Service):
    """A Redis server of its own that keeps its data over a kill; `appendfsync` is Redis's setting."""

    def __init__(self, folder: Path, appendfsync: str = "always") -> None:
        super().__init__(folder)
        self.port = free_port()
        self._appendfsync = appendfsync

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def clear(self) -> None:
        """Forget everything."""
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            client.flushall()

    def command(self) -> list[str]:
        program = shutil.which(REDIS_PROGRAM)
        _require(program is not None, "Redis", "redis-server")
        settings = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self.folder),
            "--save": "",
            "--appendonly": "yes",
            "--appendfsync": self._appendfsync,
        }
        return [str(program), *itertools.chain.from_iterable(settings.items())]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
                line.sendall(b"PING\r\n")
                return line.recv(5) == b"+PONG"
        except OSError:
            return False


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Look again and again; an assertion that names `what` when the time is over."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what} after {timeout} s"
        time.sleep(0.05)


def _require(present: bool, what: str, package: str) -> None:
    if not present:
        raise RuntimeError(
            f"{what} is not installed, and this test talks to a real one. Fix: apt-get install {package}"
        )
