"""eStargz: the TOC in a gzip blob.

    gzip members … | member at the footer's offset: `stargz.index.json` as a tar entry, end of the tar | footer member

Everything is gzip, so the whole blob unpacks to one tar, the TOC's own entry in it. Source: specs/estargz.md section 1.
"""

from __future__ import annotations

from lazyfs.errors import FrameInvalid, TarInvalid, TocInvalid
from lazyfs.format.entry import TOC_NAME, Kind
from lazyfs.format.footer import Footer
from lazyfs.format.members import MemberStream
from lazyfs.format.tar import TarScanner
from lazyfs.limits import MAX_TOC, MAX_TOC_HEADERS

FOOTER_SIZE = 51  # bytes


def decode_toc(header: bytes, packed: bytes, footer: Footer) -> bytes:
    """Return the JSON of a TOC. `header` is empty, `packed` all that lies between the last payload and the footer.

    Pure; blocks for the decompression, bounded by MAX_TOC. What follows the JSON is not looked at: the whole check does
    that. Raise TocInvalid. Nothing is verified here: the caller holds the digest.
    """
    scanner = TarScanner()
    start = size = -1
    out = bytearray()
    try:
        for piece in MemberStream().feed(packed):
            if start < 0:
                items = scanner.feed(piece)
                if items:
                    first = items[0]
                    if first.entry.path != TOC_NAME or first.entry.kind is not Kind.REG or first.sparse is not None:
                        raise TocInvalid(f"{first.entry.path[:200]!r} stands where the footer puts the TOC")
                    start, size = first.payload, first.stored
                    if size > MAX_TOC:
                        raise TocInvalid(f"the TOC has {size} bytes, more than the {MAX_TOC} allowed")
                elif len(out) > MAX_TOC_HEADERS:
                    raise TocInvalid("no tar entry begins where the footer puts the TOC")
            out += piece
            if start >= 0 and len(out) >= start + size:
                return bytes(memoryview(out)[start : start + size])
    except FrameInvalid as error:
        raise TocInvalid(f"the TOC can't be decompressed: {error}") from None
    except TarInvalid as error:
        raise TocInvalid(f"the TOC is in no tar entry: {error}") from None
    raise TocInvalid("the TOC ends early")
