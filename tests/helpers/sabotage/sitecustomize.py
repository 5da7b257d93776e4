"""Breaks the disk, the clock and the names of every Python that starts with this directory in its PYTHONPATH.

$LAZYFS_TEST_SABOTAGE is a directory; a file in it is a fault, there from then on until the file goes:

    read-fails, write-fails   reads, or writes, of files of the store's layers end with the error that the file names
    slow                      each of them takes as many seconds as the file says
    no-names                  no host name is resolved
    clock                     time.time() is as many seconds off as the file says

A kernel has faults of its own for some of this (device mapper), which few machines let a test use.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

_PLACE = os.environ.get("LAZYFS_TEST_SABOTAGE", "")
_STORE = os.path.realpath(os.path.join(_PLACE, "store")) + "/layers/"  # a link there names the store
_real_time = time.time


def _setting(name: str) -> str | None:
    """Return what the fault's file says, None where there is none."""
    try:
        with open(os.path.join(_PLACE, name)) as handle:
            return handle.read()
    except OSError:
        return None


def _broken(real: Callable[..., Any], fault: str, *, waits: bool) -> Callable[..., Any]:
    def call(fd: int, *words: Any, **more: Any) -> Any:
        try:
            ours = os.readlink(f"/proc/self/fd/{fd}").startswith(_STORE)
        except OSError:
            ours = False
        if ours:
            if waits and (seconds := _setting("slow")) is not None:
                time.sleep(float(seconds))
            if (word := _setting(fault)) is not None:
                number = getattr(errno, word)
                raise OSError(number, os.strerror(number))
        return real(fd, *words, **more)

    return call


def _resolve(host: Any, *words: Any, **more: Any) -> Any:
    if isinstance(host, str) and not host.replace(".", "").isdigit() and _setting("no-names") is not None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return _real_resolve(host, *words, **more)


def _now() -> float:
    return _real_time() + float(_setting("clock") or 0)


_real_resolve = socket.getaddrinfo
if _PLACE:
    for _name in ("pread", "preadv"):  # preadv is for what must not wait
        setattr(os, _name, _broken(getattr(os, _name), "read-fails", waits=_name == "pread"))
    for _name in ("pwrite", "pwritev", "ftruncate"):
        setattr(os, _name, _broken(getattr(os, _name), "write-fails", waits=True))
    socket.getaddrinfo = _resolve
    time.time = _now
