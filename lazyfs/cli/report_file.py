"""The file of `convert --report`: there whole or not at all, and also when the conversion failed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.cli import exit_codes
from lazyfs.cli.main import Terminated
from lazyfs.errors import LazyfsError, StoreBroken, UsageError

if TYPE_CHECKING:
    from indexer.image import Conversion


class ReportFile:
    """Where a pipeline reads what became of a conversion. Raise UsageError for a place that can't hold a file.

    A device or a pipe is none: the file takes its place by rename. `conversion` is to be set once there is one.
    """

    def __init__(self, name: str, source: str, destination: str) -> None:
        path = Path(os.path.realpath(name)) if name else Path()
        parent = path.parent
        if (path.exists() and not path.is_file()) or not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
            raise UsageError(
                f"--report {name or repr(name)}: that is no place for a file",
                hint="its directory must exist and be writable, and nothing but a file be there",
            )
        self.conversion: Conversion | None = None
        self._path = path
        self._started = time.time()
        self._references = {"source": source, "destination": destination}

    def write(self, document: dict[str, Any]) -> None:
        """Write the report of a conversion. Blocking. Raise StoreBroken."""
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started))
        raw = json.dumps({**document, "started": started}, indent=2, ensure_ascii=True) + "\n"
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(6)}")
        try:
            with temporary.open("x") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
        except OSError as error:
            raise StoreBroken(f"the report {self._path} can't be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def on_failure(self) -> Iterator[None]:
        """Report what ends the block by an exception, which goes on.

        An earlier report is removed first: what is there afterwards is about this conversion, however it ended.
        """
        with contextlib.suppress(OSError):
            self._path.unlink()
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(StoreBroken):  # the first error is the one to tell
                self.write({**self._so_far(), **_failure(error), "seconds": round(time.time() - self._started, 3)})
            raise

    def _so_far(self) -> dict[str, Any]:
        from indexer.report import SCHEMA

        if self.conversion is not None:
            return self.conversion.so_far()
        return {"schema": SCHEMA, "status": "failed", **self._references, "layers": [], "notes": []}


def _failure(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__
    if isinstance(error, LazyfsError):
        message, hint, code = error.message, error.hint, exit_codes.code_of(error, "convert")
    elif isinstance(error, Terminated):
        message, hint, code = "asked to stop", "", exit_codes.TERMINATED
    elif isinstance(error, KeyboardInterrupt):
        kind, message, hint, code = "Interrupted", "interrupted", "", exit_codes.INTERRUPTED
    else:
        message, hint, code = f"this is a bug in lazyfs: {str(error)[:300]}", "", exit_codes.INTERNAL
    return {"error": {"class": kind, "message": message, "hint": hint, "exit_code": code}}
