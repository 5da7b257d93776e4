"""A blob's last bytes: which form of layer it is, told by content, and where its TOC lies.

Source: specs/estargz.md section 0, byte layouts in sections 1, 7 and 8. A media type or an annotation may claim
anything; the footer is what other readers go by, so it is recognised for every form in the field, those that we do
not read included, and a refusal can name its reason.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from lazyfs.errors import FooterInvalid

MAX_FOOTER = 72  # bytes; the longest of all forms, skippable header included
SKIPPABLE = b"\x50\x2a\x4d\x18"  # magic of a zstd skippable frame; its u32 little-endian size follows
SKIPPABLE_HEADER = 8  # bytes
STARGZ_MAGIC = b"GnUlInUx"
STORAGE_MAGIC = b"GNUlInUx"
TOC_TYPE = 1  # the only kind of TOC that zstd:chunked knows
STARGZ_BODY = struct.Struct("<QQQQ8s")  # TOC's offset, compressed size, raw size, type; magic
STORAGE_BODY = struct.Struct("<QQQQQQQ8s")  # the same, then the tar-split's offset and sizes; magic

_GZIP = re.escape(bytes.fromhex("1f8b080400000000 00ff"))  # a member with an extra field, no time, unknown OS
_GZIP_END = re.escape(bytes.fromhex("010000ffff 0000000000000000"))  # an empty final block, CRC and size of nothing
_ESTARGZ = re.compile(_GZIP + rb"\x1a\0SG\x16\0([0-9a-f]{16})STARGZ" + _GZIP_END, re.DOTALL)
_LEGACY = re.compile(_GZIP + rb"\x16\0([0-9a-f]{16})STARGZ" + _GZIP_END, re.DOTALL)
_EXTERNAL = re.compile(_GZIP + rb"\x15\0SG\x11\0STARGZEXTERNALTOC" + _GZIP_END, re.DOTALL)


class Form(Enum):
    """The kinds of footer in the field."""

    ESTARGZ = "eStargz"
    LEGACY_STARGZ = "legacy stargz (CRFS)"
    EXTERNAL_TOC = "eStargz with an external TOC"
    ZSTD_CHUNKED = "zstd:chunked"
    STORAGE_ZSTD_CHUNKED = "zstd:chunked of containers/storage"


@dataclass(frozen=True, slots=True)
class Footer:
    """Where a blob's TOC is. Offsets in blob space, sizes in bytes.

    `toc_offset` is the first byte of the compressed TOC itself; -1 in a form that keeps its TOC elsewhere.
    `toc_raw_size` is -1 where the form does not tell it. `footer_size` counts the footer's own header too.
    """

    form: Form
    toc_offset: int
    toc_size: int
    toc_raw_size: int
    footer_size: int


def _gzip_footer(pattern: re.Pattern[bytes], form: Form) -> Callable[[bytes, int], Footer | None]:
    def parse(last: bytes, blob_size: int) -> Footer | None:
        size = 46 if form is Form.EXTERNAL_TOC else 47 if form is Form.LEGACY_STARGZ else 51
        match = pattern.fullmatch(last[-size:])
        if match is None:
            return None
        if form is Form.EXTERNAL_TOC:
            return Footer(form, -1, 0, -1, size)
        offset = int(match[1], 16)
        return Footer(form, offset, blob_size - size - offset, -1, size)

    return parse


def _zstd_footer(body: struct.Struct, magic: bytes, form: Form) -> Callable[[bytes, int], Footer | None]:
    def parse(last: bytes, blob_size: int) -> Footer | None:
        size = SKIPPABLE_HEADER + body.size
        if last[-size : -body.size] != SKIPPABLE + body.size.to_bytes(4, "little") or last[-8:] != magic:
            return None
        toc_offset, toc_size, toc_raw_size, toc_type = body.unpack(last[-body.size :])[:4]
        if toc_type != TOC_TYPE:
            raise FooterInvalid(f"the footer names a TOC of type {toc_type}, not {TOC_TYPE}")
        return Footer(form, toc_offset, toc_size, toc_raw_size, size)

    return parse


_PARSERS: tuple[Callable[[bytes, int], Footer | None], ...] = (
    _zstd_footer(STARGZ_BODY, STARGZ_MAGIC, Form.ZSTD_CHUNKED),
    _zstd_footer(STORAGE_BODY, STORAGE_MAGIC, Form.STORAGE_ZSTD_CHUNKED),
    _gzip_footer(_ESTARGZ, Form.ESTARGZ),
    _gzip_footer(_LEGACY, Form.LEGACY_STARGZ),
    _gzip_footer(_EXTERNAL, Form.EXTERNAL_TOC),
)


def parse_footer(last: bytes, blob_size: int) -> Footer:
    """Recognise the footer at the end of `last`, a blob's final bytes (MAX_FOOTER or more, or the whole blob).

    Pure. The TOC it names lies inside the blob and before the footer. Raise FooterInvalid when no form matches, or when
    the numbers in it can't be.
    """
    if len(last) > blob_size:
        raise FooterInvalid(f"{len(last)} bytes are no end of a blob of {blob_size}")
    for parse in _PARSERS:
        footer = parse(last, blob_size)
        if footer is not None:
            break
    else:
        raise FooterInvalid("the blob's last bytes are no footer of eStargz or zstd:chunked")
    if footer.form is not Form.EXTERNAL_TOC:
        check_toc_range(footer.toc_offset, footer.toc_size, blob_size - footer.footer_size, "footer")
    return footer


def check_toc_range(toc_offset: int, toc_size: int, end: int, teller: str) -> None:
    """Raise FooterInvalid unless [toc_offset, toc_offset + toc_size) is not empty and ends by `end` (blob space)."""
    if toc_offset < 0 or toc_size <= 0 or toc_offset + toc_size > end:
        raise FooterInvalid(f"the {teller} puts {toc_size} bytes of TOC at {toc_offset}, outside of the blob")
