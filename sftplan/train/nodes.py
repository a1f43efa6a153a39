"""Several machines, one `sftplan launch` on each: which of them this is, and all gone when one is.

The first host listens, one port above that of the ranks, and each other one holds a connection to it.
An end of it without a word of farewell, or silence for some KEEPALIVE seconds, means that the ranks
there are gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

PORT = 29500  # torch.distributed's own choice
FAREWELL = b"well"
CONNECT_S = 600.0  # nodes are not started at once, nor is their data ready at once
RETRY_S = 1.0
POLL_S = 0.05
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))  # 30 s in all
NODE_OPTIONS = ("hosts", "node_rank", "port")  # of a launch: where it runs, not how it trains


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of a run."""

    hosts: tuple[str, ...] = ("127.0.0.1",)
    number: int = 0  # of this one among the hosts
    port: int = 0  # where the ranks meet; 0: any, on a single machine

    @property
    def is_first(self) -> bool:
        """Whether this one writes what a run leaves."""
        return self.number == 0


def node_of(hosts: str | None, *, number: int | None, port: int | None, num_nodes: int) -> Node:
    """This machine's place among the hosts of `--hosts`, the first of which leads.

    >>> node_of("a, b", number=1, port=None, num_nodes=2)
    Node(hosts=('a', 'b'), number=1, port=29500)

    Raises:
        UsageError: They are not as many as the plan has nodes, or none of them is this machine.
    """
    names = tuple(name.strip() for name in (hosts or "").split(",") if name.strip())
    if num_nodes == 1 and len(names) <= 1:
        return Node(port=port or 0)
    if len(names) != num_nodes:
        message = f"the plan has {num_nodes} nodes, --hosts names {len(names)}"
        hint = "--hosts A,B,... on each of them; `sftplan export --to slurm` writes a script"
        raise UsageError(message, hint)
    if number is None:
        number = _own_number(names)
    if not 0 <= number < num_nodes:
        message = f"--node-rank {number}: the nodes are 0 to {num_nodes - 1}"
        raise UsageError(message)
    return Node(hosts=names, number=number, port=port or PORT)


def _own_number(names: tuple[str, ...]) -> int:
    own = set(_own_names())
    found = [number for number, name in enumerate(names) if name.lower() in own]
    if len(found) != 1:
        which = "none" if not found else f"{len(found)}"
        message = f"{which} of --hosts {','.join(names)} is this machine, {socket.gethostname()}"
        raise UsageError(message, "--node-rank says which one it is, from 0")
    return found[0]


def _own_names() -> Iterable[str]:
    import psutil  # type: ignore[import-untyped]

    name = socket.gethostname().lower()
    yield from (name, name.partition(".")[0], socket.getfqdn().lower())
    for addresses in psutil.net_if_addrs().values():
        yield from (each.address.lower() for each in addresses)


def meeting_port(node: Node) -> int:
    """The port at which the ranks meet; on the machine that leads it has to be free.

    Raises:
        UsageError: It is in use.
    """
    if not node.is_first:
        return node.port
    with _listening(node, node.port) as probe:
        return int(probe.getsockname()[1])


def _listening(node: Node, port: int) -> socket.socket:
    try:
        return socket.create_server(("" if len(node.hosts) > 1 else "127.0.0.1", port))
    except OSError as error:
        message = f"--port: {port} on {node.hosts[0]} is not free: {error.strerror or error}"
        raise UsageError(message, "--port N takes another, the same on every node") from None


class Others:
    """The launchers of the other machines: whether one of them is gone."""

    def __init__(self, node: Node) -> None:
        self.lost: str | None = None
        self._node = node
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        if len(node.hosts) < 2:
            return
        if node.is_first:
            self._listener = _listening(node, node.port + 1)
        target = self._accept if node.is_first else self._connect
        threading.Thread(target=target, daemon=True, name="sftplan-nodes").start()

    def wait_for_loss(self, seconds: float) -> None:
        """Until one is known to be gone, for so long at most."""
        deadline = time.monotonic() + (seconds if len(self._node.hosts) > 1 else 0.0)
        while self.lost is None and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def end(self, *, well: bool) -> None:
        """Say farewell, or only go."""
        self._ended.set()
        for each in (*self._sockets, *([self._listener] if self._listener else [])):
            with contextlib.suppress(OSError):
                if well and each is not self._listener:
                    each.sendall(FAREWELL)
                each.shutdown(socket.SHUT_RDWR)  # a thread waits at it: closing alone ends nothing
            each.close()

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in self._node.hosts[1:]:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return  # we have ended
            self._watch(connection, str(address[0]))

    def _connect(self) -> None:
        leader = (self._node.hosts[0], self._node.port + 1)
        deadline = time.monotonic() + CONNECT_S
        while not self._ended.wait(RETRY_S):
            try:
                self._watch(socket.create_connection(leader, timeout=RETRY_S), leader[0])
                return
            except OSError:
                if time.monotonic() > deadline:
                    self.lost = leader[0]
                    return

    def _watch(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            if hasattr(socket, option):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sockets.append(connection)

        def wait() -> None:
            try:
                word = connection.recv(len(FAREWELL))
            except OSError:
                word = b""
            if word != FAREWELL and not self._ended.is_set():
                self.lost = name

        threading.Thread(target=wait, daemon=True, name="sftplan-node").start()
