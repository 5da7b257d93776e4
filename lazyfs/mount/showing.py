"""How trees are shown: by which driver, where, and why. With `erofs` a tree has a mount of its own for all its users.

The mounts' devices are files of the session, so the loop must be free while one is made: all of it is done by threads.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lazyfs import private
from lazyfs.config import Settings
from lazyfs.container import mounts
from lazyfs.errors import LazyfsError, MountFailed, UsageError
from lazyfs.log import fields
from lazyfs.mount import erofs_mount
from lazyfs.mount.forest import DATA_NAME, PROBE_NAME, Planted

if TYPE_CHECKING:
    from lazyfs.mount.erofs_probe import Verdict

log = logging.getLogger(__name__)

_THREADS = 4
_LEAVERS = 4  # threads that take mounts away: never those in which an image is made, for two minutes at worst


class Driver(StrEnum):
    """What a user may ask for."""

    AUTO = "auto"
    EROFS = "erofs"
    FUSE = "fuse"


@dataclass(frozen=True, slots=True)
class Shown:
    """Where a tree shows, by which driver, and why by that."""

    path: str
    driver: str
    reason: str


@dataclass(eq=False, slots=True)
class _Place:
    """The mount of one tree; `lock` is held by whoever makes it or takes it away."""

    users: int
    lock: trio.Lock


class Showing:
    """The erofs mounts of a daemon, and the choice of the driver. Belongs to the trio loop.

    `ensure_image(planted)` returns the tree's metadata image, checked, and the numbers of the layers that are its
    devices, in order; blocking. `elsewhere`: why erofs can't be, in a daemon that has no session for all; "": it can.
    """

    def __init__(
        self,
        settings: Settings,
        ensure_image: Callable[[Planted], tuple[Path, list[int]]],
        fuse_path: Callable[[Planted], str],
        elsewhere: str,
    ) -> None:
        self._settings = settings
        self._ensure_image = ensure_image
        self._fuse_path = fuse_path
        self.elsewhere = elsewhere
        self._verdict: Verdict | None = None
        self._testing = trio.Lock()
        self._places: dict[str, _Place] = {}
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._leavers = trio.CapacityLimiter(_LEAVERS)

    # -- the choice

    @property
    def wants_images(self) -> bool:
        """Tell whether trees will be shown by erofs, as far as that is known."""
        if self.elsewhere or self._settings.driver == Driver.FUSE:
            return False
        return self._verdict is None or self._verdict.method is not None

    def choice(self) -> tuple[str, str]:
        """Return the driver of new mounts and the reason, as far as it is known. Doesn't block."""
        if self.elsewhere:
            return Driver.FUSE, self.elsewhere
        if self._settings.driver == Driver.FUSE:
            return Driver.FUSE, "the settings say so"
        if self._verdict is None:
            return Driver.AUTO, "its self-test is not done yet"
        if self._verdict.method is None:
            return Driver.FUSE, f"erofs doesn't work here: {self._verdict.reason}"
        return Driver.EROFS, self._describe(self._verdict)

    def _describe(self, verdict: Verdict) -> str:
        text = "its self-test passed"
        if verdict.method is erofs_mount.Method.LOOPS:
            text += f" with loop devices ({verdict.reason})"
        return text

    async def test_early(self) -> None:
        """Have the self-test done before the first mount wants to know, if one will. A checkpoint; the session serves.

        The end of the daemon doesn't wait for it.
        """
        if self.wants_images:
            await self._test(abandon=True)

    async def _test(self, *, abandon: bool = False) -> Verdict:
        """Return what the self-test says; it runs once. A checkpoint."""
        async with self._testing:
            if self._verdict is None:
                began = trio.current_time()
                self._verdict = await trio.to_thread.run_sync(
                    self._probe, limiter=self._limiter, abandon_on_cancel=abandon
                )
                log.info("driver: %s (%s), known after %.0f ms", *self.choice(), (trio.current_time() - began) * 1000)
        return self._verdict

    def _probe(self) -> Verdict:
        from lazyfs.mount.erofs_probe import Verdict, probe  # needs what else the child alone needs

        scratch = self._settings.root / "probe"  # the daemon that holds the lock alone comes here
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(mode=0o700)
            return probe(scratch, self._device(os.fsdecode(PROBE_NAME)))
        except OSError as error:
            return Verdict(None, f"{scratch} can't be used: {error.strerror}")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _device(self, name: str) -> Path:
        return self._settings.session / os.fsdecode(DATA_NAME) / name

    # -- showing

    async def show(self, planted: Planted, wanted: str | None) -> Shown:
        """Show a tree by the driver `wanted` (None: the settings'). A checkpoint.

        Each call is paired with one `hide`. Raise UsageError for another driver, MountFailed or StoreError when erofs
        was asked for by name and can't be.
        """
        asked = wanted or self._settings.driver
        if asked not in tuple(Driver):
            raise UsageError(f"there is no driver {asked[:40]!r}", hint="auto, erofs or fuse")
        path = self._fuse_path(planted)  # refuses where nothing is shown
        if asked == Driver.FUSE:
            return Shown(path, Driver.FUSE, "it was asked for" if wanted else "the settings say so")
        if self.elsewhere:
            if asked == Driver.EROFS:
                raise MountFailed(f"the driver erofs can't be used: {self.elsewhere}", hint="use --driver fuse")
            return Shown(path, Driver.FUSE, self.elsewhere)
        verdict = await self._test()
        reason = verdict.reason
        if verdict.method is not None:
            try:
                target = await self._hold(planted, verdict.method)
                return Shown(target, Driver.EROFS, self._describe(verdict))
            except LazyfsError as error:
                if asked == Driver.EROFS:
                    raise
                log.warning("shown by fuse: %s", error, extra=fields(tree=planted.name.decode()))
                reason = str(error)
        if asked == Driver.EROFS:
            raise MountFailed(f"the driver erofs doesn't work here: {reason}", hint="use --driver fuse, or auto")
        return Shown(path, Driver.FUSE, f"erofs doesn't work here: {reason}")

    def regain(self, planted: Planted, shown: Shown) -> None:
        """Count one `show` that a daemon before us did. Its mount is there, and outlived that daemon."""
        if shown.driver == Driver.EROFS:
            key = planted.name.decode()
            place = self._places.get(key)
            if place is None:
                place = self._places[key] = _Place(0, trio.Lock())
            place.users += 1

    async def clear_unknown(self) -> None:
        """Take away mounts that nobody has, because a daemon before us died in the midst of one. A checkpoint."""
        for target in await trio.to_thread.run_sync(self._mounted, limiter=self._leavers):
            if target.name not in self._places:
                place = self._places[target.name] = _Place(0, trio.Lock())
                async with place.lock:  # whoever wants the same tree meanwhile mounts it behind us
                    await trio.to_thread.run_sync(erofs_mount.unmount, target, limiter=self._leavers)
                    if not place.users:
                        del self._places[target.name]

    async def hide(self, planted: Planted, shown: Shown) -> None:
        """Take back one `show`; with the last one of an erofs mount it goes. A checkpoint; never fails."""
        place = self._places.get(planted.name.decode())
        if shown.driver == Driver.EROFS and place is not None:
            with trio.CancelScope(shield=True):
                await self._let_go(planted, place)

    async def sever(self) -> None:
        """Break the session's connection, for the end of the daemon: who waits for bytes gets an error. A checkpoint.

        Nobody answers any more, and mounts over it could not be taken away else.
        """
        if not self.elsewhere:
            await trio.to_thread.run_sync(self._sever, limiter=self._leavers)

    def _sever(self) -> None:
        path = os.fsencode(self._settings.session)
        found = mounts.top_at(path)
        if found is not None and found.kind == "fuse.lazyfs":
            try:
                mounts.umount(path, lazy=True, force=True)
            except MountFailed as error:
                log.warning("readers of the session may wait: %s", error)

    async def close(self) -> None:
        """Take all mounts away: before the session goes. A checkpoint."""
        await trio.to_thread.run_sync(self._clear, limiter=self._leavers)
        self._places.clear()

    async def clean_up_crashed(self) -> None:
        """Take away what a daemon that died has left mounted. A checkpoint."""
        await trio.to_thread.run_sync(self._clear, limiter=self._leavers)

    def _mounted(self) -> list[Path]:
        found = mounts.below(os.fsencode(self._settings.shown))
        return [Path(os.fsdecode(entry.dir)) for entry in found if entry.kind == "erofs"]

    def _clear(self) -> None:
        for target in self._mounted():
            erofs_mount.unmount(target)
        with suppress(OSError):  # not empty where one stays mounted
            self._settings.shown.rmdir()

    async def _hold(self, planted: Planted, method: erofs_mount.Method) -> str:
        key = planted.name.decode()
        target = self._settings.shown / key
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(0, trio.Lock())
        place.users += 1
        try:
            async with place.lock:
                mount = partial(self._mount, planted, target, method)
                await trio.to_thread.run_sync(mount, limiter=self._limiter)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._let_go(planted, place)
            raise
        return os.fspath(target)

    async def _let_go(self, planted: Planted, place: _Place) -> None:
        key = planted.name.decode()
        place.users -= 1
        if place.users:
            return
        async with place.lock:
            if not place.users and self._places.get(key) is place:
                await self._unmount(planted, self._settings.shown / key)
                if not place.users:
                    del self._places[key]

    async def _unmount(self, planted: Planted, target: Path) -> None:
        """Take a tree's mount away when nothing is read through it any more: the kernel would wait, and stop others."""
        for layer in planted.layers:
            layer.data_reads.ending += 1
        try:
            for layer in planted.layers:
                await layer.data_reads.end(shared=layer.users > 1)
            await trio.to_thread.run_sync(erofs_mount.unmount, target, limiter=self._leavers)
        finally:
            for layer in planted.layers:
                layer.data_reads.ending -= 1

    def _mount(self, planted: Planted, target: Path, method: erofs_mount.Method) -> None:
        found = mounts.top_at(os.fsencode(target))
        if found is not None and found.kind == "erofs":
            return  # somebody else's, still there
        image, layers = self._ensure_image(planted)
        try:
            private.make_directory(self._settings.shown)
            private.make_directory(target)
        except OSError as error:
            raise MountFailed(f"{target} can't be made: {error.strerror}") from None
        erofs_mount.mount(image, [self._device(str(number)) for number in layers], target, method)
