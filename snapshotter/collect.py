"""What nobody refers to any more, given back: directories, chains that are shown, layers in the daemon's store.

The records say what is used; everything else goes. So what a crash left is found as well, at the start, and a step that
fails (the daemon is away, the disk errs) is done by the next look.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from lazyfs.errors import DaemonUnreachable, LazyfsError
from snapshotter.directories import Directories
from snapshotter.remote import Remote
from snapshotter.store import Store

log = logging.getLogger(__name__)

_FIRST = 0.05  # seconds from a wake to the look: removals come in rows
_AGAIN = 6.0  # seconds until what was too fresh, or failed, is looked at again
_SELDOM = 120.0  # seconds between looks that fail again and again, or at what others use for now
_FRESH = 2.0  # seconds for which an image without a snapshot may be about to get one
_PULLED = 60.0  # seconds in which a pull that has begun prepares its other lazy layers
_NS = 1_000_000_000


@dataclass(slots=True)
class Collected:
    """What a look gave back. `freed`: bytes of layers. `left`: something is to be looked at again."""

    directories: int = 0
    chains: int = 0
    layers: int = 0
    freed: int = 0
    left: bool = False
    stuck: bool = False  # a directory can't be removed
    kept: bool = False  # others use, or pinned, what no snapshot needs
    failed: str = ""
    shown: set[str] = field(default_factory=set)  # layers of chains that nobody uses and that are not hidden yet


class Collector:
    """Looks, in a thread of its own or in the caller's. Thread-safe; one look at a time.

    `note` is told of every look that did something or failed; `forget` is told which layers go, before they do.
    """

    def __init__(
        self,
        store: Store,
        directories: Directories,
        remote: Remote,
        note: Callable[[Collected], None],
        forget: Callable[[Set[str]], None],
    ) -> None:
        self._store = store
        self._directories = directories
        self._remote = remote
        self._note = note
        self._forget = forget
        self._looking = threading.Lock()
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with a look at what an earlier process left."""
        self._wanted.set()
        self._thread = threading.Thread(target=self._loop, name="collect", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a look under way is finished."""
        self._stop.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(5)

    def wake(self) -> None:
        """Look soon, in the background. Returns at once."""
        self._wanted.set()

    def run(self, deadline: float) -> None:
        """Look now, and begin nothing more after `deadline` (monotonic). Blocking; what fails is logged, and left."""
        if not self._looking.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._wanted.set()
            return
        try:
            found = self._look(deadline)
        finally:
            self._looking.release()
        if found.left:
            self._wanted.set()

    # -- the thread

    def _loop(self) -> None:
        again: float | None = None
        failures = 0
        while True:
            self._wanted.wait(again)  # who removes something does not wait for what is left of other things
            if self._stop.wait(_FIRST):
                return
            self._wanted.clear()
            left, kept, failed = True, False, True
            try:
                with self._looking:
                    found = self._look(time.monotonic() + 3600)
                left, kept, failed = found.left, found.kept, found.stuck or bool(found.failed)
            except Exception:
                log.exception("a look for what is not used any more broke")
            failures = failures + 1 if failed else 0
            again = min(_AGAIN * 2 ** max(0, min(failures, 8) - 1), _SELDOM) if left else _SELDOM if kept else None

    # -- a look

    def _look(self, deadline: float) -> Collected:
        done = Collected()
        # Directories first: they need no daemon. Layers last, and only once all chains were looked at: those of a chain
        # that is still shown are kept by the daemon, and their image must not be forgotten before.
        for steps in ((self._strays,), (self._chains, self._layers)):
            try:
                for step in steps:
                    if time.monotonic() > deadline:
                        done.left = True
                        break
                    step(done)
            except LazyfsError as error:
                log.warning("something is not given back yet: %s", error)
                done.failed, done.left = str(error), True
        if done.chains or done.directories or done.layers or done.failed:
            log.info(
                "given back: directories=%d chains=%d layers=%d bytes=%d",
                done.directories, done.chains, done.layers, done.freed,
            )  # fmt: skip
            self._note(done)
        return done

    def _chains(self, done: Collected) -> None:
        shown = self._remote.shown()
        used = {tuple(layer.digest for layer in place.layers) for place in self._store.chains_in_use()}
        for chain, layers in shown.items():
            if layers in used:
                continue
            hidden = False
            try:
                hidden = self._remote.hide(chain, layers)
            except DaemonUnreachable:
                raise  # so it would be with the others, each after its own wait
            except LazyfsError as error:
                log.warning("the chain %s stays for now: %s", chain, error)
                done.failed = str(error)
            if hidden:
                done.chains += 1
            else:
                done.left = True
                done.shown.update(layers)

    def _strays(self, done: Collected) -> None:
        names = self._directories.names()  # before the numbers: what is made meanwhile must not look unused
        for name in self._directories.strays(names, self._store.numbers()):
            try:
                self._directories.check_free(name)
                for each in self._set_aside(name):
                    self._directories.clear(each)
            except FileNotFoundError:
                continue
            except OSError as error:
                # EBUSY: somebody still has it mounted, whatever containerd said.
                log.warning("the directory %s stays for now: %s", self._directories.top / name, error.strerror or error)
                done.left = done.stuck = True
                continue
            done.directories += 1

    def _set_aside(self, name: str) -> list[str]:
        """Take a stray from its number, which may be given again; return its name then, none when it was. OSError."""
        if not (name.isdecimal() and name.isascii()) or str(int(name)) != name:
            return [name]
        names: list[str] = []
        self._store.unless_used(int(name), lambda: names.append(self._directories.set_aside(int(name))))
        return names

    def _layers(self, done: Collected) -> None:
        now = time.time_ns()
        unused = self._store.images_unreferenced(now - int(_FRESH * _NS))
        done.left = done.left or len(self._store.images_unreferenced()) > len(unused)
        # Those of a chain that is still shown can't be removed yet, and who forgets their image never looks again.
        unused = [image for image in unused if done.shown.isdisjoint(layer.digest for layer in image.layers)]
        images = {image.number: image for image in unused}
        images |= {image.number: image for image in self._store.images_settled(now - int(_PULLED * _NS))}
        used = self._store.layers_referenced()
        # A layer above those of an image that are still used, of a pull that may be under way: again when it is not.
        young = (image for image in self._store.images_settled(now) if image.number not in images)
        done.left = done.left or any(layer.digest not in used for image in young for layer in image.layers)
        gone = {layer.digest for image in images.values() for layer in image.layers} - used
        if gone:
            self._forget(gone)
            removed, kept, freed = self._remote.remove_layers(sorted(gone))
            done.layers += len(removed)
            done.freed += freed
            for digest, why in kept.items():
                log.debug("layer %s stays: %s", digest, why)
            done.kept = bool(kept)
            # Its record is what has such a layer looked at again.
            unused = [image for image in unused if kept.keys().isdisjoint(layer.digest for layer in image.layers)]
        for image in unused:
            self._store.drop_image(image.number)
