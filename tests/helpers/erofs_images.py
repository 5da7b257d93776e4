"""EROFS images of tars, with the data spaces of their layers as files, and the kernel's mount of them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lazyfs.chunks.cut import PieceWriter
from lazyfs.chunks.unpack import Unpacker
from lazyfs.format.erofs_write import device_layers, write_erofs
from lazyfs.format.table import LayerTable
from lazyfs.tree import Tree, build_tree
from lazyfs.units import align

KEY = "0123456789abcdef" * 4
_LIBC = ctypes.CDLL(None, use_errno=True)
_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432  # numbers of system calls, alike everywhere
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_MOVE_EMPTY_PATH = 4
_AT_FDCWD = -100


def unpacked(directory: Path, *tars: bytes) -> tuple[list[LayerTable], list[Path]]:
    """Make each tar's table, and its data space as a file. Base first."""
    tables, spaces = [], []
    for number, tar in enumerate(tars):
        unpacker = Unpacker()
        space = directory / f"data-{number}"
        with open(space, "wb") as handle:
            PieceWriter(handle.fileno()).write(unpacker.feed(tar))
        unpacker.finish()
        unpacker.write_table(directory / f"table-{number}", len(tar))
        tables.append(LayerTable(directory / f"table-{number}"))
        os.truncate(space, align(max(tables[-1].data_size, 1)))
        spaces.append(space)
    return tables, spaces


def image_of(directory: Path, *tars: bytes) -> tuple[Path, list[Path]]:
    """Make the EROFS image of a chain of tars. Return it and its devices."""
    tables, spaces = unpacked(directory, *tars)
    build_tree(directory / "tree", tables)
    tree = Tree(directory / "tree")
    write_erofs(directory / "image", tree, tables, KEY)
    devices = [spaces[place] for place in device_layers(tables)]
    tree.close()
    for table in tables:
        table.close()
    return directory / "image", devices


def _call(number: int, *args: int | bytes | None) -> int:
    found = _LIBC.syscall(number, *(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


@contextmanager
def mounted(image: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
    """Mount an image file with its devices, by the kernel alone."""
    target.mkdir(exist_ok=True)
    context = _call(_FSOPEN, b"erofs", 0)
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(image), 0)
        for device in devices:
            _call(_FSCONFIG, context, _SET_STRING, b"device", os.fsencode(device), 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
        try:
            _call(_FSCONFIG, context, _CREATE, None, None, 0)
        except OSError as error:
            raise OSError(error.errno, os.read(context, 4096).decode()) from None
        mount = _call(_FSMOUNT, context, 0, 0)
    finally:
        os.close(context)
    try:
        _call(_MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _MOVE_EMPTY_PATH)
    finally:
        os.close(mount)
    try:
        yield target
    finally:
        if _LIBC.umount2(os.fsencode(target), 0) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
