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
from lazyfs.format import estargz, storage_chunked, zstd_chunked
from lazyfs.format.footer import MAX_FOOTER, SKIPPABLE_HEADER, Footer, Form, parse_footer
from lazyfs.format.table import FORM_ESTARGZ, FORM_STORAGE_ZSTD, FORM_ZSTD_CHUNKED
from lazyfs.limits import MAX_TOC
from lazyfs.units import MiB

TAIL = MiB  # bytes fetched first when nothing tells where the TOC is; holds most TOCs
_MAX_TAIL = MAX_TOC + 2 * MiB  # bytes; a TOC, its headers, and what other writers put between it and the footer
_ZSTD_TYPES = frozenset({oci.OCI_LAYER_ZSTD})
_GZIP_TYPES = frozenset({oci.OCI_LAYER_GZIP, oci.DOCKER_LAYER_GZIP})
_SMALLEST = {
    Form.ZSTD_CHUNKED: zstd_chunked.FOOTER_SIZE,
    Form.STORAGE_ZSTD_CHUNKED: storage_chunked.FOOTER_SIZE,
    Form.ESTARGZ: estargz.FOOTER_SIZE,
}


@dataclass(frozen=True, slots=True)
class NotLazy:
    """Why a layer is not read lazily: a clause that fits behind "layer … is fetched whole: "."""

    reason: str


@dataclass(frozen=True, slots=True)
class TocSource:
    """Where a layer's TOC is and what proves it. Offsets and sizes in blob space.

    [blob_offset, blob_offset + size) is what to fetch: the tail of the blob, or, where the descriptor says all that a
    footer would, the TOC alone. `toc_offset` is -1 when only the footer tells it. `toc_digest` is of the JSON,
    `checksum` of the compressed TOC; "" where the descriptor has none. `form` is what the descriptor speaks of; the
    footer decides.
    """

    form: Form

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
_FORMS: dict[Form, tuple[_Decode, int]] = {
    Form.ZSTD_CHUNKED: (zstd_chunked.decode_toc, SKIPPABLE_HEADER),
    Form.STORAGE_ZSTD_CHUNKED: (storage_chunked.decode_toc, SKIPPABLE_HEADER),
    Form.ESTARGZ: (estargz.decode_toc, 0),
}
TABLE_FORMS = {
    Form.ZSTD_CHUNKED: FORM_ZSTD_CHUNKED,
    Form.STORAGE_ZSTD_CHUNKED: FORM_STORAGE_ZSTD,
    Form.ESTARGZ: FORM_ESTARGZ,
}
# Forms whose TOC can never be trusted, or isn't in the blob.
_REFUSED = {
    Form.LEGACY_STARGZ: "its TOC has no digests that could be verified",
    Form.EXTERNAL_TOC: "its TOC is in another image",
}


