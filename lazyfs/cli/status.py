"""`lazyfs status`: mounts, caches, requests and errors of the running daemon, or of all of an ordinary user's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.cli import common, exit_codes
from lazyfs.cli.output import count
from lazyfs.limits import SOCKET_TIMEOUT
from lazyfs.registry.http.rate_limits import LOW
from lazyfs.units import format_size

if TYPE_CHECKING:
    from lazyfs.cli.output import Output
    from lazyfs.config import Settings

_EPILOG = """\
examples:
  lazyfs status
  lazyfs status --json | jq '.mounts[] | {image, share}'

Without a running daemon it says so, tells what the store holds, and exits 0."""

_ADDED = ("bytes", "errors", "fuse")  # flat tables of counters that add up over daemons


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "status",
        description="Show what the running daemon serves, what its caches hold, and what it asked registries for.",
        epilog=_EPILOG,
    )
    common.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the daemon's state. Blocking. Return 0, with or without a daemon."""
    settings = common.settings(args)
    found = gather(settings, out)
    if not found:
        held = store_facts(settings.root)
        out.line(
            f"no daemon is running; the store {settings.root} holds {count(held['layers'])}, "
            f"{format_size(held['size'])} of at most {format_size(settings.store_size)}"
        )
        store = {**held, "bound": settings.store_size}
        facts = snapshotter_facts(settings, out)
        for line in _snapshotter_lines(facts):
            out.line(line)
        out.json({"daemon": None, "mounts": [], "cache": {"store": store}, **facts})
        return exit_codes.OK
    status = {**merge(found), **snapshotter_facts(settings, out)}
    for line in lines(status):
        out.line(line)
    out.json(status)
    return exit_codes.OK


def gather(settings: Settings, out: Output) -> list[dict[str, Any]]:
    """Return the status objects of all daemons of this store. Blocking; a daemon that ends meanwhile is left out."""
    from lazyfs import control_client
    from lazyfs.errors import DaemonFault, DaemonUnreachable

    found = []
    for socket in control_client.sockets(settings):
        try:
            with control_client.connect(socket) as daemon:
                found.append(daemon.call("status"))
        except DaemonUnreachable as error:
            # A killed daemon leaves its socket behind: that is no news. One that hangs is.
            if error.hint:
                out.warn(str(error))
        except DaemonFault as error:
            out.warn(str(error))
    return found


def snapshotter_facts(settings: Settings, out: Output) -> dict[str, Any]:
    """Return what the snapshotter's records hold, as `snapshotter`; nothing where there are none. Blocking."""
    from lazyfs.errors import LazyfsError

    path = settings.root / "snapshots.db"
    if not path.exists():
        return {}
    from snapshotter.records import open_records

    try:
        records = open_records(path)
        try:
            facts = records.summary()
        finally:
            records.close()
    except LazyfsError as error:
        out.warn(str(error))
        return {}
    return {"snapshotter": {**facts, "listens": _listens(settings.snapshotter_address)}}


def _listens(path: Path) -> bool:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SOCKET_TIMEOUT)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return False
    return True


