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
from lazyfs.errors import LazyfsError, StoreBroken, UsageError

if TYPE_CHECKING:
    from indexer.image import Conversion


class ReportFile:
    """Where a pipeline reads what became of a conversion. Raise UsageError for a place that can't hold a file."""

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"--report {path}: that is no place for a file", hint="its directory must exist")
        self._path = path
        self._started = time.time()

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
    def on_failure(self, conversion: Conversion) -> Iterator[None]:
        """Report what ends the block by an exception, which goes on."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(StoreBroken):  # the first error is the one to tell
                self.write(_failed(conversion, error, time.time() - self._started))
            raise


def _failed(conversion: Conversion, error: BaseException, seconds: float) -> dict[str, Any]:
    if isinstance(error, LazyfsError):
        message, hint, code = error.message, error.hint, exit_codes.code_of(error, "convert")
    elif isinstance(error, KeyboardInterrupt):
        message, hint, code = "interrupted", "", exit_codes.INTERRUPTED
    elif isinstance(error, Exception):
        message, hint, code = f"this is a bug in lazyfs: {str(error)[:300]}", "", exit_codes.INTERNAL
    else:
        message, hint, code = "asked to stop", "", exit_codes.TERMINATED
    told = {"class": type(error).__name__, "message": message, "hint": hint, "exit_code": code}
    return {**conversion.so_far(), "error": told, "seconds": round(seconds, 3)}
