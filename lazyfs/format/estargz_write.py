"""eStargz written: the end of the tar, which holds the TOC, and the footer.

    gzip members … | member: `stargz.index.json` as a tar entry, end of the tar | footer member, 51 bytes

Source: specs/estargz.md section 1.
"""

from __future__ import annotations

from lazyfs.format.entry import TOC_NAME
from lazyfs.format.tar_headers import BLOCK, HEADER, pad

_FOOTER_HEADER = bytes.fromhex("1f8b08040000000000ff1a0053471600")
_FOOTER_END = b"STARGZ" + bytes.fromhex("010000ffff0000000000000000")


def toc_member(toc_json: bytes) -> bytes:
    """Return the end of a layer's tar, uncompressed: the TOC's entry and two blocks of zeros. Pure."""
    size = len(toc_json)
    rest = b"ustar\x0000"
    numbers = b"0000644\x000000000\x000000000\x00"
    fields = [TOC_NAME, numbers, b"%011o\0" % size, b"%011o\0" % 0, b" " * 8, b"0", b"", rest, b""]
    fields[4] = b"%06o\0 " % sum(HEADER.pack(*fields))
    return HEADER.pack(*fields) + toc_json + bytes(pad(size) + 2 * BLOCK)


def footer(toc_offset: int) -> bytes:
    """Return the footer: a gzip member of nothing, whose extra field tells the TOC member's blob offset. Pure."""
    return _FOOTER_HEADER + b"%016x" % toc_offset + _FOOTER_END
