"""The node's files: as they are under its root, which is `/`, or a directory where an image or another system lies."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from lazyfs.errors import StoreBroken, UsageError
from lazyfs.limits import MAX_NODE_FILE


@dataclass(frozen=True, slots=True)
class Node:
    """Paths given to it are the node's own, absolute. Blocking throughout."""

    root: Path = Path("/")

    @property
    def is_this(self) -> bool:
        """Whether this is the system that we run on, so that its services can be spoken to."""
        return self.root == Path("/")

    def real(self, path: Path) -> Path:
        """Return where `path` lies for us, symlinks followed. Raise UsageError where they lead out of the node."""
        root = self.root.resolve()
        found = (root / path.relative_to("/")).resolve()
        if not found.is_relative_to(root):
            raise UsageError(f"{path} is a symlink that leads out of {self.root}", hint="run this on the node itself")
        return found

    def read(self, path: Path) -> bytes | None:
        """Return a file's bytes, None where there is none. Raise UsageError."""
        try:
            fd = os.open(self.real(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not hold us up
            with os.fdopen(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise UsageError(f"{path} is not a file")
                raw = file.read(MAX_NODE_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}") from None
        if len(raw) > MAX_NODE_FILE:
            raise UsageError(f"{path} is no configuration: it has more than {MAX_NODE_FILE >> 20} MiB")
        return raw

    def write(self, path: Path, raw: bytes, mode: int = 0o644) -> None:
        """Replace a file at once, or make it. An existing one keeps its owner and mode.

        Directories on the way are made; after a failure none is left. Raise StoreBroken, UsageError.
        """
        target = self.real(path)
        missing = self.missing_parents(path)
        # no name that an import of *.toml would find
        scratch = target.with_name(f".lazyfs-{secrets.token_hex(6)}.new")
        try:
            for directory in missing:
                self.real(directory).mkdir(mode=0o755, exist_ok=True)
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(raw)
                with contextlib.suppress(FileNotFoundError):
                    before = target.stat()
                    mode = before.st_mode & 0o7777
                    os.fchown(fd, before.st_uid, before.st_gid)
                os.fchmod(fd, mode)
                file.flush()
                os.fsync(fd)
            os.replace(scratch, target)
            self._sync(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            for directory in reversed(missing):
                self.remove_empty(directory)
            raise StoreBroken(f"{path} can't be written: {error.strerror}") from None

    @staticmethod
    def _sync(directory: Path) -> None:
        """Have names written in their order: after a power failure the manifest tells of all that is there."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def missing_parents(self, path: Path) -> list[Path]:
        """Return the directories above `path` that do not exist, outermost first. Raise UsageError."""
        return [above for above in reversed(path.parents) if not self.real(above).exists()]

    def mode(self, path: Path) -> int:
        """Return a file's permission bits. Raise UsageError."""
        try:
            return self.real(path).stat().st_mode & 0o7777
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}") from None

    def remove(self, path: Path) -> None:
        """Remove a file; one that is gone is no error. Raise StoreBroken, UsageError."""
        try:
            self.real(path).unlink(missing_ok=True)
        except OSError as error:
            raise StoreBroken(f"{path} can't be removed: {error.strerror}") from None

    def remove_empty(self, path: Path) -> None:
        """Remove a directory where nothing is left in it."""
        with contextlib.suppress(OSError):
            self.real(path).rmdir()
