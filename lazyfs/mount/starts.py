"""Starts of images: what is known of earlier ones is fetched ahead, and what this one reads is learned for the next.

A node's own trace comes first; where it has none, the registry is asked beside everything else that a mount does, and
nobody waits for its answer. What is learned is merged with what the registry knew and kept on the node.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from lazyfs.chunks.census import Census
from lazyfs.chunks.layer import ServedLayer, host_of
from lazyfs.chunks.remote import Remote
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError
from lazyfs.format.trace import Trace, fitting, merged, stripped
from lazyfs.limits import LONGEST_NOTES, MAX_ADVANCES, MAX_PULLED, NOTES_TIMEOUT
from lazyfs.mount.advance import Advance
from lazyfs.mount.answers import Answers, Find
from lazyfs.mount.filling import guard
from lazyfs.mount.plan import Range, credible
from lazyfs.mount.replay import Replay
from lazyfs.mount.tracing import Recorder
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository

log = logging.getLogger(__name__)

T = TypeVar("T")

NODE, REGISTRY, NONE = "node", "registry", "none"  # where a mount's trace came from
_QUIET = 10.0  # seconds without a first demand after which a start is over
_LOOK = 0.5  # seconds between looks at that


@dataclass(eq=False, slots=True)
class Asked:
    """What was asked for because of a trace: compressed bytes."""

    size: int = 0

    def add(self, size: int) -> None:
        self.size += size


@dataclass(eq=False, slots=True)
class Start:
    """One mount of an image, as far as traces are concerned."""

    manifest: str  # "": nothing is known of the image, so nothing is done
    digests: tuple[str, ...]  # of its layers, base first
    whole: bool  # these are all of its layers
    trusted: bool = True  # layers are read before they were checked whole
    source: str = NONE  # where the trace came from
    asked: Asked = field(default_factory=Asked)  # because of it, since the pull
    trace: Trace | None = None  # the registry's, until what is learned was merged with it
    layers: tuple[ServedLayer, ...] = ()
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)  # of the search and the replay
    learning: trio.CancelScope = field(default_factory=trio.CancelScope)
    clear: trio.Event = field(default_factory=trio.Event)  # nothing that a mount waits for is on its way any more
    mounted: trio.Event = field(default_factory=trio.Event)  # the layers are known
    idle: trio.Event = field(default_factory=trio.Event)  # nothing is fetched, or known to be fetched soon
    over: trio.Event = field(default_factory=trio.Event)  # the search and the replay, whatever came of them
    kept: bool = False  # the node had a trace before this start


class Starts:
    """The starts of a node. Belongs to one trio loop; disk and network are left to threads.

    `find` asks a registry, see `registry.traces`. `note_error` counts what went wrong.
    """

    def __init__(
        self,
        settings: Settings,
        files: TraceFiles,
        census: Census,
        remote: Remote,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        find: Find,
        note_error: Callable[[LazyfsError], None],
        copy: Callable[[ServedLayer, int, int], None] | None = None,
    ) -> None:
        self._settings = settings
        self._copy = copy
        self._files = files
        self._census = census
        self._remote = remote
        self._scheduler = scheduler
        self._nursery = nursery
        self._answers = Answers(find, nursery, note_error)
        self._replays = settings.prefetch and settings.trace
        self._starts: set[Start] = set()
        self._pulled: OrderedDict[str, Asked] = OrderedDict()  # by manifest digest, of pulls whose mount is to come
        self._disk = trio.CapacityLimiter(2)
        self._saving = 0
        self._advances = 0

    # -- a mount's life

    def ask(self, repository: Repository, manifest: str, digests: Sequence[str]) -> None:
        """Ask the registry what it knows of an image's starts, for a `begin` soon. Doesn't wait.

        Only where `begin` would: the node knows nothing, and some of the layers `digests` (all of the image's) are
        surely missing.
        """

        async def run() -> None:
            known, absent = await self._in_thread(partial(self._known, Start(manifest, tuple(digests), True)))
            if known is None and absent:
                await self._answers.ask(repository, manifest, tuple(digests))

        if self._replays:
            self._nursery.start_soon(guard, "trace", run)

    def begin(
        self,
        repository: Repository,
        manifest: str,
        digests: Sequence[str],
        *,
        whole: bool,
        early: bool = False,
        trusted: bool = True,
    ) -> Start:
        """Begin to look for what is known of an image's starts. Doesn't wait.

        `early`: it is pulled, its TOCs have come, and there is no mount yet.

        Where its repository is not `trusted` nothing is fetched before the layers were checked whole.
        `digests`: the layers that are shown, base first; `whole`: all of the image's. Each call is paired with one
        `end`.
        """
        start = Start(manifest, tuple(digests), whole, trusted)
        if early:
            start.clear.set()
            self._pulled[manifest] = start.asked
            while len(self._pulled) > MAX_PULLED:
                self._pulled.popitem(last=False)
        elif manifest in self._pulled:
            start.asked = self._pulled.pop(manifest)
        self._starts.add(start)
        if manifest and (self._replays or self._settings.learn):
            self._nursery.start_soon(guard, "trace", partial(self._run, start, repository))
        else:
            start.idle.set()
            start.over.set()
        return start

    def clear(self, start: Start) -> None:
        """Tell that the TOCs of a mount have come: what they are made into takes time in which the link is free."""
        start.clear.set()

    def mounted(
        self, start: Start, layers: Sequence[ServedLayer], *, trusted: bool = True, learns: bool = True
    ) -> None:
        """Tell which layers an image has. Doesn't wait. What is not `trusted` is fetched whole before it is used.

        `learns`: somebody is about to read them.
        """
        start.layers = tuple(dict.fromkeys(layers))
        start.clear.set()
        lazy = [layer for layer in start.layers if not layer.is_plain]
        due = [layer for layer in lazy if not isinstance(layer.repository, OfflineRepository)]
        if not start.manifest or all(layer.store.complete for layer in due):
            start.scope.cancel()
            start.idle.set()
            return
        if self._settings.learn and learns:
            recorder = Recorder()
            recorder.attach(lazy)
            self._nursery.start_soon(guard, "trace", partial(self._learn, start, recorder))
        if not trusted:
            start.scope.cancel()
            start.idle.set()
        start.mounted.set()

    def end(self, start: Start) -> None:
        """Forget a mount; what was learned of it is saved in the background. Doesn't wait."""
        self._starts.discard(start)
        start.scope.cancel()
        start.learning.cancel()
        start.idle.set()

    async def until_idle(self, layer: ServedLayer) -> None:
        """Wait while what is known of a start is being fetched for a mount that has this layer. A checkpoint."""
        for start in [start for start in self._starts if layer in start.layers]:
            await self.until_over(start)

    async def until_over(self, start: Start) -> None:
        """Wait while what is known of a start is being fetched. A checkpoint."""
        while not start.idle.is_set():
            await start.idle.wait()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Wait a moment for what was learned to be saved. A checkpoint."""
        for start in list(self._starts):
            self.end(start)
        with trio.move_on_after(NOTES_TIMEOUT):
            while self._saving:
                await trio.sleep(0.01)

    # -- what is known

    async def _run(self, start: Start, repository: Repository) -> None:
        try:
            with start.scope:
                known, absent = await self._in_thread(partial(self._known, start))
                start.kept = known is not None
                if not self._replays:
                    return
                if known is None:
                    start.idle.set()  # nothing waits for a registry
                    if not absent:
                        await start.mounted.wait()  # all may be here
                    layers = start.digests if start.whole else None
                    known = await self._answers.ask(repository, start.manifest, layers)
                    start.trace = known if self._settings.learn else None
                if known is not None:
                    start.source = NODE if start.kept else REGISTRY
                    async with trio.open_nursery() as nursery:
                        advance = self._advance(start, repository, known, absent)
                        if advance is not None:
                            nursery.start_soon(self._run_advance, start, advance)
                        await start.mounted.wait()
                        coming = [] if advance is None else advance.land(self._remote, start.layers)
                        await self._replay(start, known, coming)
        finally:
            start.idle.set()
            start.over.set()

    def _known(self, start: Start) -> tuple[Trace | None, list[str]]:
        """Return the node's trace of an image, and the layers that it has no table of. Blocking."""
        manifest = None if start.whole else self._census.manifest(start.manifest)
        if manifest is not None:
            all_layers = tuple(layer.digest for layer in manifest.layers)
            if set(start.digests) <= set(all_layers):
                start.digests, start.whole = all_layers, True
        trace = self._files.load(start.manifest)
        if trace is not None and not set(trace.layers) & set(start.digests):
            self._files.drop(start.manifest)
            trace = None
        return trace, [digest for digest in start.digests if not self._census.store.table_path(digest).exists()]

    def _advance(self, start: Start, repository: Repository, trace: Trace, absent: Sequence[str]) -> Advance | None:
        """Return what can be fetched before the layers are here, of those that the node has no table of."""
        asks = trace.spans and start.trusted and not start.mounted.is_set()
        if not asks or isinstance(repository, OfflineRepository):
            return None
        others = (each for each in self._starts if each is not start and each.manifest == start.manifest)
        if any(not each.over.is_set() for each in others):  # the pull's, say: it has asked for them
            return None
        return Advance(self._scheduler, repository, host_of(repository), trace, absent, start.asked.add)

    async def _run_advance(self, start: Start, advance: Advance) -> None:
        await start.clear.wait()
        if self._advances >= MAX_ADVANCES:
            return
        self._advances += 1
        try:
            await advance.run()
        finally:
            self._advances -= 1

    async def _replay(self, start: Start, trace: Trace, coming: Sequence[Range]) -> None:
        if start.idle.is_set():  # else somebody waits for it
            start.idle = trio.Event()
        began = time.monotonic()
        room = self._settings.store_size // 2
        await Replay(
            self._remote, self._scheduler, trace, start.layers, room, start.asked.add, coming, self._copy
        ).run()
        log.info(
            "trace of %s fetched: from=%s bytes=%d seconds=%.2f",
            start.manifest, start.source, start.asked.size, time.monotonic() - began,
        )  # fmt: skip

    async def _in_thread(self, job: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(job, limiter=self._disk)

    # -- what is learned

    async def _learn(self, start: Start, recorder: Recorder) -> None:
        self._saving += 1
        try:
            with start.learning:
                while True:
                    await trio.sleep(_LOOK)
                    now = time.monotonic()
                    if now - recorder.began >= LONGEST_NOTES or (len(recorder) and now - recorder.last >= _QUIET):
                        break
            recorder.detach()
            if len(recorder):
                with trio.CancelScope(shield=True):
                    save = partial(self._save, start, recorder)
                    await self._in_thread(save)
        finally:
            recorder.detach()
            start.trace = None
            self._saving -= 1

    def _save(self, start: Start, recorder: Recorder) -> None:
        """Keep what a start has read, with what another one or the registry has told meanwhile. Blocking.

        Where the node knew of starts before, only if this was quite another one.
        """
        try:
            ours = stripped(recorder.trace(start.manifest, start.digests, recorder.last - recorder.began))
            known = self._files.load(start.manifest)
            if start.kept and known is not None and not _is_news(ours, known):
                return
            others = [stripped(other) for other in (known, start.trace) if other is not None]
            # Ours first, and of the others only what there is: whoever may push to the registry could name anything.
            whole = merged([ours, *(credible(other, start.layers) for other in others)])
            assert whole is not None
            kept = fitting(whole, ours)
            self._files.save(kept)
            log.info("learned what starts of %s read: %d chunks", start.manifest, len(kept.reads))
        except LazyfsError as error:
            log.warning("what was learned of %s is not kept: %s", start.manifest, error)


def _is_news(ours: Trace, known: Trace) -> bool:
    """Tell whether most of what a start has read is not in a trace: another command of the same image, say."""
    before = {(read.path, known.layers[read.layer], read.offset) for read in known.reads}
    new = sum((read.path, ours.layers[read.layer], read.offset) not in before for read in ours.reads)
    return new > len(ours.reads) // 2
