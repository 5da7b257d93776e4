"""An installation as a whole: which files it writes, and whether containerd then reads what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs import config
from lazyfs.config import Settings
from lazyfs.deploy import changes, containerd_config, manifest, services, toml_edit, units
from lazyfs.deploy.changes import FileChange
from lazyfs.deploy.containerd_config import Wanted
from lazyfs.deploy.manifest import Manifest
from lazyfs.deploy.node import Node
from lazyfs.errors import LazyfsError, UsageError

SETTINGS = Path("/etc/lazyfs/config.toml")
METRICS = ("127.0.0.1:9470", "127.0.0.1:9471")  # of the daemon, of the snapshotter
_SETTINGS_HEAD = "# Settings of lazyfs: docs/config.md tells of all.\n"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for. `programs`: the directory of lazyfsd and lazyfs-snapshotter on the node."""

    programs: Path
    containerd: Path = containerd_config.DEFAULT
    name: str = "lazyfs"
    default: bool = True
    image_service: bool = False
    metrics: bool = False
    lazy_from: tuple[str, ...] = ()
    root: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written, and what the user should know. `wanted` is what containerd is told."""

    changes: tuple[FileChange, ...]
    notes: tuple[str, ...]
    wanted: Wanted
    changed_units: tuple[str, ...]
    about_containerd: tuple[FileChange, ...]  # those of its configuration, which it reads at its next start


def plan(node: Node, options: Options, idmap_problem: Callable[[Settings], str | None] = lambda settings: None) -> Plan:
    """Look at the node and say what an installation would change there. Writes nothing. Blocking. Raise UsageError.

    `idmap_problem` returns why the daemon's mounts can't be idmapped, "" when they can, None while no daemon runs.
    """
    notes = units.check_programs(node, options.programs)
    major = services.containerd_major() if node.is_this else 0
    files = containerd_config.read_files(node, options.containerd)
    wrote = [_settings_change(node, options, containerd_config.grpc_address(files))]
    settings = _settings(node, wrote[0])
    remap, why = _remap_ids(node, settings, idmap_problem)
    wanted = Wanted(options.name, settings.snapshotter_address, settings.root, options.default, remap)
    if options.default:
        now, _ = containerd_config.in_force(files, major)
        if now != options.name:
            notes.append(
                f"new containers will be made with {options.name}; those that there are stay with "
                f"{now or 'overlayfs'}, and their images are pulled anew for new containers"
            )
    else:
        notes.append(f"containers get {options.name} only where it is asked for by name: the default stays")
    if why:
        notes.append(f"pods with user namespaces: {why}")
    if major >= 2:
        notes.append("`ctr image pull` of containerd 2 takes --local for a lazy pull: see docs/kubernetes.md")
    if options.image_service:
        notes.append(
            f"kubelet has to be told: imageServiceEndpoint: unix://{settings.snapshotter_address} in its configuration"
        )
    for name in units.NAMES:
        wrote.append(changes.change(node, units.DIRECTORY / name, units.text(name, options.programs)))
    told = containerd_config.plan(node, options.containerd, wanted, major)
    about_containerd = _real(changes.change(node, one.path, one.text) for one in told)
    found = _real(wrote)
    changed_units = tuple(one.path.name for one in found if one.path.parent == units.DIRECTORY)
    return Plan((*found, *about_containerd), tuple(notes), wanted, changed_units, about_containerd)


def carry_out(node: Node, options: Options, planned: Plan) -> None:
    """Write the files; where that fails, or containerd does not read what was meant, put everything back. Blocking.

    Raise StoreBroken, UsageError.
    """
    before = manifest.load(node)
    try:
        changes.carry_out(node, planned.changes)
        check_containerd(node, options.containerd, planned.wanted)
    except LazyfsError:
        changes.put_back(node, planned.changes, before)
        raise


@contextmanager
def starting(node: Node, planned: Plan, before: Manifest | None) -> Iterator[None]:
    """Put containerd's configuration back when the block fails, which starts what it names: at its next start it would
    make no container any more. `before` is the manifest from before `carry_out`. Blocking.
    """
    try:
        yield
    except BaseException as error:
        if planned.about_containerd:
            changes.put_back(node, planned.about_containerd, before)
            if isinstance(error, LazyfsError):
                error.message = f"{error.message}; containerd's configuration was put back"
        raise


def check_containerd(node: Node, main: Path, wanted: Wanted) -> None:
    """Have containerd itself read its configuration. Raise UsageError unless it says what it should."""
    read = services.what_containerd_reads(main) if node.is_this else None
    if read is None:
        return
    problem = ""
    if _at(read, "proxy_plugins", wanted.name, "address") != str(wanted.address):
        problem = f"does not know the snapshotter {wanted.name}"
    elif wanted.default:
        table = _at(read, "plugins", "io.containerd.cri.v1.images") or _at(
            read, "plugins", "io.containerd.grpc.v1.cri", "containerd"
        )
        if table is not None and table.get("snapshotter") != wanted.name:
            problem = f"takes {table.get('snapshotter')} for CRI"
        elif table is not None and table.get("disable_snapshot_annotations") is not False:
            problem = "passes no annotations on"
    if problem:
        version = 3 if read.get("version") == 3 else 2
        raise UsageError(
            f"containerd {problem} with the new configuration; everything was put back",
            hint="write this by hand:\n" + containerd_config.by_hand(wanted, version),
        )


def settings_of(node: Node) -> Settings:
    """Return the settings of the node's services as its file has them now. Blocking. Raise UsageError."""
    return _settings(node, None)


def _settings_change(node: Node, options: Options, containerd: str) -> FileChange | None:
    values: dict[toml_edit.Path, toml_edit.Value] = {}
    if options.root is not None:
        values[("root",)] = str(options.root)
    if options.lazy_from:
        values[("lazy_from",)] = list(options.lazy_from)
    if options.image_service:
        values[("image_service",)] = containerd
    if options.metrics:
        values[("metrics_address",)], values[("snapshotter_metrics_address",)] = METRICS
    if not values:
        return None
    text = _decoded(node.read(SETTINGS)) or _SETTINGS_HEAD
    return changes.change(node, SETTINGS, toml_edit.set_values(text, values, str(SETTINGS)))


def _settings(node: Node, changed: FileChange | None) -> Settings:
    text = _decoded(node.read(SETTINGS) if changed is None else changed.after)
    return config.of_service(toml_edit.parse(text, str(SETTINGS)), str(SETTINGS))


def _real(found: Iterable[FileChange | None]) -> tuple[FileChange, ...]:
    return tuple(one for one in found if one is not None)


def _decoded(raw: bytes | None) -> str:
    try:
        return (raw or b"").decode()
    except UnicodeDecodeError:
        raise UsageError(f"{SETTINGS} is not UTF-8") from None


def _remap_ids(node: Node, settings: Settings, problem_of: Callable[[Settings], str | None]) -> tuple[bool, str]:
    """Return whether the daemon's mounts can be idmapped, and if not, why."""
    problem = problem_of(settings) if node.is_this else None
    if problem is None:
        return False, "remap-ids is not offered, as no daemon runs to test its mounts; install again when it does"
    return not problem, f"remap-ids is not offered: {problem}" if problem else ""


def _at(data: dict[str, Any], *path: str) -> Any:
    found: Any = data
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found
