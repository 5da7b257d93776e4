"""Merged trees: found in the forest, opened from files or built from their layers' tables, shared, given back."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from lazyfs import private
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.schedule import Scheduler
from lazyfs.chunks.single_flight import SingleFlight
from lazyfs.errors import FormatError, StoreBroken, StoreError, TableInvalid
from lazyfs.format import erofs_write
from lazyfs.limits import MAX_TREE_BYTES, MAX_TREES
from lazyfs.log import fields
from lazyfs.mount.filling import Fillings
from lazyfs.mount.forest import Forest, Planted
from lazyfs.mount.prepared import Prepared
from lazyfs.mount.preparing import Preparer
from lazyfs.tree import Tree, tree_key

log = logging.getLogger(__name__)

_THREADS = 4
IMAGE = ".erofs"  # behind a tree's name: its image for the erofs driver


class Planting:
    """Put trees into the forest and take them out again. Belongs to one trio loop; files are left to threads.

    `drop` gives layers back, each as often as it stands in the list. `with_images` tells whether new trees need images
    for the erofs driver: those are made beside them.
    """

    with_images: Callable[[], bool]

    def __init__(
        self,
        directory: Path,
        forest: Forest,
        scheduler: Scheduler,
        fillings: Fillings,
        preparer: Preparer,
        drop: Callable[[list[ServedLayer]], Awaitable[None]],
    ) -> None:
        self._directory = directory
        self._forest = forest
        self._scheduler = scheduler
        self._fillings = fillings
        self._preparer = preparer
        self._drop = drop
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._building: SingleFlight[str, Planted] = SingleFlight()
        self.with_images = lambda: False

    async def plant(self, prepared: list[Prepared]) -> Planted:
        """Return the tree of these layers with one more user. Takes over the layers, unless it raises StoreError."""
        key = tree_key([one.key for one in prepared])
        while True:
            planted = self._forest.find_tree(key.encode())
            if planted is not None:
                planted.users += 1
                await self._drop([one.layer for one in prepared])  # the tree holds its layers already
                return planted
            ours: list[Planted] = []
            await self._building.run(key, partial(self._new_tree, key, prepared, ours))
            if ours:
                return ours[0]

    async def release(self, planted: Planted) -> None:
        """Give a tree back; with its last user it goes, and its layers are given back. A checkpoint."""
        planted.users -= 1
        if planted.users == 0:
            self._forest.uproot(planted)
            await self._drop(list(planted.layers))

    async def _new_tree(self, key: str, prepared: list[Prepared], ours: list[Planted]) -> Planted:
        open_tree = partial(self._open_tree, key, prepared)
        tree, number = await trio.to_thread.run_sync(open_tree, limiter=self._limiter)
        planted = Planted(number, key.encode(), tree, tuple(one.layer for one in prepared), users=1)
        self._forest.plant(planted)
        ours.append(planted)
        for one in prepared:
            # Whoever mounts an image is about to read from it: the first second belongs to that.
            self._scheduler.note_demand(one.layer.host)
            self._fillings.start(one.layer)
        return planted

    def _open_tree(self, key: str, prepared: list[Prepared]) -> tuple[Tree, int]:
        path = self._directory / key
        number = self._preparer.tree_number(key)
        try:
            return self._open_file(path, prepared), number
        except TableInvalid:
            _make_room(self._directory)
        tables = [os.fspath(one.layer.table.path) for one in prepared]
        job = self._tree_job(key, tables)
        if self.with_images():
            try:
                self._preparer.builder.run(job | self._image_job(key, tables))
            except (FormatError, StoreError) as error:  # of the image alone, maybe; whoever wants it is told then
                log.info("no image of the tree for the erofs driver: %s", error, extra=fields(tree=key))
                self._preparer.builder.run(job)
        else:
            self._preparer.builder.run(job)
        try:
            return self._open_file(path, prepared), number
        except TableInvalid:  # cleared away as nobody's, just now
            self._preparer.builder.run(job)
            return self._open_file(path, prepared), number

    def _open_file(self, path: Path, prepared: list[Prepared]) -> Tree:
        """Open a tree. Where the kernel has no image to read names from, we do: they are checked now, and not when one
        is looked up."""
        tree = Tree(path)
        try:
            if not self.with_images():
                tree.ensure_names()
                for one in prepared:
                    one.layer.table.ensure_names()
        except BaseException:
            tree.close()
            raise
        return tree

    def _tree_job(self, key: str, tables: list[str]) -> dict[str, object]:
        return {"tree": {"tables": tables, "out": os.fspath(self._directory / key)}}

    def _image_job(self, key: str, tables: list[str]) -> dict[str, object]:
        tree, out = self._directory / key, self._directory / f"{key}{IMAGE}"
        return {"erofs": {"tables": tables, "tree": os.fspath(tree), "key": key, "out": os.fspath(out)}}

    def ensure_image(self, planted: Planted) -> tuple[Path, list[int]]:
        """Return a tree's image for the erofs driver, checked and made where needed, and its devices in order.

        These are numbers of layers. Blocking, in any thread. Raise StoreError, FormatError.
        """
        key = planted.name.decode()
        path = self._directory / f"{key}{IMAGE}"
        tables = [layer.table for layer in planted.layers]
        try:
            erofs_write.check(path, key)
        except TableInvalid:
            _make_room(self._directory)
            paths = [os.fspath(table.path) for table in tables]
            job = self._image_job(key, paths)
            try:
                self._preparer.builder.run(job)
            except TableInvalid:  # the tree's own file made room for others, or is damaged: we have it mapped
                self._preparer.builder.run(self._tree_job(key, paths) | job)
            erofs_write.check(path, key)
        return path, [planted.layers[place].number for place in erofs_write.device_layers(tables)]


def _make_room(directory: Path) -> None:
    """Make the directory of trees, and drop the oldest files beyond two bounds: they are made again from tables."""
    try:
        private.make_directory(directory)
        files = sorted(_sizes(directory), reverse=True)
        total = 0
        for number, (_, size, path) in enumerate(files):
            total += size
            if number >= MAX_TREES or total > MAX_TREE_BYTES:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreBroken(f"{directory} can't be used: {error.strerror}") from None


def _sizes(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield (time of the last change, bytes, path) of what is there; another thread may be dropping some."""
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            found = path.lstat()
            yield found.st_mtime, found.st_size, path
