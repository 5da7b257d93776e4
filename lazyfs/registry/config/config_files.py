"""Reading other programs' TOML: bounded, and with errors that name the file and the key."""

from __future__ import annotations

import logging
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_CONFIG_FILE

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Section:
    """A table of a configuration file, with where it stands for messages ("" for the top level)."""

    path: Path
    values: dict[str, Any]
    where: str = ""

    def text(self, name: str) -> str:
        """Return a text, "" when absent. Raise UsageError for anything else, as all that follow."""
        value = self.values.get(name, "")
        if not isinstance(value, str):
            raise self.wrong(name, "is no text")
        return value

    def flag(self, name: str) -> bool:
        """Return a truth value, False when absent."""
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "is neither true nor false")
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of texts, empty when absent."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, "is no list of texts")
        return value

    def tables(self, name: str) -> list[Section]:
        """Return an array of tables, empty when absent."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.wrong(name, f"is no array of tables; write [[{self._named(name)}]]")
        return [Section(self.path, one, f"{self._named(name)}[{number}]") for number, one in enumerate(value)]

    def table(self, name: str) -> Section:
        """Return a table, an empty one when absent."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "is no table")
        return Section(self.path, value, self._named(name))

    def wrong(self, name: str, reason: str) -> UsageError:
        """Return the error for the key `name`."""
        return UsageError(f"{self.path}: {self._named(name)} {reason}")

    def _named(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name


def read_section(path: Path, of_use: re.Pattern[bytes] | None = None) -> Section | None:
    """Return a file's top level, None when there is no such file or `of_use` finds nothing in it. Blocking.

    Raise UsageError for a malformed file.
    """
    raw = read_bounded(path)
    if raw is None or (of_use is not None and not of_use.search(raw)):
        return None
    try:
        return Section(path, tomllib.loads(raw.decode()))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML
        raise UsageError(f"{path} is not TOML: {str(error)[:200] or 'nested too deeply'}") from None


def read_bounded(path: Path, limit: int = MAX_CONFIG_FILE) -> bytes | None:
    """Return a file's bytes, None when there is no such file for us. Blocking. Raise UsageError when it can't be read.

    What only others may read is passed over, as containerd's files in the hands of an ordinary user.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file")  # a FIFO would keep us for ever
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        log.info("passed over, not ours to read: %s", path)
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    if len(raw) > limit:
        raise UsageError(f"{path} has more than the {limit} bytes allowed")
    return raw
