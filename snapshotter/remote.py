"""The daemon as the snapshotter sees it: calls with deadlines, and a watch that brings chains back after its death.

Each call has a connection of its own, so that a slow one holds up no other. One more connection stays open: its end
tells that the daemon is gone, and while it stands a daemon without mounts does not stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lazyfs import reference as references
from lazyfs.config import Settings
from lazyfs.control_client import Daemon, connect, reach_daemon
from lazyfs.errors import DaemonFault, DaemonUnreachable, LazyfsError
from lazyfs.limits import (
    DEADLINE_SLACK,
    LOCAL_CALL_TIMEOUT,
    LOGIN_TOLD_TIMEOUT,
    MAX_REMOVED,
    RESTORE_THREADS,
    RETURN_TIMEOUT,
    START_TIMEOUT,
    USAGE_TIMEOUT,
)
from snapshotter.model import LazyLayer, LazyPlace, Shown, Usage

log = logging.getLogger(__name__)

_SILENT = 5.0  # seconds after a daemon that did not even greet, in which nobody who can do without it waits for it
_RETRY = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts to reach a daemon that has gone
_SETTLE = 5.0  # seconds for which a chain that was just shown counts as used, whatever the records say


@dataclass(frozen=True, slots=True)
class ResolvedLayer:
    """A layer as the daemon found it. `reason`: why it is not lazy, or not ready; "" otherwise.

    `settled`: the daemon is done with it; else it was still being made ready for this image's next caller.
    """

    layer: LazyLayer
    ready: bool
    lazy: bool
    reason: str
    settled: bool = True


@dataclass(frozen=True, slots=True)
class ResolvedChain:
    """An image as the daemon found it, layers from the base up."""

    reference: str
    manifest_digest: str
    layers: tuple[ResolvedLayer, ...]


Layers = tuple[str, ...]  # blob digests, base first: what a chain is


class Remote:
    """Calls to the node's daemon. Thread-safe; every call blocks, within its deadline, and raises LazyfsErrors.

    `start`: start a daemon where none runs; else wait for the one that somebody else keeps. `in_use` gives the chains
    that must be shown (asked after each new connection); `greet` is called with each new daemon before anything else.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        start: bool,
        in_use: Callable[[], Iterable[LazyPlace]],
        greet: Callable[[Remote], None] = lambda remote: None,
    ) -> None:
        self._settings = settings
        self._start = start
        self._in_use = in_use
        self._greet = greet
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._turn = threading.Condition()  # of who shows a chain and who hides it
        self._showing: Counter[Layers] = Counter()  # who is asking for a chain now
        self._shown: dict[Layers, float] = {}  # when it was last asked for (monotonic)
        self._hiding: set[Layers] = set()
        self._starting = threading.Lock()
        self._failed: tuple[float, LazyfsError] | None = None  # the last start of a daemon, when that failed
        self._silent = -_SILENT  # when a daemon last did not answer (monotonic)
        self._guard: Daemon | None = None
        self._thread: threading.Thread | None = None
        self._greeted = threading.Event()  # the daemon that is there knows the node's logins
        self._meetings = 0  # daemons met
        self.restarts = 0  # daemons met after the first one

    # -- life

    def start(self) -> None:
        """Begin to watch the daemon. Doesn't wait for it."""
        self._thread = threading.Thread(target=self._watch, name="daemon-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch. What the daemon shows stays."""
        self._stop.set()
        with self._lock:
            guard, self._guard = self._guard, None
        if guard is not None:
            guard.hang_up()
        if self._thread is not None:
            self._thread.join(5)

    # -- calls

    def resolve(self, image: str, manifest_digest: str, chain_id: str) -> ResolvedChain:
        """Have all layers of an image made ready side by side, and say which are. Blocking, `prepare_timeout`.

        Only the layer of this chain ID and those below it are waited for.
        """
        deadline = self._settings.prepare_timeout
        self._greeted.wait(LOGIN_TOLD_TIMEOUT)
        answer = self._call(
            "resolve_chain",
            deadline + DEADLINE_SLACK,
            image=image,
            manifest_digest=manifest_digest,
            small=self._settings.small_layer,
            until=chain_id,
            deadline=deadline,
            access=None,
        )
        try:
            layers = tuple(
                ResolvedLayer(
                    LazyLayer(
                        str(one["digest"]),
                        int(one["size"]),
                        str(one["media_type"]),
                        {str(name): str(value) for name, value in one["annotations"].items()},
                        str(one["diff_id"]),
                        str(one["chain_id"]),
                    ),
                    one["ready"] is True,
                    one["lazy"] is True,
                    str(one["reason"]),
                    one.get("settled") is not False,  # a daemon of the release before waits for all
                )
                for one in answer["layers"]
            )
            return ResolvedChain(str(answer["image"]), str(answer["manifest_digest"]), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DaemonFault(f"lazyfsd's answer to resolve_chain lacks something: {error!r}") from None

    def show(self, place: LazyPlace) -> Shown:
        """Have the tree of a chain shown, until `hide`. Blocking, `chain_timeout`; complete chains need no network."""
        deadline = self._settings.chain_timeout
        self._greeted.wait(LOGIN_TOLD_TIMEOUT)
        with self._asking(tuple(one.digest for one in place.layers)):
            answer = self._call(
                "mount_chain",
                deadline + DEADLINE_SLACK,
                image=place.image.reference,
                manifest_digest=place.image.manifest_digest,
                layers=[_layer(one) for one in place.layers],
                deadline=deadline,
                access=None,
            )
        try:
            root = answer["root"]
            return Shown(
                str(answer["chain"]),
                tuple(str(path) for path in answer["lowerdirs"]),
                int(root["mode"]),
                int(root["uid"]),
                int(root["gid"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DaemonFault(f"lazyfsd's answer to mount_chain lacks something: {error!r}") from None

    @contextmanager
    def _asking(self, layers: Layers) -> Iterator[None]:
        """Keep a chain from being hidden while it is asked for and for a moment after, until the records name it."""
        with self._turn:
            if not self._turn.wait_for(lambda: layers not in self._hiding, LOCAL_CALL_TIMEOUT):
                raise DaemonUnreachable("lazyfsd does not let a chain go that is wanted again", hint="see its log")
            self._showing[layers] += 1
        try:
            yield
        finally:
            with self._turn:
                now = time.monotonic()
                self._showing[layers] -= 1
                if not self._showing[layers]:
                    del self._showing[layers]
                self._shown = {one: when for one, when in self._shown.items() if now - when < _SETTLE}
                self._shown[layers] = now

    def shown(self) -> dict[str, Layers]:
        """Return the chains that the daemon shows, with their layers' digests from the base up."""
        found: dict[str, Layers] = {}
        more, after = True, ""
        while more:
            answer = self._call("chains", LOCAL_CALL_TIMEOUT, after=after)
            try:
                page = {str(one["chain"]): tuple(map(str, one["layers"])) for one in answer.get("chains", [])}
            except (KeyError, TypeError) as error:
                raise DaemonFault(f"lazyfsd's answer to chains lacks something: {error!r}") from None
            found |= page
            more, after = answer.get("more") is True and bool(page), max(page, default="")
        return found

    def hide(self, chain: str, layers: Layers) -> bool:
        """Have a chain of these layers shown no more. False, and nothing done: somebody asks for it or just did."""
        with self._turn:
            asked = time.monotonic() - self._shown.get(layers, -_SETTLE) < _SETTLE
            if asked or self._showing[layers] or layers in self._hiding:
                return False
            self._hiding.add(layers)
        try:
            self._call("unmount_chain", LOCAL_CALL_TIMEOUT, chain=chain)
        finally:
            with self._turn:
                self._hiding.discard(layers)
                self._turn.notify_all()
        return True

    def usage(self, digests: Sequence[str]) -> Usage:
        """Return what these layers hold on this disk together. It waits for no daemon that is away, and starts none."""
        if not self._greeted.is_set() or time.monotonic() - self._silent < _SILENT:
            raise DaemonUnreachable("lazyfsd is not there to say what layers take")
        found = self._call("layer_usage", USAGE_TIMEOUT, digests=list(digests)).get("usage", {})
        try:
            return Usage(
                sum(int(one["size"]) for one in found.values()), sum(int(one["inodes"]) for one in found.values())
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DaemonFault(f"lazyfsd's answer to layer_usage lacks something: {error!r}") from None

    def remove_layers(self, digests: Iterable[str]) -> tuple[list[str], dict[str, str], int]:
        """Have layers removed. Return those that were, why others were kept, and the bytes given back."""
        removed: list[str] = []
        kept: dict[str, str] = {}
        freed, wanted = 0, list(digests)
        for first in range(0, len(wanted), MAX_REMOVED):
            answer = self._call("remove_layers", LOCAL_CALL_TIMEOUT * 2, digests=wanted[first : first + MAX_REMOVED])
            try:
                removed += answer.get("removed", [])
                kept |= answer.get("kept", {})
                freed += int(answer.get("freed", 0))
            except (TypeError, ValueError) as error:
                raise DaemonFault(f"lazyfsd's answer to remove_layers lacks something: {error!r}") from None
        return removed, kept, freed

    def set_logins(self, logins: list[dict[str, str]]) -> None:
        """Tell the daemon the node's logins, all of them. They are in no message and no log."""
        self._call("set_logins", LOCAL_CALL_TIMEOUT, logins=logins)

    def _call(self, name: str, timeout: float, **args: Any) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        with self._connect() as daemon:
            try:
                return daemon.call(name, timeout=timeout, **args)
            except DaemonUnreachable as error:
                if error.hint or self._stop.is_set():  # it is there, and too slow
                    raise
                log.info("lazyfsd went away during %s: the next one is asked", name)
        with self._connect() as daemon:
            return daemon.call(name, timeout=max(DEADLINE_SLACK, deadline - time.monotonic()), **args)

    def _connect(self) -> Daemon:
        """Connect; start a daemon where none runs, one thread for all, or wait for who keeps it. Blocking, bounded."""
        began = time.monotonic()
        while True:
            try:
                return connect(self._settings.socket)
            except DaemonUnreachable as error:
                if error.hint:  # one is there and says nothing: no second one may be started, and waiting won't help
                    self._silent = time.monotonic()
                    raise
                if not self._start and (time.monotonic() >= began + RETURN_TIMEOUT or self._stop.wait(_RETRY[0])):
                    raise
            if self._start:
                return self._begin(began)

    def _begin(self, began: float) -> Daemon:
        """Start a daemon, or wait for the thread that does, since `began`; what fails for it fails for all who wait."""
        if not self._starting.acquire(timeout=START_TIMEOUT):
            raise DaemonUnreachable("lazyfsd is being started and does not come", hint="see its log")
        try:
            if self._failed is not None and self._failed[0] >= began:
                raise self._failed[1].with_traceback(None)
            return reach_daemon(self._settings)
        except LazyfsError as error:
            if self._failed is None or self._failed[1] is not error:
                self._failed = time.monotonic(), error
            raise
        finally:
            self._starting.release()

    # -- the watch

    def _watch(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                with self._connect() as guard:
                    with self._lock:
                        self._guard = guard
                    if self._stop.is_set():
                        return
                    failures = 0
                    self._met(guard)
                    guard.wait_for_end()
                    self._greeted.clear()
                if not self._stop.is_set():
                    self.restarts += 1
                    log.warning("lazyfsd has gone: it is brought back, and the chains in use with it")
            except DaemonUnreachable as error:
                if failures in (0, len(_RETRY)):
                    log.warning("lazyfsd can't be reached: %s", error)
            except LazyfsError as error:
                log.error("lazyfsd can't be used: %s", error)
            except Exception:
                log.exception("the watch over lazyfsd broke")
            self._stop.wait(_RETRY[min(failures, len(_RETRY) - 1)])
            failures += 1

    def _met(self, guard: Daemon) -> None:
        log.info("connected to lazyfsd: pid=%s version=%s", guard.greeting.get("pid"), guard.greeting.get("lazyfsd"))
        self._greet(self)
        self._greeted.set()
        self._meetings += 1
        # Side by side, each within its own deadline: a registry that is gone holds up nobody else's images.
        pools: dict[str, ThreadPoolExecutor] = {}
        for place in self._in_use():
            host = _host(place.image.reference)
            if host not in pools:
                pools[host] = ThreadPoolExecutor(RESTORE_THREADS, "restore")
            pools[host].submit(self._restore, place, self._meetings)
        for pool in pools.values():
            pool.shutdown(wait=False)

    def _restore(self, place: LazyPlace, meeting: int) -> None:
        if self._stop.is_set() or meeting != self._meetings:
            return  # a newer daemon is told anew
        try:
            self.show(place)
        except LazyfsError as error:
            log.error("a chain of %s is not shown again: %s", place.image.reference, error)


def _host(reference: str) -> str:
    try:
        return references.parse(reference).host
    except LazyfsError:
        return ""


def _layer(one: LazyLayer) -> dict[str, Any]:
    return {
        "digest": one.digest,
        "size": one.size,
        "media_type": one.media_type,
        "annotations": dict(one.annotations),
        "diff_id": one.diff_id,
    }
