"""zstd:chunked from descriptor to TOC: what is lazy and why not, and that no byte of the tail is taken on trust."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.errors import DigestMismatch, FooterInvalid, FormatError, TocInvalid, TrustError
from lazyfs.format import zstd_chunked
from lazyfs.format.footer import MAX_FOOTER, STARGZ_BODY, STARGZ_MAGIC, Form, parse_footer
from lazyfs.format.lazy import TAIL, NotLazy, Toc, TocSource, refusal, toc_source
from lazyfs.format.lazy import read_toc as read_any
from lazyfs.format.toc import parse_toc
from lazyfs.limits import MAX_TOC
from tests.helpers.blobs import LayerBlob, annotated, flipped, without_sparse, zstd_chunked_layer
from tests.helpers.odd import odd_tar
from tests.helpers.tars import file, tar_of
from tests.unit.test_footer import estargz, external, legacy, storage_zstd

SMALL = zstd_chunked_layer(tar_of(file("a", b"x" * 5000), file("b", b"y")), frame_size=0)


def source_of(layer: LayerBlob, *, allow_unverified: bool = False) -> TocSource:
    source = toc_source(layer.descriptor, allow_unverified=allow_unverified)
    assert isinstance(source, TocSource), source
    return source


def read_toc(source: TocSource, fetch: Callable[[int, int], bytes]) -> Toc:
    toc = read_any(source, fetch)
    assert isinstance(toc, Toc), toc.reason
    return toc


def why_not(layer: LayerBlob) -> str:
    source = toc_source(layer.descriptor)
    assert isinstance(source, NotLazy)
    return source.reason


def test_a_whole_layer_is_found_from_its_descriptor_in_one_fetch() -> None:
    layer = zstd_chunked_layer(without_sparse(odd_tar()))
    source = source_of(layer)
    asked: list[tuple[int, int]] = []

    def fetch(blob_offset: int, size: int) -> bytes:
        asked.append((blob_offset, size))
        return layer.fetch(blob_offset, size)

    toc = read_toc(source, fetch)
    assert (toc.raw, toc.form, toc.payload_end) == (layer.toc, Form.ZSTD_CHUNKED, layer.payload_end)
    assert asked == [(layer.payload_end, len(layer.tail))]
    assert [entry for entry, _ in parse_toc(toc.raw, toc.payload_end)] == [entry for entry, _ in layer.pairs]
    assert source.verified


def test_a_plain_decoder_sees_the_tar_and_nothing_else() -> None:
    for layer in (SMALL, zstd_chunked_layer(without_sparse(odd_tar()))):
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(layer.blob), read_across_frames=True)
        with reader:
            assert reader.read() == layer.tar
        assert digests.of(layer.tar) == layer.diff_id


def test_the_annotations_are_those_of_the_format() -> None:
    tail, told = zstd_chunked.encode_tail(b'{"version":1,"entries":[]}', 1000, 3)
    offset, size, raw, kind = map(int, told[oci.ZSTD_POSITION].split(":"))
    assert (offset, raw, kind) == (1008, 26, 1)
    packed = tail[8 : 8 + size]
    assert told[oci.ZSTD_CHECKSUM] == digests.of(packed)
    assert told[oci.TOC_DIGEST] == digests.of(b'{"version":1,"entries":[]}')
    assert tail[8 + size :] == b"\x50\x2a\x4d\x18\x28\0\0\0" + STARGZ_BODY.pack(offset, size, raw, 1, STARGZ_MAGIC)
    assert parse_footer(tail, 1000 + len(tail)).toc_offset == 1008


def test_a_toc_that_no_reader_takes_is_not_written() -> None:
    with pytest.raises(TocInvalid):
        zstd_chunked.encode_tail(bytes(MAX_TOC + 1), 0, 1)


def test_without_the_position_the_footer_tells_it() -> None:
    layer = annotated(SMALL, ZSTD_POSITION=None)
    source = source_of(layer)
    assert (source.blob_offset, source.size) == (0, len(layer.blob))
    assert read_toc(source, layer.fetch).raw == layer.toc


def test_a_toc_larger_than_the_first_tail_takes_a_second_fetch() -> None:
    entries = [file(f"file-{number:06}", b"%d" % number) for number in range(30_000)]
    layer = annotated(zstd_chunked_layer(tar_of(*entries), level=1), ZSTD_POSITION=None)
    assert len(layer.tail) > TAIL
    asked: list[tuple[int, int]] = []

    def fetch(blob_offset: int, size: int) -> bytes:
        asked.append((blob_offset, size))
        return layer.fetch(blob_offset, size)

    assert read_toc(source_of(layer), fetch).raw == layer.toc
    start = len(layer.blob) - TAIL
    assert asked == [(start, TAIL), (layer.payload_end, start - layer.payload_end)]


@pytest.mark.parametrize("kept", ["TOC_DIGEST", "ZSTD_CHECKSUM"])
def test_either_digest_roots_the_trust(kept: str) -> None:
    other = {"TOC_DIGEST": "ZSTD_CHECKSUM", "ZSTD_CHECKSUM": "TOC_DIGEST"}[kept]
    layer = annotated(SMALL, **{other: None})
    assert read_toc(source_of(layer), layer.fetch).raw == layer.toc
    wrong = annotated(layer, **{kept: "sha256:" + "0" * 64})
    with pytest.raises(DigestMismatch):
        read_toc(source_of(wrong), wrong.fetch)


def test_each_wrong_digest_is_found_though_the_other_is_right() -> None:
    for name in ("TOC_DIGEST", "ZSTD_CHECKSUM"):
        wrong = annotated(SMALL, **{name: "sha256:" + "0" * 64})
        with pytest.raises(DigestMismatch):
            read_toc(source_of(wrong), wrong.fetch)


def test_a_layer_without_digests_is_lazy_only_when_the_user_says_so() -> None:
    layer = annotated(SMALL, TOC_DIGEST=None, ZSTD_CHECKSUM=None)
    assert "vouches" in why_not(layer)
    source = source_of(layer, allow_unverified=True)
    assert not source.verified
    assert read_toc(source, layer.fetch).raw == layer.toc


GITHUB = {"GITHUB_ZSTD_CHECKSUM": "sha256:" + "0" * 64, "GITHUB_ZSTD_POSITION": "1:2:3:1"}
NONE = {"TOC_DIGEST": None, "ZSTD_CHECKSUM": None, "ZSTD_POSITION": None, "UNCOMPRESSED_SIZE": None}


@pytest.mark.parametrize("layer, reason", [
    (annotated(SMALL, **NONE), "no TOC"),
    (replace(annotated(SMALL, TOC_DIGEST=None), media_type=oci.OCI_LAYER_GZIP), "its type is gzip"),
    (replace(annotated(SMALL, **NONE), media_type=oci.OCI_LAYER_GZIP), "has no TOC"),
    (replace(SMALL, media_type=oci.OCI_LAYER), "has no TOC"),
    (annotated(SMALL, **GITHUB), "both kinds"),
    (annotated(SMALL, ZSTD_CHECKSUM=None, ZSTD_POSITION=None, **GITHUB), "both kinds"),
    (annotated(SMALL, TOC_DIGEST=None, **GITHUB), "both kinds"),
    (annotated(SMALL, **{**NONE, **GITHUB}), "more than"),
    (annotated(SMALL, TOC_DIGEST="sha512:" + "0" * 128), "not a sha256 digest"),
    (annotated(SMALL, ZSTD_CHECKSUM="sha256:" + "A" * 64), "not a sha256 digest"),
    (annotated(SMALL, ZSTD_POSITION="1:2:3"), "four numbers"),
    (annotated(SMALL, ZSTD_POSITION="-1:2:3:1"), "four numbers"),
    (annotated(SMALL, ZSTD_POSITION="\u0661:2:3:1"), "four numbers"),
    (annotated(SMALL, ZSTD_POSITION="100:20:30:2"), "type 2"),
    (annotated(SMALL, ZSTD_POSITION="100:999999:30:1"), "outside"),
    (annotated(SMALL, ZSTD_POSITION="3:20:30:1"), "TOC"),
    (annotated(SMALL, ZSTD_POSITION=f"100:20:{MAX_TOC + 1}:1"), "allowed"),
])  # fmt: skip
def test_why_a_layer_is_not_lazy(layer: LayerBlob, reason: str) -> None:
    assert reason in why_not(layer)


@pytest.mark.parametrize("footer, reason", [
    (legacy(100), "no digests"),
    (external(), "another image"),
])  # fmt: skip
def test_a_refused_footer_names_its_reason(footer: bytes, reason: str) -> None:
    """The annotations claim our form, the blob is of another."""
    layer = annotated(replace(SMALL, blob=SMALL.blob + footer), ZSTD_POSITION=None)
    found = read_any(source_of(layer), layer.fetch)
    assert isinstance(found, NotLazy) and reason in found.reason
    assert refusal(layer.blob[-MAX_FOOTER:], len(layer.blob)) == found.reason


@pytest.mark.parametrize("footer, error", [
    (estargz(100), DigestMismatch),
    (storage_zstd(100, 20, 30), DigestMismatch),
    (bytes(60), FooterInvalid),
])  # fmt: skip
def test_a_footer_of_another_form_does_not_get_round_the_digest(footer: bytes, error: type[Exception]) -> None:
    layer = annotated(replace(SMALL, blob=SMALL.blob + footer), ZSTD_POSITION=None)
    with pytest.raises(error):
        read_toc(source_of(layer), layer.fetch)


def test_descriptor_and_footer_must_agree() -> None:
    offset, size, raw, _ = SMALL.annotations[oci.ZSTD_POSITION].split(":")
    layer = annotated(SMALL, ZSTD_POSITION=f"{offset}:{int(size) - 1}:{raw}:1")
    with pytest.raises(FooterInvalid, match="the footer at"):
        read_toc(source_of(layer), layer.fetch)


def test_a_short_answer_is_refused() -> None:
    with pytest.raises(FooterInvalid):
        read_toc(source_of(SMALL), lambda blob_offset, size: SMALL.fetch(blob_offset, size)[:-1])


def resized(raw_size: int) -> LayerBlob:
    """A layer whose footer and annotations claim another size of the JSON."""
    offset, size, _, _ = SMALL.annotations[oci.ZSTD_POSITION].split(":")
    footer = STARGZ_BODY.pack(int(offset), int(size), raw_size, 1, STARGZ_MAGIC)
    blob = SMALL.blob[: -STARGZ_BODY.size] + footer
    return annotated(replace(SMALL, blob=blob), ZSTD_POSITION=f"{offset}:{size}:{raw_size}:1")


@pytest.mark.parametrize("raw_size", [0, len(SMALL.toc) - 1, len(SMALL.toc) + 1])
def test_a_toc_of_another_size_than_promised_is_refused(raw_size: int) -> None:
    layer = resized(raw_size)
    with pytest.raises(TocInvalid, match="decompresses"):
        read_toc(source_of(layer), layer.fetch)


def test_a_toc_that_claims_too_much_is_refused_before_it_is_decompressed() -> None:
    layer = annotated(resized(MAX_TOC + 1), ZSTD_POSITION=None)
    with pytest.raises(TocInvalid, match="allowed"):
        read_toc(source_of(layer), layer.fetch)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SMALL.tail) - 1))
def test_any_flipped_byte_of_the_tail_is_found(at: int) -> None:
    layer = flipped(SMALL, SMALL.payload_end + at)
    with pytest.raises((TrustError, FormatError)):
        read_toc(source_of(SMALL), layer.fetch)
    without = annotated(SMALL, ZSTD_POSITION=None)
    with pytest.raises((TrustError, FormatError)):
        read_toc(source_of(without), layer.fetch)
