"""Rate limits as the user hears of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lazyfs.limits import MAX_LIMITS_TOLD
from lazyfs.registry.hops import Hop, OnHop

_SAT_OUT = 60.0  # seconds
LOW = 20  # requests left from which on it is worth a word


class LimitTeller:
    """Tell once for each host that it answered 429, and pass all hops on. Thread-safe; an OnHop.

    `say` is called in the thread that made the request, of waits that whoever asks may sit out. Of others either the
    error tells that will be raised, or somebody else answers: `remarks` has those.
    """

    def __init__(self, on_hop: OnHop, say: Callable[[str], None]) -> None:
        self._on_hop = on_hop
        self._say = say
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self.remarks: list[str] = []

    def __call__(self, hop: Hop) -> None:
        self._on_hop(hop)
        if hop.status != 429:
            return
        with self._lock:
            if hop.host in self._told or len(self._told) >= MAX_LIMITS_TOLD:
                return
            self._told.add(hop.host)
        said = sentence(hop.host, hop.retry_after)
        if hop.retry_after < _SAT_OUT:
            self._say(said)
        else:
            self.remarks.append(said)


def sentence(host: str, seconds: float) -> str:
    """Return what to tell of a host that wants to be left alone for `seconds` (0: it didn't say)."""
    wait = f"for {seconds:.0f} s" if seconds else "for a while"
    return f"{host} limits how often it may be asked, it is left alone {wait}: a login or a mirror may be allowed more"
