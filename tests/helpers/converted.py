"""Layers as the converter makes them, and what other readers find in them."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from indexer.compress import Compressors
from indexer.layer import ConvertedLayer, LayerOptions, convert_layer
from indexer.options import LEVELS, OutputForm
from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.format.entry import TOC_NAME, Chunk, Entry
from lazyfs.format.inflate import decompress
from lazyfs.format.lazy import NotLazy, read_toc, toc_source
from lazyfs.format.toc import parse_toc
from tests.helpers.blobs import scan
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of

ZSTD, ESTARGZ, PODMAN = OutputForm.ZSTD_CHUNKED, OutputForm.ESTARGZ, OutputForm.PODMAN
FORMS = pytest.mark.parametrize("form", list(OutputForm), ids=lambda form: form.value)
Content = dict[bytes, tuple[Entry, list[Chunk]]]


def convert(
    tar: bytes,
    form: OutputForm,
    *prefetch: bytes,
    step: int = 1 << 20,
    jobs: int = 2,
    in_flight: int = 8,
    scratch: Path | None = None,
) -> tuple[bytes, ConvertedLayer]:
    target = io.BytesIO()
    blocks = (tar[at : at + step] for at in range(0, len(tar), step))
    with Compressors(LEVELS[form][2], jobs, form) as compressors:
        result = convert_layer(blocks, target, compressors, in_flight, LayerOptions(form, prefetch, scratch))
    blob = target.getvalue()
    assert (result.digest, result.size) == (digests.of(blob), len(blob))
    return blob, result


def unpack(blob: bytes, result: ConvertedLayer) -> bytes:
    """The tar in a blob, by the ordinary decompressors."""
    tar = gzip.decompress(blob) if result.media_type == oci.OCI_LAYER_GZIP else b"".join(decompress([blob]))
    assert result.diff_id == digests.of(tar) and result.annotations[oci.UNCOMPRESSED_SIZE] == str(len(tar))
    assert result.raw_size == len(tar)
    return tar


def descriptor(result: ConvertedLayer) -> oci.Descriptor:
    return oci.Descriptor(result.media_type, result.digest, result.size, result.annotations)


def toc_of(blob: bytes, result: ConvertedLayer) -> tuple[Content, bytes]:
    """The verified TOC as lazyfs reads it from the descriptor alone."""
    source = toc_source(descriptor(result))
    assert not isinstance(source, NotLazy), source
    toc = read_toc(source, lambda offset, size: blob[offset : offset + size])
    assert not isinstance(toc, NotLazy), toc
    return {entry.path: (entry, chunks) for entry, chunks in parse_toc(toc.raw, toc.payload_end)}, toc.raw


def read(blob: bytes, chunks: list[Chunk]) -> bytes:
    """A file's content by the TOC alone, each chunk checked."""
    out = b""
    for chunk in chunks:
        at = chunk.blob_offset
        inflated = (
            next(iter(member_of(blob[at:])))
            if blob[at : at + 2] == b"\x1f\x8b"
            else zstandard.ZstdDecompressor().decompress(blob[at:])
        )
        data = inflated[chunk.inner_offset : chunk.inner_offset + chunk.size]
        assert chunk.offset == len(out) and hashlib.sha256(data).digest() == chunk.digest
        out += data
    return out


def member_of(data: bytes) -> Iterator[bytes]:
    import zlib

    yield zlib.decompressobj(31).decompress(data)


def entries_of(tar: bytes) -> list[tuple[Entry, bytes]]:
    """Entries with their content, but for the TOC's."""
    return [
        (item.entry, tar[item.payload : item.payload + item.stored])
        for item in scan(tar)
        if item.entry.path != TOC_NAME
    ]


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


SMALL = tar_of(
    dir_("d"), file("d/a", b"hello"), symlink("l", "d/a"), hardlink("h", "d/a"), file("empty"), file("b", b"b" * 700)
)
