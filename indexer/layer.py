"""One layer: a tar stream in, a layer with a TOC out.

zstd-chunked is lossless: the decompressed output is the source's tar, byte for byte, so diff ID and image config stay
what they are, and one sha256 pass is the check of the source and the diff ID of the result. That is why there is no
landmark in it unless a prefetch list asks for one: an entry of our own changes the diff ID. eStargz always has a diff
ID of its own, because its TOC is an entry of the tar. What can't be carried over verbatim is rewritten entry by entry.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from indexer.compress import Compressors, gzip_member
from indexer.frames import Content, FrameCutter, FrameWriter
from indexer.options import OutputForm
from indexer.order import SpooledTar
from indexer.stream import LayerStream
from indexer.verbatim import Split, TellingContent
from lazyfs import digest as digests
from lazyfs.format import estargz_write, storage_write
from lazyfs.format.entry import Entry, Kind
from lazyfs.format.namespace import Live
from lazyfs.format.storage_write import StorageTocWriter, Verbatim
from lazyfs.format.toc_write import TocWriter
from lazyfs.format.zstd_chunked import encode_tail
from lazyfs.oci import OCI_LAYER_GZIP, OCI_LAYER_ZSTD, TOC_DIGEST, UNCOMPRESSED_SIZE


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """How to make one layer. The level is the compressors'."""

    form: OutputForm = OutputForm.ZSTD_CHUNKED
    prefetch: tuple[bytes, ...] = ()  # cleaned paths, in the order in which a start reads them
    scratch: Path | None = None  # where a layer that a prefetch list may re-order is kept; None: the system's place
    cancelled: threading.Event | None = None  # looked at while such a layer is read back


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What came out. Sizes are bytes; digests "sha256:<hex>"."""

    digest: str
    size: int
    diff_id: str
    source_diff_id: str  # sha256 of the tar that went in
    raw_size: int  # of the decompressed blob
    entries: int  # names that live in the layer
    frames: int
    annotations: dict[str, str]
    media_type: str = OCI_LAYER_ZSTD
    prefetched: tuple[bytes, ...] = ()  # of the paths asked for, those that are in the layer
    notes: tuple[str, ...] = ()  # why the result isn't the source's tar, or can't be all that its form promises


def convert_layer(
    blocks: Iterable[bytes],
    target: BinaryIO,
    compressors: Compressors,
    in_flight: int,
    options: LayerOptions | None = None,
) -> ConvertedLayer:
    """Read a tar from `blocks`, write the converted layer to `target`.

    Blocks until all is written; memory is bounded by `in_flight` batches of frames and the layer's names. With a
    prefetch list the tar is kept in a temporary file first. Raise TarInvalid with the entry's name for what can't be a
    layer (names that lead out, hard links to nothing or in a circle, absurd sizes), TocInvalid when its TOC would be
    too large to be read, StoreBroken when `target` or the temporary file fails, and what `blocks` raises.
    Nothing is checked against a digest here: the caller compares `source_diff_id`.
    """
    options = options or LayerOptions(compressors.form)
    assert options.form is compressors.form
    if not options.prefetch:
        return _convert(blocks, target, compressors, in_flight, options.form)
    with SpooledTar(blocks, options.prefetch, options.scratch, options.cancelled) as tar:
        return _convert(tar.blocks(), target, compressors, in_flight, options.form, tar)


def _convert(
    blocks: Iterable[bytes],
    target: BinaryIO,
    compressors: Compressors,
    in_flight: int,
    form: OutputForm,
    tar: SpooledTar | None = None,
) -> ConvertedLayer:
    writer = FrameWriter(target, compressors, in_flight)
    split = Split(compressors.level) if form is OutputForm.PODMAN else None
    stream = LayerStream(FrameCutter(writer, form), form, split)
    for block in blocks:
        stream.feed(block)
    stream.finish()
    living = stream.namespace.finish()
    notes: list[str] = []
    if form is OutputForm.ZSTD_CHUNKED:
        toc = _toc(living, writer)  # while the last frames are being compressed
        writer.finish()
        tail, annotations = encode_tail(toc, writer.blob_size, compressors.level)
        writer.append(tail)
    elif form is OutputForm.ESTARGZ:
        toc = _toc(living, writer)
        writer.finish()
        end = estargz_write.toc_member(toc)
        stream.end_with(end)
        toc_offset = writer.blob_size
        writer.append(gzip_member(end, compressors.level))
        writer.append(estargz_write.footer(toc_offset))
        annotations = {TOC_DIGEST: digests.of(toc)}
        notes.append("the TOC of an eStargz layer is an entry of its tar")
    else:
        assert split is not None
        annotations = _end_storage(stream, living, writer, split, compressors.level, notes)
    if stream.expanded:
        notes.append("sparse files expanded")
    if stream.left_out:
        notes.append("the TOC of an earlier conversion left out")
    if tar is not None and tar.found:
        notes.append("files of the prefetch list moved to the front, and a landmark behind them")
    return ConvertedLayer(
        "sha256:" + writer.digest.hexdigest(),
        writer.blob_size,
        stream.diff_id,
        stream.source_diff_id if tar is None else tar.source_diff_id,
        stream.raw_size,
        len(living),
        writer.frames,
        {**annotations, UNCOMPRESSED_SIZE: str(stream.raw_size)},
        OCI_LAYER_GZIP if form is OutputForm.ESTARGZ else OCI_LAYER_ZSTD,
        () if tar is None else tar.found,
        tuple(notes),
    )


def _toc(living: list[Live[Content | None]], writer: FrameWriter) -> bytes:
    toc = TocWriter()
    for live in living:
        if live.entry.kind is Kind.REG and live.tag is not None:
            writer.await_content(live.tag)
            toc.add(live.entry, live.tag.digest, live.tag.chunks)
        else:
            toc.add(live.entry, None, [])
    return toc.finish()


def _end_storage(
    stream: LayerStream,
    living: list[Live[Content | None]],
    writer: FrameWriter,
    split: Split,
    level: int,
    notes: list[str],
) -> dict[str, str]:
    """Write the tail of podman's form; return the annotations, none where its TOC can't tell all names."""
    toc = StorageTocWriter()
    if len(living) != len(stream.namespace):
        split.give_up()  # a name came twice: podman takes no such tar-split, and no such tar either
    try:
        for live in living:
            content = live.tag
            assert isinstance(content, TellingContent) and content.told is not None
            writer.await_content(content)
            told = content.told
            if live.entry is not content.entry and live.entry != content.entry:
                split.give_up()
                told = _own_words(live.entry)
            chunks = content.chunks if live.entry.kind is Kind.REG else []
            toc.add(live.entry, told, content.digest, chunks, content.blob_end)
    except UnicodeDecodeError:
        notes.append("it has names that aren't UTF-8, which podman's TOC can't tell: it is pulled whole")
        writer.finish()
        return {}
    writer.finish()
    tar_split, raw_size = split.finish()
    if tar_split is None:
        notes.append("it has entries that a tar-split can't tell: podman 5 pulls it whole")
    if toc.escaped:
        # podman 4.3 reads JSON by itself and stops at the first escaped quote, without an error.
        notes.append("it has names that podman 4 misreads in a TOC: podman 4 pulls it whole")
    tail, annotations = storage_write.encode_tail(
        toc.finish(tar_split), tar_split, raw_size, writer.blob_size, level, old_keys=not toc.escaped
    )
    writer.append(tail)
    return annotations


def _own_words(entry: Entry) -> Verbatim:
    name = entry.path + b"/" if entry.kind is Kind.DIR and entry.path else entry.path or b"./"
    return Verbatim(name, entry.link, entry.mode)
