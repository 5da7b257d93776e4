"""Changes of the node's files: shown first, carried out so that an interruption leaves nothing unknown, taken back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lazyfs.deploy import manifest as manifests
from lazyfs.deploy.manifest import Entry, Manifest, backup_of, digest_of
from lazyfs.deploy.node import Node

# Lines around a change are shown, too, and containerd's configuration may hold logins of registries: what is shown ends
# in terminals and in the logs of pods.
_SECRET = re.compile(
    r"""(^[\s#]*|[{,])(\s*[\w."'-]*(?:passw|auth|token|secret|credential)[\w."'-]*\s*=\s*)[^\n]*""", re.IGNORECASE
)
_VEILED = "(not shown)"


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file's content before and after; None: no file."""

    path: Path
    before: bytes | None
    after: bytes | None

    def diff(self) -> str:
        """Return the change as a unified diff, without what may be a secret."""
        old, new = (_lines(raw) for raw in (self.before, self.after))
        source, target = ("/dev/null" if raw is None else str(self.path) for raw in (self.before, self.after))
        return "".join(difflib.unified_diff(old, new, source, target))


@dataclass(frozen=True, slots=True)
class TakingBack:
    """What an uninstallation does: `changes`, and the files that it leaves, each with the reason."""

    changes: tuple[FileChange, ...]
    left: dict[Path, str]


def change(node: Node, path: Path, after: str) -> FileChange | None:
    """Return what makes a file say `after`; None where it does. Raise UsageError."""
    before = node.read(path)
    return None if before == after.encode() else FileChange(path, before, after.encode())


def carry_out(node: Node, changes: Iterable[FileChange]) -> None:
    """Write files; what they were is kept, and the manifest tells of them. Blocking. Raise StoreBroken, UsageError.

    The manifest comes first, then backups: whatever is interrupted can be taken back.
    """
    changes = list(changes)
    known = manifests.load(node) or Manifest()
    backups: list[tuple[Path, FileChange]] = []
    for one in changes:
        entry = _entry(known, one)
        if entry.backup and known.entry(one.path) is None:
            backups.append((Path(entry.backup), one))
        known = known.with_entry(entry)
    for path in (manifests.PATH, *(path for path, _ in backups), *(one.path for one in changes)):
        known = known.with_directories(node.missing_parents(path))
    manifests.save(node, known)
    for path, one in backups:
        assert one.before is not None
        node.write(path, one.before, node.mode(one.path))
    for one in changes:
        assert one.after is not None
        node.write(one.path, one.after)


def put_back(node: Node, changes: Iterable[FileChange], before: Manifest | None) -> None:
    """Undo these changes of a `carry_out`, made or not; `before` is the manifest of then. Blocking.

    Raise StoreBroken, UsageError.
    """
    known = manifests.load(node) or Manifest()
    undone: list[Path] = []
    for one in changes:
        if one.before is None:
            node.remove(one.path)
        elif node.read(one.path) != one.before:  # a full disk takes nothing, and need not
            node.write(one.path, one.before)
        old = before.entry(one.path) if before is not None else None
        known = known.with_entry(old) if old is not None else known.without_entry(one.path)
        if old is None:
            undone.append(backup_of(one.path))
    if known.files:
        manifests.save(node, known)  # before the backups go that it names
    for path in undone:
        node.remove(path)
    if not known.files:
        forget(node, known)


def plan_taking_back(node: Node, known: Manifest) -> TakingBack:
    """Return how to take an installation back: only files that are still as they were written. Raise UsageError."""
    found: list[FileChange] = []
    left: dict[Path, str] = {}
    for entry in known.files:
        path = Path(entry.path)
        now = node.read(path)
        old = node.read(Path(entry.backup)) if entry.backup else None
        if now == old or (now is not None and digest_of(now) == entry.before):
            continue  # taken back already, or never written
        if now is None:
            left[path] = "it was removed"
        elif entry.shared or digest_of(now) != entry.digest:
            kept = f"; {entry.backup} is what it was before" if entry.backup else ""
            left[path] = f"it was changed since by somebody else{kept}"
        elif entry.backup and old is None:
            left[path] = f"what it was before is gone from {entry.backup}"
        else:
            found.append(FileChange(path, now, old))
    return TakingBack(tuple(found), left)


def write_all(node: Node, changes: Iterable[FileChange]) -> None:
    """Carry out changes that take something back. Blocking. Raise StoreBroken, UsageError."""
    for one in changes:
        if one.after is None:
            node.remove(one.path)
        else:
            node.write(one.path, one.after)


def finish_taking_back(node: Node, plan: TakingBack, known: Manifest) -> None:
    """Forget the installation, once the changes are made. Backups of files that were left stay. Raise StoreBroken."""
    kept = {str(path) for path in plan.left}
    for entry in known.files:
        if entry.backup and entry.path not in kept:
            node.remove(Path(entry.backup))
    forget(node, known)


def forget(node: Node, known: Manifest) -> None:
    """Remove the manifest, and the directories that were made and are empty now."""
    node.remove(manifests.PATH)
    for directory in sorted(known.directories, key=len, reverse=True):
        node.remove_empty(Path(directory))


def _entry(known: Manifest, one: FileChange) -> Entry:
    """Return what the manifest is to tell of a changed file; `before` is from our first change of it."""
    assert one.after is not None
    digest = digest_of(one.after)
    now = "" if one.before is None else digest_of(one.before)
    old = known.entry(one.path)
    if old is None:
        return Entry(str(one.path), digest, now, str(backup_of(one.path)) if now else "")
    ours = now in (old.digest, old.before)
    return Entry(old.path, digest, old.before, old.backup, old.shared or not ours)


def _lines(raw: bytes | None) -> list[str]:
    text = (raw or b"").decode("utf-8", "replace")
    lines = [_SECRET.sub(rf"\1\2{_VEILED}", line) for line in text.splitlines(True)]
    return [line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n" for line in lines]
