"""Whether a layer can be read lazily, and its TOC: from the descriptor's claims to verified JSON.

One row in `_FORMS` a form of blob that is read; a further form is a file beside `zstd_chunked` and a row here.
Source: specs/estargz.md sections 0, 5 and 9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import FooterInvalid, TocInvalid
from lazyfs.format import zstd_chunked
from lazyfs.format.footer import MAX_FOOTER, SKIPPABLE_HEADER, Footer, Form, parse_footer
from lazyfs.format.toc_json import MAX_TOC
from lazyfs.units import MiB

TAIL = MiB  # bytes fetched first when nothing tells where the TOC is; holds most TOCs
_MAX_TAIL = MAX_TOC + 2 * MiB  # bytes; a TOC, its headers, and what other writers put between it and the footer
_ZSTD_TYPES = frozenset({oci.OCI_LAYER_ZSTD})
_GZIP_TYPES = frozenset({oci.OCI_LAYER_GZIP, oci.DOCKER_LAYER_GZIP})


@dataclass(frozen=True, slots=True)
class NotLazy:
    """Why a layer is not read lazily: a clause that fits behind "layer … is fetched whole: "."""

    reason: str


@dataclass(frozen=True, slots=True)
class TocSource:
    """Where a layer's TOC is and what proves it. Offsets and sizes in blob space.

    [blob_offset, blob_offset + size) is the tail to fetch; it ends with the blob. `toc_offset` is -1 when only the
    footer tells it. `toc_digest` is of the JSON, `checksum` of the compressed TOC; "" where the descriptor has none.
    """

    blob_digest: str
    blob_size: int
    blob_offset: int
    size: int
    toc_offset: int
    toc_size: int
    toc_raw_size: int
    toc_digest: str
    checksum: str

    @property
    def verified(self) -> bool:
        """Whether any digest roots the trust in this TOC."""
        return bool(self.toc_digest or self.checksum)


@dataclass(frozen=True, slots=True)
class Toc:
    """A TOC that was verified: its JSON, the form of the blob, and where the blob's last frame ends (blob space)."""

    raw: bytes
    form: Form
    payload_end: int


_Decode = Callable[[bytes, bytes, Footer], bytes]
# Form -> (decode the TOC, bytes of the frame header before it).
_FORMS: dict[Form, tuple[_Decode, int]] = {Form.ZSTD_CHUNKED: (zstd_chunked.decode_toc, SKIPPABLE_HEADER)}
# Forms whose TOC can never be trusted, or isn't in the blob; the others without a row are not read yet.
_REFUSED = {
    Form.LEGACY_STARGZ: "it has no digests that could be verified",
    Form.EXTERNAL_TOC: "its TOC is in another image",
}


