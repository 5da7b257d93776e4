"""tar-split: all of a tar but its files' contents, so that podman makes the very same tar again from an unpacked tree.

A line of JSON each, in stream order: the headers of an entry, the padding before them included (type 2), then the file
(type 1: name, size, CRC-64 of the content). podman 5 takes no layer in parts without it, and compares each header in it
with the TOC. Source: specs/estargz.md section 8; the JSON is that of github.com/vbatts/tar-split, tar/storage.
"""

from __future__ import annotations

from base64 import b64encode

import msgspec
import zstandard

from lazyfs.errors import TocInvalid
from lazyfs.format.crc64 import crc64
from lazyfs.limits import MAX_STORAGE_TOC, MAX_TAR_SEGMENT


class TarSplitWriter:
    """Feed it a tar in order: `plain` bytes, `begin` behind an entry's headers, `content`; then `finish`.

    Not thread-safe. It holds the compressed form, one entry's headers, and no content.
    """

    def __init__(self, level: int) -> None:
        self.raw_size = 0  # bytes before compression
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False).compressobj()
        self._out = bytearray()
        self._segment = bytearray()
        self._file: tuple[bytes, int] | None = None  # the name and size of the file under way
        self._left = 0  # of its content
        self._crc = 0
        self._position = 0

    def plain(self, data: bytes | memoryview) -> None:
        """Take bytes that are no content."""
        self._segment += data
        if len(self._segment) > MAX_TAR_SEGMENT:
            self._end_segment()

    def begin(self, name: bytes, size: int) -> None:
        """Say that an entry's headers are complete; `size` bytes of content follow."""
        self._end_segment()
        self._file, self._left, self._crc = (name, size), size, 0
        if not size:
            self._end_file()

    def content(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the entry's content."""
        self._crc = crc64(data, self._crc)
        self._left -= len(data)
        if not self._left:
            self._end_file()

    def finish(self) -> bytes:
        """Return the whole, compressed as one zstd frame. Nothing can be added afterwards."""
        self._end_segment()
        return bytes(self._out + self._compressor.flush())

    def _end_segment(self) -> None:
        if self._segment:
            self._line({"type": 2, "payload": self._segment, "position": self._position})
            self._segment = bytearray()

    def _end_file(self) -> None:
        assert self._file is not None
        name, size = self._file
        line: dict[str, object] = {"type": 1}
        try:
            line["name"] = name.decode()
        except UnicodeDecodeError:
            line["name_raw"] = b64encode(name).decode()
        if size:
            line["size"] = size
        line["payload"] = self._crc.to_bytes(8, "big") if size else None
        line["position"] = self._position
        self._line(line)
        self._file = None

    def _line(self, line: dict[str, object]) -> None:
        raw = msgspec.json.encode(line) + b"\n"
        self._position += 1
        self.raw_size += len(raw)
        self._out += self._compressor.compress(raw)
        if len(self._out) > MAX_STORAGE_TOC or self.raw_size > MAX_STORAGE_TOC:
            raise TocInvalid(
                f"the layer's tar headers take more than {MAX_STORAGE_TOC} bytes, which podman would not read"
            )