def toc_source(layer: oci.Descriptor, *, allow_unverified: bool = False) -> TocSource | NotLazy:
    """Decide from a layer's descriptor whether it has a TOC that we read. Pure: nothing is fetched.

    `allow_unverified` accepts a layer whose TOC no digest vouches for. Never raises: a descriptor that contradicts
    itself is NotLazy too, with the reason.
    """
    told = layer.annotations
    gzip = layer.media_type in _GZIP_TYPES
    if not gzip and layer.media_type not in _ZSTD_TYPES:
        return NotLazy(f"a layer of type {layer.media_type[:100] or 'unknown'} has no TOC")
    toc_digest = told.get(oci.TOC_DIGEST, "")
    ours = told.get(oci.ZSTD_CHECKSUM, ""), told.get(oci.ZSTD_POSITION, "")
    github = told.get(oci.GITHUB_ZSTD_CHECKSUM, ""), told.get(oci.GITHUB_ZSTD_POSITION, "")
    # Equal annotations of both kinds speak of one TOC, for older and newer readers of containers/storage.
    if any(github) and (toc_digest or (any(ours) and ours != github)):
        return NotLazy("it carries the annotations of both kinds of zstd:chunked, which can't both be true")
    if gzip:
        form, checksum, position = Form.ESTARGZ, "", ""
        if not toc_digest and (any(ours) or any(github)):
            return NotLazy("its annotations are those of zstd:chunked, and its type is gzip")
    else:
        form = Form.STORAGE_ZSTD_CHUNKED if any(github) else Form.ZSTD_CHUNKED
        checksum, position = github if any(github) else ours
    names = {oci.TOC_DIGEST: toc_digest, oci.GITHUB_ZSTD_CHECKSUM if any(github) else oci.ZSTD_CHECKSUM: checksum}
    for name, value in names.items():
        if value and not digests.is_digest(value):
            return NotLazy(f"its annotation {name} is not a sha256 digest")
    if not toc_digest and not checksum:
        if not allow_unverified:
            return NotLazy("no digest vouches for its TOC" if position else "it has no TOC, or no digest for one")
        if layer.size < _SMALLEST[form]:
            return NotLazy("it is too small to have a TOC")
    toc_offset, toc_size, toc_raw_size = -1, 0, -1
    start, stop = max(layer.size - TAIL, 0), layer.size
    if position:
        try:
            toc_offset, toc_size, toc_raw_size = zstd_chunked.parse_position(position, layer.size)
        except FooterInvalid as error:
            return NotLazy(error.message)
        start = toc_offset - SKIPPABLE_HEADER
        if any(github) and checksum:
            stop = toc_offset + toc_size  # behind it lies the tar-split, of no use to us and perhaps as long again
        if start < 0 or stop - start > _MAX_TAIL or max(toc_size, toc_raw_size) > MAX_TOC:
            return NotLazy(f"its TOC has {max(toc_size, toc_raw_size)} bytes, more than the {MAX_TOC} allowed")
    return TocSource(
        form, layer.digest, layer.size, start, stop - start, toc_offset, toc_size, toc_raw_size, toc_digest, checksum
    )


def refusal(last: bytes, blob_size: int) -> str:
    """Return why a layer that ends with these bytes (MAX_FOOTER, or the whole blob) can't be lazy by its form.

    "" when its form is none of the refused ones. Pure.
    """
    try:
        footer = parse_footer(last, blob_size)
    except FooterInvalid:
        return ""
    return _refusal(footer.form)


def _refusal(form: Form) -> str:
    return f"it is {form.value}: {_REFUSED[form]}" if form in _REFUSED else ""


def read_toc(source: TocSource, fetch: Callable[[int, int], bytes]) -> Toc | NotLazy:
    """Fetch, locate, decompress and verify a TOC.

    `fetch(blob_offset, size)` returns exactly that range of the blob; it is called once with the source's own range,
    and once more when the footer puts the TOC before it. Blocks as `fetch` does, and for the decompression. At most
    MAX_TOC bytes compressed and decompressed. Return NotLazy for a form whose TOC can't be used. Raise FooterInvalid or
    TocInvalid for a malformed tail (a layer without any TOC, too, when `allow_unverified` let one through),
    DigestMismatch for one that is not as promised.
    """
    tail = _fetch(fetch, source.blob_offset, source.size)
    if source.blob_offset + source.size < source.blob_size:
        footer = storage_chunked.told_footer(source.toc_offset, source.toc_size, source.toc_raw_size)
    else:
        footer = parse_footer(tail[-MAX_FOOTER:], source.blob_size)
    if why := _refusal(footer.form):
        return NotLazy(why)
    decode, header_size = _FORMS[footer.form]
    told = (source.toc_offset, source.toc_size, source.toc_raw_size)
    if source.toc_offset >= 0 and told != (footer.toc_offset, footer.toc_size, footer.toc_raw_size):
        raise FooterInvalid(f"the descriptor puts the TOC at {source.toc_offset}, the footer at {footer.toc_offset}")
    start = footer.toc_offset - header_size
    if start < 0 or source.blob_offset - start > _MAX_TAIL or max(footer.toc_size, footer.toc_raw_size) > MAX_TOC:
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