def toc_source(layer: oci.Descriptor, *, allow_unverified: bool = False) -> TocSource | NotLazy:
    """Decide from a layer's descriptor whether it has a TOC that we read. Pure: nothing is fetched.

    `allow_unverified` accepts a layer whose TOC no digest vouches for. Never raises: a descriptor that contradicts
    itself is NotLazy too, with the reason.
    """
    told = layer.annotations
    if layer.media_type not in _ZSTD_TYPES:
        if layer.media_type in _GZIP_TYPES and oci.TOC_DIGEST in told:
            return NotLazy("eStargz is not read yet")
        return NotLazy(f"a layer of type {layer.media_type[:100] or 'unknown'} has no TOC")
    ours = {oci.ZSTD_CHECKSUM, oci.ZSTD_POSITION} & told.keys()
    github = {oci.GITHUB_ZSTD_CHECKSUM, oci.GITHUB_ZSTD_POSITION} & told.keys()
    if github and (ours or oci.TOC_DIGEST in told):
        return NotLazy("it carries the annotations of both kinds of zstd:chunked, which can't both be true")
    if github:
        return NotLazy("zstd:chunked of containers/storage is not read yet")
    toc_digest, checksum = told.get(oci.TOC_DIGEST, ""), told.get(oci.ZSTD_CHECKSUM, "")
    for name, value in ((oci.TOC_DIGEST, toc_digest), (oci.ZSTD_CHECKSUM, checksum)):
        if value and not digests.is_digest(value):
            return NotLazy(f"its annotation {name} is not a sha256 digest")
    if not toc_digest and not checksum:
        if not allow_unverified:
            return NotLazy("it has no TOC, or no digest for one" if not ours else "no digest vouches for its TOC")
        if layer.size < zstd_chunked.FOOTER_SIZE:
            return NotLazy("it is too small to have a TOC")
    toc_offset, toc_size, toc_raw_size = -1, 0, -1
    start = max(layer.size - TAIL, 0)
    if position := told.get(oci.ZSTD_POSITION):
        try:
            toc_offset, toc_size, toc_raw_size = zstd_chunked.parse_position(position, layer.size)
        except FooterInvalid as error:
            return NotLazy(error.message)
        start = toc_offset - SKIPPABLE_HEADER
        if start < 0 or layer.size - start > _MAX_TAIL or max(toc_size, toc_raw_size) > MAX_TOC:
            return NotLazy(f"its TOC has {max(toc_size, toc_raw_size)} bytes, more than the {MAX_TOC} allowed")
    return TocSource(
        layer.digest, layer.size, start, layer.size - start, toc_offset, toc_size, toc_raw_size, toc_digest, checksum
    )


def read_toc(source: TocSource, fetch: Callable[[int, int], bytes]) -> Toc:
    """Fetch, locate, decompress and verify a TOC.

    `fetch(blob_offset, size)` returns exactly that range of the blob; it is called once with the source's own range,
    and once more when the footer puts the TOC before it. Blocks as `fetch` does, and for the decompression. At most
    MAX_TOC bytes compressed and decompressed. Raise FooterInvalid or TocInvalid for a malformed tail (a layer without
    any TOC, too, when `allow_unverified` let one through), DigestMismatch for one that is not as promised.
    """
    tail = _fetch(fetch, source.blob_offset, source.size)
    footer = parse_footer(tail[-MAX_FOOTER:], source.blob_size)
    row = _FORMS.get(footer.form)
    if row is None:
        why = _REFUSED.get(footer.form, "this form is not read yet")
        raise FooterInvalid(f"the blob ends with the footer of {footer.form.value}: {why}")
    decode, header_size = row
    told = (source.toc_offset, source.toc_size, source.toc_raw_size)
    if source.toc_offset >= 0 and told != (footer.toc_offset, footer.toc_size, footer.toc_raw_size):
        raise FooterInvalid(f"the descriptor puts the TOC at {source.toc_offset}, the footer at {footer.toc_offset}")
    start = footer.toc_offset - header_size
    if start < 0 or source.blob_size - start > _MAX_TAIL or max(footer.toc_size, footer.toc_raw_size) > MAX_TOC:
        raise TocInvalid(f"the TOC has {footer.toc_size} bytes, more than the {MAX_TOC} allowed")
    if start < source.blob_offset:
        tail = _fetch(fetch, start, source.blob_offset - start) + tail
    else:
        tail = tail[start - source.blob_offset :]
    packed = tail[header_size : header_size + footer.toc_size]
    what = f"the TOC of layer {source.blob_digest}"
    if source.checksum:
        digests.check(packed, source.checksum, f"{what}, compressed,")
    raw = decode(tail[:header_size], packed, footer)
    if source.toc_digest:
        digests.check(raw, source.toc_digest, what)
    return Toc(raw, footer.form, start)


def _fetch(fetch: Callable[[int, int], bytes], blob_offset: int, size: int) -> bytes:
    data = fetch(blob_offset, size)
    if len(data) != size:
        raise FooterInvalid(f"{len(data)} bytes came instead of the blob's last {size}")
    return data
