"""A RabbitMQ cluster for tests: three nodes of this machine, each of which can die, freeze or be cut off."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.harness.services import RabbitNode, wait_until

NODES = 3


class ClusterNode(RabbitNode):
    """One node of three."""

    def form(self, cookie: str, names: list[str]) -> None:
        """Write down whom to join; before the first start."""
        secret = self.folder / ".erlang.cookie"
        secret.write_text(cookie)
        secret.chmod(0o400)
        with (self.folder / "rabbitmq.conf").open("a") as conf:
            conf.write("cluster_formation.peer_discovery_backend = classic_config\n")
            conf.writelines(f"cluster_formation.classic_config.nodes.{n} = {name}\n" for n, name in enumerate(names, 1))
            conf.write("cluster_partition_handling = pause_minority\nnet_ticktime = 10\n")

    def freeze(self) -> None:
        """Stop the process where it is; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def make_ready_to_cut_off(self, peers: list[str]) -> None:
        """What `cut_off` has to ask of the node, which takes seconds."""
        self._fuse.unlink(missing_ok=True)  # of an earlier time, when the node was started anew after it
        cut = f"begin erlang:set_cookie(N, cut), erlang:disconnect_node(N) end || N <- {_atoms(peers)}"
        self.ctl(
            "eval",
            f"Wait = fun Again() -> filelib:is_file('{self._fuse}') orelse begin timer:sleep(20), Again() end end, "
            f"spawn(fun() -> Wait(), [{cut}] end).",
        )

    def cut_off(self) -> None:
        """Let it lose its connections to the others at once, and neither side make new ones; clients still reach it.

        Sooner or later it pauses, as it is in the minority, and no longer answers, if it `pauses_in_a_minority`.
        """
        self._fuse.touch()

    @property
    def pauses_in_a_minority(self) -> bool:
        """From RabbitMQ 4.3 on, which has Khepri alone, a node that is cut off goes on answering clients."""
        return self.version < (4, 3)

    def join_again(self, peers: list[str]) -> None:
        """End `cut_off`."""
        self._fuse.unlink()
        self.ctl("eval", f"[erlang:set_cookie(N, erlang:get_cookie()) || N <- {_atoms(peers)}].")

    @property
    def _fuse(self) -> Path:
        return self.folder / "fuse"


def _atoms(names: list[str]) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"


class Cluster:
    """Three nodes, up and together within the block.

    Args:
        folder: where everything goes.
    """

    def __init__(self, folder: Path) -> None:
        self.nodes = [ClusterNode(folder / f"node{number}") for number in range(1, NODES + 1)]
        cookie = secrets.token_hex(10)
        names = [node.name for node in self.nodes]
        for node in self.nodes:
            # The first starts alone: from RabbitMQ 3.13 on, a node whose list names others waits for one of them.
            node.form(cookie, names[:1] if node is self.nodes[0] else names)

    def url(self, first: int = 0) -> str:
        """Address of all nodes, for clients that try node `first` first."""
        turn = [*self.nodes[first:], *self.nodes[:first]]
        return f"amqp://guest:guest@{','.join(f'127.0.0.1:{node.port}' for node in turn)}/%2F"

    def leader(self, queue: str) -> ClusterNode:
        """Who leads a quorum queue, as a node that is up tells."""
        told = dict(line.split("\t") for line in self._anyone().ctl("list_queues", "name", "leader").splitlines())
        return next(node for node in self.nodes if node.name == told[queue])

    def peers(self, node: ClusterNode) -> list[str]:
        """Names of the other nodes."""
        return [other.name for other in self.nodes if other is not node]

    def wait_until_whole(self) -> None:
        """Wait until each node sees all others."""
        sees_all = f"(catch length(rpc:call(N, rabbit_nodes, all_running, [], 5000))) =:= {NODES}"
        asked = f"lists:all(fun(N) -> {sees_all} end, {_atoms([node.name for node in self.nodes])})."

        def whole() -> bool:
            return self._anyone().ctl("eval", asked).strip() == "true"

        wait_until(whole, 60, "the nodes to see each other")

    def _anyone(self) -> ClusterNode:
        return next(node for node in self.nodes if node.answers())


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start one; the first node alone, since nodes that start together may not see each other in time."""
    made = Cluster(folder)
    with ExitStack() as stack, ThreadPoolExecutor(NODES) as together:
        stack.enter_context(made.nodes[0])
        for entered in [together.submit(stack.enter_context, node) for node in made.nodes[1:]]:
            entered.result()
        made.wait_until_whole()
        yield made