def merge(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one status object for several daemons: mounts side by side, counters added.

    `daemon` is the first one's, and `daemons` lists all of them when there are more.
    """
    if len(found) == 1:
        return found[0]
    first = found[0]
    merged: dict[str, Any] = {**first, "daemons": [status["daemon"] for status in found]}
    merged["mounts"] = [mount for status in found for mount in status.get("mounts", [])]
    for name in _ADDED:
        merged[name] = _sum([status.get(name, {}) for status in found])
    requests = [status.get("requests", {}) for status in found]
    by_host: dict[str, dict[str, Any]] = {}
    for each in requests:
        for host, facts in each.get("by_host", {}).items():
            by_host[host] = _sum([by_host.get(host, {}), facts])
    merged["sources"] = {host: facts for status in found for host, facts in status.get("sources", {}).items()}
    merged["requests"] = {
        "count": sum(each.get("count", 0) for each in requests),
        "errors": sum(each.get("errors", 0) for each in requests),
        "by_host": by_host,
    }
    return merged


def _sum(tables: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            total[name] = total.get(name, 0) + value
    return total


def store_facts(root: Path) -> dict[str, int]:
    """Return how many layers the store's directory holds and the bytes they take on disk. Blocking; 0 when absent."""
    layers = size = 0
    try:
        with os.scandir(root / "layers" / "sha256") as directories:
            for directory in directories:
                if directory.is_dir(follow_symlinks=False):
                    layers += 1
                    size += _disk_bytes(directory.path)
    except OSError:
        pass  # no store yet, or one that isn't ours: it holds nothing that we could use
    return {"layers": layers, "size": size}


def _disk_bytes(directory: str) -> int:
    try:
        with os.scandir(directory) as files:
            return sum(file.stat(follow_symlinks=False).st_blocks * 512 for file in files)
    except OSError:
        return 0  # evicted while we looked


def lines(status: dict[str, Any]) -> Iterator[str]:
    """Yield the lines for people."""
    for daemon in status.get("daemons") or [status["daemon"]]:
        reason = f" ({daemon['reason']})" if daemon.get("reason") else ""
        yield (
            f"lazyfsd {daemon['version']}, pid {daemon['pid']}, up {duration(daemon['uptime'])}, "
            f"{format_size(daemon.get('memory') or 0)} of memory, driver {daemon.get('driver')}{reason}, "
            f"store {daemon.get('root')}"
        )
    yield from _cache_lines(status)
    yield from _snapshotter_lines(status)
    mounts = status.get("mounts", [])
    yield ""
    yield count(len(mounts), "mount") + (":" if mounts else "")
    for mount in mounts:
        yield from _mount_lines(mount)


def _snapshotter_lines(status: dict[str, Any]) -> Iterator[str]:
    facts = status.get("snapshotter")
    if facts is None:
        return
    kinds = ", ".join(f"{number} {kind}" for kind, number in facts["snapshots"].items() if number) or "none"
    state = "" if facts["listens"] else "NOT RUNNING; "
    yield f"snapshots {state}{kinds}; {count(facts['chains_in_use'], 'lazy chain')} in use"
    outcomes = ", ".join(f"{number} {outcome.replace('_', ' ')}" for outcome, number in facts["layers"].items())
    if outcomes:
        yield f"layers    {outcomes} (lazyfs why IMAGE tells more)"


def _cache_lines(status: dict[str, Any]) -> Iterator[str]:
    cache = status.get("cache", {})
    store = cache.get("store", {})
    text = f"store     {format_size(store.get('size') or 0)} of at most {format_size(store.get('bound') or 0)}"
    if store.get("damaged"):
        text += f", {store['damaged']} damaged chunks found and fetched again"
    if store.get("passed_by"):
        text += ", PASSED BY: its disk is full or fails, reads go on without it"
    if status.get("pins"):
        text += f", {count(len(status['pins']), 'image')} pinned"
    yield text
    moved = {name: value for name, value in status.get("bytes", {}).items() if value}
    yield "bytes     " + (", ".join(f"{n.replace('_', ' ')} {format_size(v)}" for n, v in moved.items()) or "none yet")
    requests = status.get("requests", {})
    hosts = [
        f"{host}: {facts.get('requests', 0)} at {facts.get('ms', 0) / max(1, facts.get('requests', 0)):.0f} ms"
        for host, facts in sorted(requests.get("by_host", {}).items())
    ]
    failed = f", {requests['errors']} failed" if requests.get("errors") else ""
    yield f"requests  {requests.get('count', 0)}{failed}" + (f" ({', '.join(hosts)})" if hosts else "")
    yield from _source_lines(status.get("sources", {}))
    errors = {name: value for name, value in status.get("errors", {}).items() if value}
    if errors:
        yield "errors    " + ", ".join(f"{name} {times}" for name, times in sorted(errors.items()))


def _source_lines(sources: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Tell of hosts that are not simply well."""
    for host, facts in sorted(sources.items()):
        state, remaining = facts.get("state", "ok"), facts.get("remaining")
        notes = []
        if state != "ok":
            left = facts.get("for") or 0
            notes.append(f"{state} for {duration(left)} more" if left else state)
        if facts.get("lies"):
            notes.append(f"{count(facts['lies'], 'wrong answer')}")
        if facts.get("slow"):
            notes.append(f"too slow {facts['slow']} times")
        if remaining is not None and remaining < LOW:
            notes.append(f"{remaining} requests left before its rate limit")
        if notes:
            said = f" (last error: {facts['last_error']})" if facts.get("last_error") else ""
            yield f"source    {host}: {', '.join(notes)}{said}"
            if state == "rate limited":
                yield "          a login or a mirror may be allowed more"


def _mount_lines(mount: dict[str, Any]) -> Iterator[str]:
    place = mount.get("dir") or ""
    if mount.get("kind") == "container":
        shown = f"in container {os.path.basename(place)}"
    elif mount.get("kind") == "chain":
        shown = "for the snapshotter"
    else:
        shown = f"on {place or '(not shown anywhere yet)'}, {mount.get('kind') or 'ro'}"
    layers = mount.get("layers", [])
    whole = bool(layers) and all(layer.get("complete") for layer in layers)
    held = "whole on this node" if whole else f"{100 * (mount.get('share') or 0):.1f} % fetched"
    yield (
        f"  {mount['image']} {shown}, {format_size(mount.get('size') or 0)}, "
        f"{'pinned, ' if mount.get('pinned') else ''}{held}"
    )
    for layer in mount.get("layers", []):
        state = "lazy" if layer.get("lazy") else f"in full: {layer.get('reason')}"
        if layer.get("quarantine"):
            state = f"QUARANTINED: {layer['quarantine']}"
        elif layer.get("verified"):
            state += ", verified whole"
        held = "complete" if layer.get("complete") else f"{format_size(layer.get('present') or 0)} here"
        yield f"    {layer['digest'][:19]}  {format_size(layer.get('size') or 0):>9}  {held}, {state}"


def duration(seconds: float) -> str:
    """Return a time span for people: "42 s", "3 min", "5 h", "2 d"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
