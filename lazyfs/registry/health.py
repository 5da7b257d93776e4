"""What is known of each host that serves images: whether it answers, how fast, whether it lies, when it may be asked.

One for the node, shared by all repositories. It decides the order in which mirrors and origin are asked, never whether
bytes are right: that the digests do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazyfs.errors import (
    BlobMissing,
    LazyfsError,
    ManifestMissing,
    RegistryTimeout,
    RegistryUnreachable,
    TooManyRequests,
    TrustError,
    Unauthorized,
)
from lazyfs.limits import MAX_HEALTH_BLOBS, MAX_HEALTH_HOSTS, MAX_SIT_OUT

log = logging.getLogger(__name__)

_OPENS_AT = 3  # failures in a row; one that costs a reader seconds counts as three
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 120.0  # seconds that a failing host is left alone, doubling
UNTOLD = 30.0  # seconds to wait after a 429 that doesn't say
_LIES = 3  # wrong answers after which a host is asked last, whatever it is asked for
_DISTRUST, _LONGEST_DISTRUST = 600.0, 86_400.0  # seconds, doubling
_ABSENT = 60.0  # seconds for which "I don't have it", or "you may not", is remembered
_SMOOTHING = 0.3  # weight of the newest sample in the moving averages
_SAMPLE = 64 << 10  # bytes from which a body says something of a host's speed
_SHARE = 8  # a host is slow at less than this part of the fastest other one's rate
_SLOW = 16 << 10  # bytes a second that are slow where no other host's rate is known


@dataclass(slots=True)
class _Host:
    failures: int = 0  # weight of those in a row
    opened: float = 0.0  # until when it is left alone; 0: the breaker is closed
    pause: float = _FIRST_PAUSE
    probing: bool = False
    limited: float = 0.0  # until when it must not be asked
    lies: int = 0  # since it was last trusted
    all_lies: int = 0
    distrusted: float = 0.0  # until when
    distrust: float = _DISTRUST
    first_byte: float = 0.0  # seconds, moving average
    rate: float = 0.0  # bytes a second of one body, moving average
    answers: int = 0
    errors: int = 0
    slow: int = 0  # answers given up because they came too slowly or not at all
    last_error: str = ""
    remaining: int | None = None


@dataclass(slots=True)
class _Thing:
    """A blob, or a tag of a repository: what each host made of it."""

    lies: dict[str, int] = field(default_factory=dict)
    absent: dict[str, float] = field(default_factory=dict)  # until when
    served: set[str] = field(default_factory=set)  # hosts that sent bytes of it since it was last blamed
    condemned: set[str] = field(default_factory=set)  # hosts that sent all of it alone, and it was wrong


class Health:
    """The node's knowledge of hosts ("host[:port]"). Thread-safe; never blocks. `clock` counts seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._things: OrderedDict[str, _Thing] = OrderedDict()

    # -- whom to ask

    def order(self, hosts: Sequence[str], what: str) -> list[int]:
        """Return the indices of `hosts` in the order to ask them for `what` (a digest or "repository:tag").

        Those that must not be asked now because of their rate limits are left out.
        """
        with self._lock:
            now = self._clock()
            thing = self._things.get(what) or _Thing()
            ranks = []
            for index, name in enumerate(hosts):
                host = self._host(name)
                if host.limited > now:
                    continue
                absent = thing.absent.get(name, 0.0) > now
                ranks.append((bool(host.opened), host.distrusted > now, thing.lies.get(name, 0), absent, index))
            return [rank[-1] for rank in sorted(ranks)]

    def is_well(self, host: str) -> bool:
        """Tell whether nothing speaks against asking the host now."""
        with self._lock:
            found = self._host(host)
            return not found.opened and found.limited <= self._clock()

    def has_lied(self, host: str, what: str) -> bool:
        """Tell whether the host sent wrong bytes of `what`, or is distrusted: no better one to wait less for."""
        with self._lock:
            thing = self._things.get(what)
            return self._host(host).distrusted > self._clock() or (thing is not None and host in thing.lies)

    def limited_for(self, host: str) -> float:
        """Return how many seconds the host must not be asked, 0 when it may."""
        with self._lock:
            found = self._hosts.get(host)
            return max(0.0, found.limited - self._clock()) if found is not None else 0.0

    def floor(self, others: Sequence[str]) -> float:
        """Return the bytes a second below which a host is too slow while `others` could be asked."""
        with self._lock:
            rates = [self._host(name).rate for name in others]
        best = max(rates, default=0.0)
        return best / _SHARE if best else float(_SLOW)

    def take_probe(self, host: str) -> bool:
        """Tell whether it is time to try a failing host again; then it is the caller's to do, and `probed` its end."""
        with self._lock:
            found = self._host(host)
            if not found.opened or found.probing or self._clock() < found.opened:
                return False
            found.probing = True
            return True

    def probed(self, host: str) -> None:
        """Tell that a probe is over, however it went."""
        with self._lock:
            self._host(host).probing = False

    # -- what they did

    def note_answer(self, host: str, what: str, seconds: float) -> None:
        """Note that a host answered, with its first byte after `seconds`. How it ends is another matter."""
        with self._lock:
            found = self._host(host)
            found.answers += 1
            found.first_byte = _average(found.first_byte, seconds)
            self._thing(what).absent.pop(host, None)

    def note_done(self, host: str) -> None:
        """Note that a host gave an answer to its end: it is well."""
        with self._lock:
            found = self._host(host)
            if found.opened:
                log.info("%s answers again", host)
            found.failures, found.opened, found.pause = 0, 0.0, _FIRST_PAUSE

    def note_body(self, host: str, what: str, size: int, seconds: float) -> None:
        """Note how fast `size` bytes came, by the seconds spent waiting for them."""
        with self._lock:
            self._thing(what).served.add(host)
            if size >= _SAMPLE and seconds > 0:
                found = self._host(host)
                found.rate = _average(found.rate, size / seconds)

    def note_error(self, host: str, what: str, error: LazyfsError) -> None:
        """Note that asking a host for `what` failed."""
        with self._lock:
            found = self._host(host)
            found.errors += 1
            found.last_error = error.message[:300]
            now = self._clock()
            if isinstance(error, (BlobMissing, ManifestMissing, Unauthorized)):
                self._thing(what).absent[host] = now + _ABSENT
                return
            if isinstance(error, TrustError):
                self._lied(host, found, what, error.message)
                return
            if isinstance(error, TooManyRequests):
                wait = min(error.retry_after or UNTOLD, MAX_SIT_OUT)
                found.limited = max(found.limited, now + wait)
                log.warning("%s limits how often it may be asked: not asked for %.0f s", host, wait)
                return
            costly = isinstance(error, (RegistryTimeout, RegistryUnreachable))
            found.slow += isinstance(error, RegistryTimeout)
            found.failures += _OPENS_AT if costly or not error.temporary else 1
            if found.failures >= _OPENS_AT:
                if not found.opened:
                    log.warning("%s is left alone for %.0f s: %s", host, found.pause, error)
                found.opened = now + found.pause
                found.pause = min(2 * found.pause, _LONGEST_PAUSE)

    def note_lie(self, host: str, what: str, reason: str) -> None:
        """Note that a host sent bytes of `what` that are not what their digest promised."""
        with self._lock:
            found = self._host(host)
            found.errors += 1
            found.last_error = reason[:300]
            self._lied(host, found, what, reason)

    def note_limit(self, host: str, remaining: int | None, retry_after: float) -> None:
        """Note what a host's header says of its rate limit: requests left, seconds to wait after a 429."""
        with self._lock:
            found = self._host(host)
            if remaining is not None:
                found.remaining = remaining
            if retry_after:
                found.limited = max(found.limited, self._clock() + min(retry_after, MAX_SIT_OUT))

    def blame(self, what: str, reason: str) -> list[str]:
        """Note that a blob turned out wrong as a whole. Return the hosts that sent bytes of it since the last time."""
        with self._lock:
            thing = self._thing(what)
            served = sorted(thing.served)
            thing.served.clear()
            if len(served) == 1:
                thing.condemned.add(served[0])
            for host in served:
                self._lied(host, self._host(host), what, reason)
            return served

    def all_condemned(self, what: str, hosts: Sequence[str]) -> bool:
        """Tell whether each of `hosts` has sent the whole blob alone, and it was wrong each time."""
        with self._lock:
            return self._thing(what).condemned.issuperset(hosts)

    def reopen(self, what: str) -> None:
        """Forget who was found to have sent all of a blob wrong: it is looked at anew."""
        with self._lock:
            self._thing(what).condemned.clear()

    def pardon(self, what: str, hosts: Sequence[str]) -> None:
        """Take back what was said against `hosts` because of a blob, if each of them lied: then it is the blob."""
        with self._lock:
            thing = self._thing(what)
            if not thing.lies.keys() >= set(hosts):
                return
            thing.condemned.update(hosts)
            for name, times in thing.lies.items():
                host = self._host(name)
                host.lies = max(0, host.lies - times)
                host.all_lies = max(0, host.all_lies - times)
            thing.lies.clear()

    def note_stale(self, host: str, what: str) -> None:
        """Note that a host's tag leads to something that nobody has: it is asked last for it, for a while."""
        with self._lock:
            self._thing(what).absent[host] = self._clock() + _ABSENT

    # -- showing it

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return each host's state for `lazyfs status`: names as in docs/cli.md, times in seconds."""
        with self._lock:
            now = self._clock()
            return {name: _shown(host, now) for name, host in self._hosts.items()}

    # -- inside, under the lock

    def _host(self, name: str) -> _Host:
        found = self._hosts.get(name)
        if found is None:
            found = self._hosts[name] = _Host()
            while len(self._hosts) > MAX_HEALTH_HOSTS:
                self._hosts.popitem(last=False)
        return found

    def _thing(self, what: str) -> _Thing:
        found = self._things.get(what)
        if found is None:
            found = self._things[what] = _Thing()
            while len(self._things) > MAX_HEALTH_BLOBS:
                self._things.popitem(last=False)
        else:
            self._things.move_to_end(what)
        return found

    def _lied(self, host: str, found: _Host, what: str, reason: str) -> None:
        thing = self._thing(what)
        thing.lies[host] = thing.lies.get(host, 0) + 1
        found.lies += 1
        found.all_lies += 1
        log.warning("%s sent wrong bytes: %s", host, reason)
        if found.lies >= _LIES:
            found.lies = 0
            found.distrusted = self._clock() + found.distrust
            log.warning("%s lied %d times: asked last for %.0f s", host, found.all_lies, found.distrust)
            found.distrust = min(2 * found.distrust, _LONGEST_DISTRUST)


def _average(old: float, new: float) -> float:
    return old + (new - old) * _SMOOTHING if old else new


def _shown(host: _Host, now: float) -> dict[str, Any]:
    state = "ok"
    until = 0.0
    if host.limited > now:
        state, until = "rate limited", host.limited
    elif host.opened:
        state, until = ("being tried again" if host.probing else "left alone"), host.opened
    elif host.distrusted > now:
        state, until = "distrusted", host.distrusted
    return {
        "state": state,
        "for": round(max(0.0, until - now), 1),
        "answers": host.answers,
        "errors": host.errors,
        "slow": host.slow,
        "lies": host.all_lies,
        "first_byte_ms": round(host.first_byte * 1000, 1),
        "rate": round(host.rate),
        "remaining": host.remaining,
        "last_error": host.last_error,
    }
