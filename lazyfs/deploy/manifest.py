"""What an installation wrote, so that exactly this is taken back: `/etc/lazyfs/install.json` on the node."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lazyfs.deploy.node import Node
from lazyfs.errors import UsageError

PATH = Path("/etc/lazyfs/install.json")
_BACKUPS = Path("/etc/lazyfs/before")  # of its own: an import of "*" must not find them
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. `digest` is that of what was written, `before` that of what was there; "": nothing was. `backup`: where
    that is kept.

    `shared`: somebody else changed it between two installations, so it isn't ours to put back.
    """

    path: str
    digest: str
    before: str
    backup: str
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that was written. `directories` were made for it, outermost first."""

    files: tuple[Entry, ...] = ()
    directories: tuple[str, ...] = ()
    version: int = field(default=_VERSION)

    def entry(self, path: Path) -> Entry | None:
        """Return what is known of a file."""
        return next((entry for entry in self.files if entry.path == str(path)), None)

    def with_entry(self, entry: Entry) -> Manifest:
        """Return the manifest with this entry in the place of one of the same path."""
        others = tuple(other for other in self.files if other.path != entry.path)
        return replace(self, files=(*others, entry))

    def without_entry(self, path: Path) -> Manifest:
        """Return the manifest without what is known of a file."""
        return replace(self, files=tuple(entry for entry in self.files if entry.path != str(path)))

    def with_directories(self, made: list[Path]) -> Manifest:
        """Return the manifest with these directories besides."""
        return replace(self, directories=tuple(dict.fromkeys((*self.directories, *map(str, made)))))


def digest_of(raw: bytes) -> str:
    """Return what a manifest tells a file's content by."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def backup_of(path: Path) -> Path:
    """Return where the file that was there before is kept."""
    return _BACKUPS / str(path).strip("/").replace("%", "%25").replace("/", "%2F")


def load(node: Node) -> Manifest | None:
    """Return the node's manifest, None where nothing was installed. Blocking. Raise UsageError for a damaged one."""
    raw = node.read(PATH)
    if raw is None:
        return None
    try:
        found = json.loads(raw)
        if found["version"] != _VERSION:
            raise UsageError(f"{PATH} is of version {found['version']!r}", hint="use the lazyfs that wrote it")
        files = tuple(_entry(one) for one in found["files"])
        return Manifest(files, tuple(str(one) for one in found["directories"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{PATH} is damaged: {error}", hint="take the installation back by hand") from None


def save(node: Node, manifest: Manifest) -> None:
    """Write the manifest. Blocking. Raise StoreBroken, UsageError."""
    node.write(PATH, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def _entry(one: dict[str, Any]) -> Entry:
    path, backup = str(one["path"]), str(one["backup"])
    if not path.startswith("/") or (backup and backup != str(backup_of(Path(path)))):
        raise ValueError(f"an entry of {path!r}")
    return Entry(path, str(one["digest"]), str(one["before"]), backup, bool(one["shared"]))
