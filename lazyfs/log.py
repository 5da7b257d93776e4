"""Log lines for people and machines: key=value pairs on stderr or in a file.

    time=2025-01-31T12:00:00.123Z level=warning logger=lazyfs.chunks.store message="passed by: no space left"

Modules log through `log = logging.getLogger(__name__)` with lazy % arguments; only entry points call `set_up`.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lazyfs.errors import UsageError

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # by the number of -v


class KeyValueFormatter(logging.Formatter):
    """Format a record as one line of key=value pairs. A traceback follows as the pair `trace`, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        pairs = [
            f"time={stamp}.{int(record.msecs):03d}Z",
            f"level={record.levelname.lower()}",
            f"logger={record.name}",
            f"message={quote(record.getMessage())}",
        ]
        if record.exc_info and record.exc_info[0] is not None:
            pairs.append(f"trace={quote(self.formatException(record.exc_info))}")
        return " ".join(pairs)


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
    handler.setFormatter(KeyValueFormatter())
    level = LEVELS[max(0, min(verbosity, len(LEVELS) - 1))]
    for name in ("lazyfs", "indexer", "snapshotter"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
