"""Where things lie and how much they may take: defaults, then the config file, then environment, then flags.

The file is TOML: /etc/lazyfs/config.toml for root, ~/.config/lazyfs/config.toml for others, or $LAZYFS_CONFIG.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lazyfs import private
from lazyfs.errors import UsageError
from lazyfs.units import GiB, KiB, MiB, parse_size

_CHOICES = {"driver": {word: word for word in ("auto", "erofs", "fuse")}}
_RATES = frozenset({"prefetch_rate", "background_rate"})
_SIZES = frozenset({"store_size", "memory_size", "small_layer"}) | _RATES
_LEAST_RATE = 64 * KiB  # bytes a second: a request of a slower one would take minutes, and whoever waits gives up


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, with its default. Sizes are bytes, times seconds."""

    root: Path  # the store; survives restarts
    run: Path  # sockets and the session's mount; does not survive a reboot
    store_size: int = 20 * GiB  # bound of the chunk store on disk
    memory_size: int = 24 * MiB  # bound of decoded chunks held in memory
    read_timeout: float = 300.0  # a read fails with EIO after this; 0: never
    connect_timeout: float = 5.0
    answer_timeout: float = 30.0  # from a request to its first byte, and between two reads of a body
    driver: str = "auto"  # how trees reach the kernel: "fuse", "erofs", or "auto": erofs where it works
    offline: bool = False  # ask no registry: only images that are whole on this node can be mounted
    prefetch: bool = True  # fetch up to the landmark after a mount
    background: bool = True  # fill and verify whole layers after a mount
    trace: bool = True  # prefetch also what a trace of earlier starts tells of
    learn: bool = True  # keep what starts on this node read first, for the next ones
    prefetch_rate: int = 0  # bytes a second that prefetch may ask for, all registries together; 0: any
    background_rate: int = 0  # the same of background
    lazy_from: tuple[str, ...] = ("*",)  # repositories (shell patterns) whose layers are used before the whole check
    allow_unverified: bool = False  # be lazy with layers that have a TOC and no digest for it
    host_connections: int = 8  # concurrent requests to one registry host
    certs_dir: Path = Path("/etc/containerd/certs.d")  # containerd's hosts.toml files, by registry
    daemon_linger: float = 2.0  # a daemon started by a command stops this long after its last mount
    hold: bool = True  # mounts outlive a daemon that dies, where root mounts and the kernel can
    small_layer: int = 4 * MiB  # the snapshotter fetches layers without a TOC up to this size in full
    prepare_timeout: float = 30.0  # the snapshotter lets an image be pulled in the ordinary way after this
    chain_timeout: float = 60.0  # the snapshotter answers UNAVAILABLE when a chain is not shown within this
    snapshotter_socket: Path | None = None  # where containerd finds the snapshotter; None: below `run`
    image_service: str = ""  # containerd's socket, to pass CRI's image service through to; "": not offered
    metrics_address: str = ""  # HOST:PORT of the daemon's Prometheus metrics; "": none
    snapshotter_metrics_address: str = ""  # the same of the snapshotter

    @property
    def snapshotter_address(self) -> Path:
        """The snapshotter's socket."""
        return self.snapshotter_socket or self.run / "snapshotter" / "snapshotter.sock"

    @property
    def socket(self) -> Path:
        return self.run / "lazyfsd.sock"

    @property
    def shown(self) -> Path:
        """Where trees are mounted by the erofs driver, each under its name."""
        return self.run / "erofs"

    @property
    def session(self) -> Path:
        """Where the daemon's one FUSE session is mounted."""
        return self.run / "mnt"


def _default_root(euid: int) -> Path:
    if euid == 0:
        return Path("/var/lib/lazyfs")
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base) / "lazyfs"


def _default_run(euid: int, root: Path) -> Path:
    base = Path("/run/lazyfs")
    if euid != 0:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        base = Path(runtime) / "lazyfs" if runtime and os.path.isdir(runtime) else Path(f"/tmp/lazyfs-{euid}")
    if root == _default_root(euid):
        return base
    return _apart(base, root)


