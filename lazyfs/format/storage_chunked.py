"""zstd:chunked, containers/storage's variant: what podman, buildah and skopeo write.

    zstd frames … | skippable frame: the TOC | skippable frame: tar-split | skippable frame: 64 bytes of footer

Its own readers go by the annotations and never look at the footer. The tar-split, from which they make the tar's
headers again, is of no use to us. Source: specs/estargz.md sections 8 and 10.
"""

from __future__ import annotations

from lazyfs.format.footer import SKIPPABLE_HEADER, STORAGE_BODY, Footer, Form
from lazyfs.format.zstd_chunked import decode_toc

__all__ = ["FOOTER_SIZE", "decode_toc", "told_footer"]

FOOTER_SIZE = SKIPPABLE_HEADER + STORAGE_BODY.size  # 72 bytes


def told_footer(toc_offset: int, toc_size: int, toc_raw_size: int) -> Footer:
    """Return what the footer says, as a GITHUB_ZSTD_POSITION annotation tells it: its readers need no other. Pure."""
    return Footer(Form.STORAGE_ZSTD_CHUNKED, toc_offset, toc_size, toc_raw_size, 0)
