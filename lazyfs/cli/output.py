"""What a command says: results on stdout, remarks, warnings and progress on stderr, or one JSON object on stdout.

Thread-safe: layers are worked on side by side, each with a progress bar of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from lazyfs.errors import StoreBroken
from lazyfs.units import format_size

_REDRAW = 0.1  # seconds between two drawings of the bars on a terminal
_PLAIN = 5.0  # seconds between two lines about one item where there is no terminal
_WIDTH = 24  # cells of a bar


class Progress:
    """One item under way: `advance(n)` bytes at a time, from any thread. Leaving the context removes its bar."""

    def __init__(self, output: Output, label: str, total: int) -> None:
        self._output = output
        self.label = label
        self.total = total  # bytes; 0: not known
        self.done = 0  # bytes
        self.said_at = output.clock()

    def __enter__(self) -> Progress:
        self._output._begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output._end(self)

    def advance(self, count: int) -> None:
        """Add `count` bytes to what is done. Cheap: draws ten times a second at most."""
        self._output._advance(self, count)

    def text(self, bar: bool) -> str:
        """Return the item's state as one line, with a bar of characters or without."""
        done = format_size(self.done)
        if not self.total:
            return f"{self.label}  {done}"
        part = min(1.0, self.done / self.total)
        cells = ""
        if bar:
            full = int(part * _WIDTH)
            cells = f"[{'#' * full}{'.' * (_WIDTH - full)}] "
        return f"{self.label}  {cells}{part * 100:3.0f} %  {done} of {format_size(self.total)}"


class Output:
    """Where a command's words go.

    `json`: stdout carries the one object of `.json(…)` and nothing else. `quiet`: no remarks, no progress; results,
    warnings and errors stay. Streams are borrowed, never closed. `clock` is monotonic seconds.
    """

    def __init__(
        self,
        json: bool = False,
        quiet: bool = False,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_json = json
        self.is_quiet = quiet
        self.clock = clock
        self._stdout = stdout if stdout is not None else sys.stdout
        self._stderr = stderr if stderr is not None else sys.stderr
        self._lock = threading.RLock()
        self._bars: list[Progress] = []
        self._drawn = 0  # lines of bars now on the terminal, the cursor below them
        self._drawn_at = 0.0
        self._terminal = not quiet and self._stderr.isatty()

    def line(self, text: str = "") -> None:
        """Print one line of the result to stdout; nothing with `json`.

        This and its neighbours raise BrokenPipeError when the reader went away, StoreBroken when writing fails.
        """
        if not self.is_json:
            self._put(self._stdout, text)

    def note(self, text: str) -> None:
        """Print a remark to stderr; nothing when quiet."""
        if not self.is_quiet:
            self._put(self._stderr, f"lazyfs: {text}")

    def warn(self, text: str) -> None:
        """Print a warning to stderr."""
        self._put(self._stderr, f"lazyfs: warning: {text}")

    def error(self, text: str) -> None:
        """Print what went wrong to stderr."""
        self._put(self._stderr, f"lazyfs: {text}")

    def json(self, value: dict[str, Any]) -> None:
        """Print the one JSON object of a command to stdout, when JSON was asked for."""
        if self.is_json:
            import json

            self._put(self._stdout, json.dumps(value, indent=2, ensure_ascii=True, default=str))

    def progress(self, label: str, total: int = 0) -> Progress:
        """Return a context manager that shows one item's way to `total` bytes (0: not known).

        A bar on a terminal; elsewhere at most one line in five seconds.
        """
        return Progress(self, label, total)

    def _put(self, stream: TextIO, text: str) -> None:
        with self._lock:
            self._erase()
            try:
                stream.write(printable(text) + "\n")
                stream.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise StoreBroken(f"the output can't be written: {error.strerror}") from None
            self._draw(force=True)

    def _begin(self, item: Progress) -> None:
        with self._lock:
            self._bars.append(item)
            self._draw()

    def _end(self, item: Progress) -> None:
        with self._lock:
            self._bars.remove(item)
            self._draw(force=True)

    def _advance(self, item: Progress, count: int) -> None:
        with self._lock:
            item.done += count
            if self._terminal:
                self._draw()
            elif not self.is_quiet and self.clock() - item.said_at >= _PLAIN:
                item.said_at = self.clock()
                self._stderr.write(printable(f"lazyfs: {item.text(bar=False)}") + "\n")
                self._stderr.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._stderr.write(f"\x1b[{self._drawn}A\x1b[J")
            self._stderr.flush()
            self._drawn = 0

    def _draw(self, force: bool = False) -> None:
        if not self._terminal or not (self._bars or self._drawn):
            return
        now = self.clock()
        if not force and now - self._drawn_at < _REDRAW:
            return
        import shutil

        self._drawn_at = now
        size = shutil.get_terminal_size()
        shown = self._bars[: max(1, size.lines - 2)]
        back = f"\x1b[{self._drawn}A\x1b[J" if self._drawn else ""
        lines = [printable(item.text(bar=True))[: max(1, size.columns - 1)] + "\n" for item in shown]
        self._stderr.write(back + "".join(lines))
        self._stderr.flush()
        self._drawn = len(shown)


def count(number: int, noun: str = "layer") -> str:
    """Return "1 layer" or "3 layers"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates escaped, tabs and line ends kept.

    Names come out of images: an escape sequence in one must not reach the user's terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )
