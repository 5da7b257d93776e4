"""The OCI runtime configuration (config.json, runtime-spec 1.0) of a container: a pure function of checked values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lazyfs.container.host import Host
from lazyfs.container.options import ImageDefaults, RunOptions, command_line, environment
from lazyfs.container.users import User
from lazyfs.errors import ContainerFailed

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/scsi",
    "/proc/sched_debug", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
]  # fmt: skip
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_NO_LIMIT = 0xFFFFFFFFFFFFFFFF  # as the runtime writes it, where it is -1 here
_TTY_GID = 5  # the group of terminals on every distribution; devpts wants the number


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path, staged in our private namespace at `source`, that is to show at `target` in the container."""

    source: str
    target: str
    read_only: bool

    def mount(self) -> dict[str, Any]:
        return _mount(self.target, "bind", self.source, "rbind", "rprivate", "ro" if self.read_only else "rw")


def build(
    identity: str,
    *,
    rootfs: str,
    options: RunOptions,
    image: ImageDefaults,
    user: User,
    host: Host,
    binds: list[Bind],
) -> dict[str, Any]:
    """Return the configuration of container `identity` with the writable root file system `rootfs` (absolute).

    `binds` are already staged host files and directories, in the order in which they are to appear. Raise UsageError
    for options that make no sense, ContainerFailed for a user that this host can't give.
    """
    _check_ids(user, host)
    argv = command_line(options, image)
    defaults = {"PATH": _PATH, "HOSTNAME": hostname(identity, options, host), "HOME": user.home}
    if options.terminal:
        defaults["TERM"] = "xterm"
    workdir = options.workdir or image.workdir or "/"
    process: dict[str, Any] = {
        "terminal": options.terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": argv,
        "env": environment(options, image, defaults),
        "cwd": workdir if workdir.startswith("/") else "/" + workdir,
        "capabilities": {kind: list(host.capabilities) for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": False,
        # Cores of the image's programs are the user's affair; ours are kept nowhere, and that would be inherited.
        "rlimits": [{"type": "RLIMIT_CORE", "soft": host.core[0] & _NO_LIMIT, "hard": host.core[1] & _NO_LIMIT}],
    }
    return {
        "ociVersion": "1.0.2",
        "process": process,
        # The runtime makes the root read-only after it has made the mount points that the image lacks.
        "root": {"path": rootfs, "readonly": options.read_only},
        "hostname": hostname(identity, options, host),
        "mounts": [*_system_mounts(options, host), *(bind.mount() for bind in binds)],
        "linux": _linux(identity, options, host),
    }


def hostname(identity: str, options: RunOptions, host: Host) -> str:
    """Return the container's host name: as asked for, else the host's where it shares the network, else its id."""
    return options.hostname or (host.hostname if options.network == "host" else identity[:12])


def _check_ids(user: User, host: Host) -> None:
    if host.rootless and max(user.uid, user.gid) >= host.ids:
        raise ContainerFailed(
            f"the container's user is {user.uid}:{user.gid}, and this account has no subordinate ids to give it",
            hint="add a range to /etc/subuid and /etc/subgid, run as root, or use --user 0",
        )


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _system_mounts(options: RunOptions, host: Host) -> list[dict[str, Any]]:
    strict = ("nosuid", "noexec", "nodev")
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    if not host.rootless or host.ids > _TTY_GID:
        terminals.append(f"gid={_TTY_GID}")
    mounts = [
        _mount("/proc", "proc", "proc", *strict),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", *terminals),
        _mount("/dev/shm", "tmpfs", "shm", *strict, "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *strict),
    ]
    if host.rootless:
        # A new sysfs belongs to whoever owns the network namespace, and that is not us.
        mounts.append(_mount("/sys", "none", "/sys", "rbind", "rslave", *strict, "ro"))
    else:
        mounts.append(_mount("/sys", "sysfs", "sysfs", *strict, "ro"))
        if host.cgroup:
            mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *strict, "relatime", "ro"))
    return mounts


def _linux(identity: str, options: RunOptions, host: Host) -> dict[str, Any]:
    namespaces = ["pid", "ipc", "uts", "mount"]
    if options.network == "none":
        namespaces.append("network")
    if host.cgroup == "v2":
        namespaces.append("cgroup")
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in namespaces],
        "maskedPaths": _MASKED,
        "readonlyPaths": _READ_ONLY,
    }
    if host.cgroup:
        # At the top: a directory of ours above it would outlive the last container.
        linux["cgroupsPath"] = f"/lazyfs-{identity}"
        # Everything is refused; the runtime itself adds /dev/null and its like.
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    return linux
