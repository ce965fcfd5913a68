"""TCP sockets on which a process group listens, as Linux knows them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"


def listeners(group: int) -> set[tuple[IPv4Address | IPv6Address, int]]:
    """Address and port of each socket on which a process of `group` listens."""
    own = {inode for process in _processes(group) for inode in _sockets(process)}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in (PROC / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == LISTENING and inode in own:
                address, _, port = local.rpartition(":")
                found.add((_address(address), int(port, 16)))
    return found


def _processes(group: int) -> Iterator[Path]:
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                yield process


def _sockets(process: Path) -> Iterator[str]:
    """Inodes of the sockets that a process has open."""
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if socket_of := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                yield socket_of[1]


def _address(words: str) -> IPv4Address | IPv6Address:
    """Address in the kernel's notation: words of four bytes, each in the byte order of this machine."""
    packed = b"".join(socket.ntohl(int(words[at : at + 8], 16)).to_bytes(4, "big") for at in range(0, len(words), 8))
    return ip_address(packed)
