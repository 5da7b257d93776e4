"""Log lines for people and machines: key=value pairs on stderr or in a file, or JSON objects with $LAZYFS_LOG=json.

    time=2025-01-31T12:00:00.123Z level=warning logger=lazyfs.chunks.store message="passed by: no space left"

Modules log through `log = logging.getLogger(__name__)` with lazy % arguments; only entry points call `set_up`. What a
line is about goes into pairs of its own, so that it can be searched for:

    log.info("lazy", extra=fields(image=image, layer=digest, snapshot=key, seconds=0.12))
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from lazyfs.errors import UsageError

_FIELDS = "lazyfs_fields"  # the attribute of a record that holds them
_TAKEN = frozenset({"time", "level", "logger", "message", "trace"})
LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # by the number of -v


class KeyValueFormatter(logging.Formatter):
    """Format a record as one line of key=value pairs. A traceback follows as the pair `trace`, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={quote(value)}" for name, value in self.pairs(record).items())

    def pairs(self, record: logging.LogRecord) -> dict[str, str]:
        """Return what the line says, by name."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            pairs["trace"] = self.formatException(record.exc_info)
        return pairs


class JsonFormatter(KeyValueFormatter):
    """Format a record as one JSON object of texts."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        return json.dumps(self.pairs(record))


def fields(**pairs: object) -> dict[str, dict[str, str]]:
    """Return the `extra` of a log line that is about these: image, layer (digest), snapshot (key), chain (id), …

    What is empty or None is left out; fractions have three digits.
    """
    told = {name: value for name, value in pairs.items() if value not in ("", None) and name not in _TAKEN}
    return {_FIELDS: {name: f"{v:.3f}" if isinstance(v, float) else str(v) for name, v in told.items()}}


def quote(text: str) -> str:
    """Return `text` fit for one value: quoted when it holds blanks, quotes or control characters; always one line."""
    plain = text and text.isprintable() and not any(c in ' "=\\' for c in text)
    if plain:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in escaped
    )
    return f'"{shown}"'


def set_up(verbosity: int = 0, *, file: Path | None = None) -> None:
    """Send log lines of lazyfs and the indexer to stderr, or append them to `file` (created with mode 0600).

    `verbosity` 0 shows warnings, 1 info, 2 and more debug. Calling it again replaces the earlier set-up. Blocking.
    Raise UsageError when `file` can't be opened.
    """
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
    else:
        try:
            file.touch(mode=0o600, exist_ok=True)
            handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(f"log file {file} can't be opened: {error.strerror}") from None
    handler.setFormatter(JsonFormatter() if os.environ.get("LAZYFS_LOG") == "json" else KeyValueFormatter())
    level = LEVELS[max(0, min(verbosity, len(LEVELS) - 1))]
    for name in ("lazyfs", "indexer", "snapshotter"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
