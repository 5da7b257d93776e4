"""What this machine lets a container have: capabilities, control groups, user ids. Read once, then a value."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lazyfs.process import core_limits

# docker's default set, in the kernel's order of bits (capabilities(7), include/uapi/linux/capability.h)
_DEFAULT_CAPABILITIES = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18,
    "CAP_MKNOD": 27, "CAP_AUDIT_WRITE": 29, "CAP_SETFCAP": 31,
}  # fmt: skip
_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Host:
    """Facts about the machine and our rights on it.

    `capabilities`: those of the default set that we can hand on. `cgroup`: "v1", "v2", or "" when containers get none.
    `ids`: how many user and group ids a container has; 0 means all of the host's (we are root). `core`: soft and hard
    limit of core dumps in bytes, -1 for none.
    """

    capabilities: tuple[str, ...]
    cgroup: str
    ids: int
    hostname: str
    core: tuple[int, int] = (0, 0)

    @property
    def rootless(self) -> bool:
        return self.ids > 0


def look(ids: int = 0) -> Host:
    """Return the facts. Blocking (small reads under /proc and /sys). `ids` as in Host: how many ids our user has."""
    if ids:
        # In a user namespace of our own we hold every capability over it.
        return Host(tuple(_DEFAULT_CAPABILITIES), "", ids, os.uname().nodename, core_limits())
    held = _bounding_set()
    capabilities = tuple(name for name, bit in _DEFAULT_CAPABILITIES.items() if held >> bit & 1)
    cgroup = _cgroup()
    if not cgroup:
        # Without the device cgroup nothing but this capability's absence keeps a container from the host's disks.
        capabilities = tuple(name for name in capabilities if name != "CAP_MKNOD")
    return Host(capabilities, cgroup, 0, os.uname().nodename, core_limits())


def _bounding_set() -> int:
    with open("/proc/self/status", "rb") as handle:
        lines = dict(line.split(b":", 1) for line in handle.read().splitlines() if b":" in line)
    return int(lines.get(b"CapBnd", b"0"), 16) & int(lines.get(b"CapPrm", b"0"), 16)


def _cgroup() -> str:
    if os.path.exists(f"{_CGROUP}/cgroup.controllers"):
        return "v2" if os.access(_CGROUP, os.W_OK) else ""
    return "v1" if os.access(f"{_CGROUP}/devices", os.W_OK) else ""