def _apart(base: Path, root: Path) -> Path:
    """Return a directory below `base` for one store: another store has another daemon."""
    # Short, because a Unix socket's path has at most 107 bytes.
    return base / hashlib.sha256(os.fsencode(root)).hexdigest()[:12]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        if not raw:
            return {}
        import tomllib  # here: a tenth of what a command takes to start, and most have no such file

        return tomllib.loads(raw.decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, no TOML
        raise UsageError(f"config file {path} can't be read: {error}") from None


def _coerce(name: str, value: Any, where: str) -> Any:
    kind = {f.name: f.type for f in fields(Settings)}[name]
    good: Any
    try:
        if name in _SIZES:
            good = parse_size(str(value))
        elif kind in ("Path", "Path | None"):
            good = Path(str(value)).expanduser().absolute()
        elif kind == "bool":
            good = {"1": True, "true": True, "0": False, "false": False}[str(value).lower()]
        elif kind == "int":
            good = int(value)
        elif kind == "float":
            good = float(value)
        elif kind == "str":
            good = _CHOICES[name][str(value)] if name in _CHOICES else str(value)
        else:
            good = tuple(str(v) for v in (value if isinstance(value, list) else str(value).split(",")))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where}: {name} can't be {value!r}") from None
    except UsageError as error:
        raise UsageError(f"{where}: {name}: {error.message}", hint=error.hint) from None
    if isinstance(good, (int, float)) and good < 0:
        raise UsageError(f"{where}: {name} can't be negative")
    if name in _RATES and 0 < good < _LEAST_RATE:
        raise UsageError(f"{where}: {name} is 64KiB a second at least, or 0 for as fast as it goes")
    return good


def load(overrides: dict[str, Any] | None = None) -> Settings:
    """Return the settings in force. `overrides` (from flags) win over $LAZYFS_<NAME>, that over the file.

    Blocking (reads one file). Raise UsageError for an unknown name or a value that makes no sense.
    """
    euid = os.geteuid()
    home = Path("/etc/lazyfs") if euid == 0 else Path(os.path.expanduser("~/.config/lazyfs"))
    config_path = Path(os.environ.get("LAZYFS_CONFIG") or home / "config.toml")
    names = {f.name for f in fields(Settings)}
    in_file = _coerce_all(_read_file(config_path), str(config_path))
    values = dict(in_file)
    for name in names:
        from_env = os.environ.get(f"LAZYFS_{name.upper()}")
        if from_env:
            values[name] = _coerce(name, from_env, f"LAZYFS_{name.upper()}")
    for name, value in (overrides or {}).items():
        if value is not None:
            values[name] = _coerce(name, value, f"--{name.replace('_', '-')}")
    if "run" in in_file and values["run"] is in_file["run"] and values.get("root") != in_file.get("root"):
        values["run"] = _apart(values["run"], values["root"])  # the file's is for the file's store
    return _complete(values, euid)


def of_service(document: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of a service of root's whose config file says `document`, with nothing in its environment.

    `where` is for messages. Raise UsageError for an unknown name or a value that makes no sense.
    """
    return _complete(_coerce_all(document, where), 0)


def _coerce_all(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = {f.name for f in fields(Settings)}
    for name in document:
        if name not in names:
            raise UsageError(f"config file {where}: unknown setting {name!r}")
    return {name: _coerce(name, value, where) for name, value in document.items()}


def _complete(values: dict[str, Any], euid: int) -> Settings:
    root = values.pop("root", None) or _default_root(euid)
    run = values.pop("run", None) or _default_run(euid, root)
    if (link := private.find_foreign_link(run)) is not None:
        raise UsageError(f"{link}, on the way to {run}, is another user's symbolic link", hint="set LAZYFS_RUN")
    # As the mount table has it: /var/run is a symlink on many machines, and no mount below one would be found there.
    return replace(Settings(root, Path(os.path.realpath(run))), **values)
