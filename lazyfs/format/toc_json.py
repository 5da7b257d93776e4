"""The TOC as JSON: its elements, their names, and the bounds that every reader and writer holds.

Source: specs/estargz.md section 2.

Three fields are our own, and other readers pass them by: JSON holds no bytes that aren't UTF-8, so `nameRaw` and
`linkNameRaw` (base64) stand beside a `name` or `linkName` that is written with U+FFFD; `xattrsRaw` does the same
for names of extended attributes (base64 of name to base64 of value).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lazyfs.format.entry import Kind
from lazyfs.units import MiB

HOLE = 4 * MiB  # bytes; a larger chunk of zeros is read in pieces of this size
MIN_HOLE = 1024  # bytes; writers call no shorter run of zeros a hole
MAX_ID = 0xFFFFFFFE  # chown(2) takes -1 for "leave it"
MAX_MAJOR, MAX_MINOR = 0xFFF, 0xFFFFF  # what a Linux dev_t holds

LOST = "\ufffd"  # stands in a name for bytes that JSON can't hold

KINDS = {
    "dir": Kind.DIR,
    "reg": Kind.REG,
    "symlink": Kind.SYMLINK,
    "hardlink": Kind.HARDLINK,
    "char": Kind.CHAR,
    "block": Kind.BLOCK,
    "fifo": Kind.FIFO,
}
_Type = Literal["dir", "reg", "symlink", "hardlink", "char", "block", "fifo", "chunk"]
TYPE_OF: dict[Kind, _Type] = {
    Kind.DIR: "dir",
    Kind.REG: "reg",
    Kind.SYMLINK: "symlink",
    Kind.HARDLINK: "hardlink",
    Kind.CHAR: "char",
    Kind.BLOCK: "block",
    Kind.FIFO: "fifo",
}
_Int = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class TocItem(msgspec.Struct, omit_defaults=True, rename="camel", gc=False):
    """One element of `entries`, in the order in which fields are written."""

    name: str
    type: _Type
    name_raw: bytes | None = None
    size: _Int = 0
    modtime: str = ""
    link_name: str = ""
    link_name_raw: bytes | None = None
    mode: _Int = 0
    uid: _Int = 0
    gid: _Int = 0
    user_name: str = ""
    group_name: str = ""
    dev_major: _Int = 0
    dev_minor: _Int = 0
    xattrs: dict[str, bytes | None] | None = None
    xattrs_raw: dict[str, bytes] | None = None
    digest: str = ""
    offset: _Int = 0
    end_offset: _Int = 0  # containers/storage: behind the file's last frame
    inner_offset: _Int = 0
    chunk_offset: _Int = 0
    chunk_size: _Int = 0
    chunk_digest: str = ""
    chunk_type: str = ""


class TocDocument(msgspec.Struct):
    version: int
    entries: list[TocItem]


class TocOutline(msgspec.Struct):
    """A document whose entries are left as JSON."""

    version: int
    entries: msgspec.Raw


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
