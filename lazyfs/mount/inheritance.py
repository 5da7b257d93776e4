"""What a daemon leaves to the next one: which images and chains are shown, to whom, and the logins for them.

It stands in memory that the holder keeps (memfd_create(2)), never on a disk: logins are in it. A line of JSON a change,
so that a daemon that is killed in the middle of one loses that one alone. From time to time one line says all, and what
is before it is given back. The first page is a board: the node that a daemon was at, where it must go carefully.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from typing import Any

from lazyfs.mount.premises import BOARD

log = logging.getLogger(__name__)

_TRIAL = struct.Struct("=QQQ")
_SLACK = 1 << 20  # bytes of lines that are out of date, beside as many as are in use
_PUNCH_HOLE = 0x2 | 0x1  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

Value = dict[str, Any]


class Inheritance:
    """Values by name, kept for the next daemon. Belongs to one thread. `fd`: the memory; None: nobody will follow.

    One process writes. `follows`: another one does; `look` tells what it wrote, until `own`.
    """

    def __init__(self, fd: int | None, *, follows: bool = False) -> None:
        self._fd = fd
        self._values: dict[str, Value] = {}
        self._size = 0  # bytes of the lines since the one that says all, that one included
        self._end = -1
        if follows:
            self.look()
        else:
            self.own()

    def look(self) -> bool:
        """Take over what was written since the last look; False: nothing was. Doesn't block."""
        if self._fd is None or (end := _size(self._fd)) == self._end:
            return False
        while end != self._end:  # what was read meanwhile may have been given back in the midst of it
            self._end = end
            self._load(self._fd)
            end = _size(self._fd)
        return True

    def own(self) -> None:
        """Be the one that writes: whoever did before has ended. Doesn't block."""
        self.look()
        self._write({"all": self._values})

    def values(self, prefix: str) -> dict[str, Value]:
        """Return the values whose names begin so, in the order in which they came."""
        return {name: value for name, value in self._values.items() if name.startswith(prefix)}

    def put(self, name: str, value: Value) -> None:
        """Keep a value, in place of what had its name, and behind all others. Doesn't block."""
        self._values.pop(name, None)
        self._values[name] = value
        self._write({"put": name, "value": value})

    def remove(self, name: str) -> None:
        """Forget a value; one that isn't there is no error. Doesn't block."""
        if self._values.pop(name, None) is not None:
            self._write({"remove": name})

    # -- the board

    def set_trial(self, node: int, offset: int = 0, deaths: int = 0) -> None:
        """Write down the request that is at work (node 0: none), and how many daemons have died at it in a row."""
        if self._fd is not None:
            os.pwrite(self._fd, _TRIAL.pack(node, offset, deaths), 0)

    def trial(self) -> tuple[int, int, int]:
        """Return (node, offset, deaths) of the request that the last daemon was at when it died; node 0: at none."""
        if self._fd is None:
            return 0, 0, 0
        node, offset, deaths = _TRIAL.unpack(os.pread(self._fd, _TRIAL.size, 0))
        return node, offset, deaths

    # -- the lines

    def _load(self, fd: int) -> None:
        self._values = {}
        try:
            begin = os.lseek(fd, BOARD, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing yet
            return
        data = os.pread(fd, self._end - begin, begin)
        for line in data.lstrip(b"\0").split(b"\n"):
            try:
                change = json.loads(line)
            except ValueError:
                continue  # the one that its writer was killed at, or before the one that says all
            match change:
                case {"all": dict(values)}:
                    self._values = {name: value for name, value in values.items() if isinstance(value, dict)}
                case {"put": str(name), "value": dict(value)}:
                    self._values.pop(name, None)
                    self._values[name] = value
                case {"remove": str(name)}:
                    self._values.pop(name, None)
                case _:  # of another release, perhaps: what it means nobody can tell
                    log.warning("a line that a daemon left makes no sense")

    def _write(self, change: Value) -> None:
        if self._fd is None:
            return
        # Behind a line that was not finished, perhaps: the newline in front ends it.
        line = b"\n" + json.dumps(change).encode() + b"\n"
        at = self._end
        try:
            self._end += os.pwrite(self._fd, line, at)
        except OSError as error:  # no memory: readers go on, and the next daemon knows less
            log.warning("a change is not kept for the next daemon: %s", error)
            return
        if "all" in change:
            self._size = len(line)
            self._punch(at)
        else:
            self._size += len(line)
            if self._size > _SLACK and self._size > 2 * len(json.dumps(self._values)):
                self._write({"all": self._values})

    def _punch(self, end: int) -> None:
        """Give the memory before `end` back, whole pages."""
        end -= end % BOARD
        if self._fd is not None and end > BOARD:
            _fallocate(self._fd, BOARD, end - BOARD)


def _size(fd: int) -> int:
    return max(BOARD, os.fstat(fd).st_size)


def _fallocate(fd: int, offset: int, size: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(size))
    if done != 0:
        log.info("memory of what daemons leave is not given back: %s", os.strerror(ctypes.get_errno()))
