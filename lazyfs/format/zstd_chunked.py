"""zstd:chunked, stargz's variant: the tail behind a layer's frames, both ways.

    zstd frames … | skippable frame: the TOC as one zstd frame | skippable frame: 40 bytes of footer

A plain zstd decoder skips both skippable frames, so the layer unpacks everywhere. Source: specs/estargz.md section 7.
"""

from __future__ import annotations

import zstandard

from lazyfs import digest as digests
from lazyfs.errors import FooterInvalid, FrameInvalid, TocInvalid
from lazyfs.format.codec import FrameDecoder
from lazyfs.format.footer import (
    SKIPPABLE,
    SKIPPABLE_HEADER,
    STARGZ_BODY,
    STARGZ_MAGIC,
    TOC_TYPE,
    Footer,
    check_toc_range,
)
from lazyfs.limits import MAX_TOC
from lazyfs.oci import TOC_DIGEST, ZSTD_CHECKSUM, ZSTD_POSITION

FOOTER_SIZE = SKIPPABLE_HEADER + STARGZ_BODY.size  # 48 bytes


def _skippable(body: bytes) -> bytes:
    return SKIPPABLE + len(body).to_bytes(4, "little") + body


def encode_tail(toc_json: bytes, blob_offset: int, level: int) -> tuple[bytes, dict[str, str]]:
    """Return what follows a layer's frames, and the annotations that its descriptor needs.

    `blob_offset` is the end of the frames. Pure; blocks for the compression of the TOC. The annotations root the trust:
    TOC_DIGEST (of the JSON), ZSTD_CHECKSUM (of the compressed TOC) and ZSTD_POSITION. Raise TocInvalid when the TOC is
    larger than any reader takes.
    """
    if len(toc_json) > MAX_TOC:
        raise TocInvalid(f"a TOC of {len(toc_json)} bytes is more than the {MAX_TOC} that readers take")
    packed = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(toc_json)
    toc_offset = blob_offset + SKIPPABLE_HEADER
    footer = STARGZ_BODY.pack(toc_offset, len(packed), len(toc_json), TOC_TYPE, STARGZ_MAGIC)
    annotations = {
        TOC_DIGEST: digests.of(toc_json),
        ZSTD_CHECKSUM: digests.of(packed),
        ZSTD_POSITION: f"{toc_offset}:{len(packed)}:{len(toc_json)}:{TOC_TYPE}",
    }
    return _skippable(packed) + _skippable(footer), annotations


def parse_position(text: str, blob_size: int) -> tuple[int, int, int]:
    """Return (TOC's blob offset, compressed size, raw size) of a ZSTD_POSITION annotation. Raise FooterInvalid."""
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise FooterInvalid(f"the annotation {ZSTD_POSITION} is {text[:100]!r}, not four numbers")
    toc_offset, toc_size, toc_raw_size, toc_type = map(int, parts)
    if toc_type != TOC_TYPE:
        raise FooterInvalid(f"the annotation {ZSTD_POSITION} names a TOC of type {toc_type}, not {TOC_TYPE}")
    check_toc_range(toc_offset, toc_size, blob_size - FOOTER_SIZE, f"annotation {ZSTD_POSITION}")
    return toc_offset, toc_size, toc_raw_size


def decode_toc(header: bytes, packed: bytes, footer: Footer) -> bytes:
    """Return the JSON of a TOC. `header` is the skippable header before it, `packed` its compressed bytes.

    Pure; blocks for the decompression, bounded by MAX_TOC. Raise TocInvalid or FooterInvalid. Nothing is verified here
    but the sizes: the caller holds the digests.
    """
    if header != SKIPPABLE + footer.toc_size.to_bytes(4, "little"):
        raise FooterInvalid(f"the TOC at {footer.toc_offset} is not in a skippable frame of its size")
    if max(footer.toc_size, footer.toc_raw_size) > MAX_TOC:
        raise TocInvalid(
            f"the TOC has {max(footer.toc_size, footer.toc_raw_size)} bytes, more than the {MAX_TOC} allowed"
        )
    try:
        raw = FrameDecoder().decode(packed, MAX_TOC)
    except FrameInvalid as error:
        raise TocInvalid(f"the TOC can't be decompressed: {error}") from None
    if len(raw) != footer.toc_raw_size:
        raise TocInvalid(f"the TOC decompresses to {len(raw)} bytes, and its footer claims {footer.toc_raw_size}")
    return raw
