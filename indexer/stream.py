"""A tar on its way into a blob: its bytes to the cutter, its entries to the namespace, its sums kept.

Bytes go through verbatim but for what the form forbids: sparse files are rewritten (`indexer.rewrite`), TOCs of an
earlier conversion are left out; eStargz writes the end of the tar itself, and podman's form knows no landmarks.
"""

from __future__ import annotations

import hashlib

from indexer.frames import Content, FrameCutter
from indexer.options import OutputForm
from indexer.rewrite import Expander, must_rewrite, regular_header
from indexer.verbatim import Split, TellingContent
from lazyfs.errors import TarInvalid
from lazyfs.format.entry import LANDMARK, NO_LANDMARK, TOC_NAME, Kind
from lazyfs.format.namespace import Namespace
from lazyfs.format.tar import TarItem, TarScanner
from lazyfs.format.tar_headers import pad
from lazyfs.limits import MAX_BLOB

_LEFT_OUT = {
    OutputForm.ZSTD_CHUNKED: frozenset({TOC_NAME}),
    OutputForm.ESTARGZ: frozenset({TOC_NAME}),
    OutputForm.PODMAN: frozenset({TOC_NAME, LANDMARK, NO_LANDMARK}),
}


class LayerStream:
    """Hands a tar's bytes to the cutter, and its entries to the namespace. One thread's.

    `split`, for podman's form, is told of every byte and entry too.
    """

    def __init__(self, cutter: FrameCutter, form: OutputForm, split: Split | None = None) -> None:
        self.namespace: Namespace[Content | None] = Namespace()
        self.raw_size = 0  # bytes handed to the cutter
        self.expanded = 0  # sparse files rewritten
        self.left_out = 0  # entries of an earlier conversion
        self._cutter = cutter
        self._split = split
        self._left_out_names = _LEFT_OUT[form]
        self._entries_only = form is OutputForm.ESTARGZ  # whose tar goes on behind the source's last entry
        self._scanner = TarScanner()
        self._held = b""  # an entry's headers, of which more is to come
        self._at = 0  # stream offset of the first byte not yet handed on
        self._hashed = 0  # stream offset up to which the source is hashed
        self._payload_left = 0  # of the entry under way
        self._padding_left = 0  # of a rewritten entry: to be left out
        self._skip_until = 0  # stream offset: the end of an entry that is left out
        self._entry_end = 0  # stream offset: of the entry under way, padding included
        self._expander: Expander | None = None  # the rewritten entry under way
        self._expanded_size = 0  # of that entry
        self._holes = 0
        self._source = hashlib.sha256()
        # None: nothing differs yet, so the source's sum is the result's.
        self._result: hashlib._Hash | None = hashlib.sha256() if self._entries_only else None

    @property
    def source_diff_id(self) -> str:
        return "sha256:" + self._source.hexdigest()

    @property
    def diff_id(self) -> str:
        return "sha256:" + (self._result or self._source).hexdigest()

    def feed(self, block: bytes) -> None:
        """Take the next bytes of the tar. Blocks while too many frames are in flight. Raise TarInvalid."""
        items = self._scanner.feed(block)
        if self._scanner.position > MAX_BLOB:
            raise TarInvalid(f"it is longer than {MAX_BLOB} bytes")
        data = memoryview(self._held + block if self._held else block)
        base = self._at
        for item in items:
            self._pass(data, base, item.start)
            self._begin(item, data, base)
        settled = self._scanner.settled
        self._pass(data, base, settled)
        self._hash(data, base, settled)
        self._held = bytes(data[settled - base :])

    def finish(self) -> None:
        """Say that the stream is over. Raise TarInvalid when it stopped inside an entry."""
        self._scanner.finish()
        if self._entries_only and self._at < self._entry_end and not self._padding_left:
            self._plain(bytes(self._entry_end - self._at))  # the padding that the last entry of a tar may lack
        self._cutter.cut()

    def end_with(self, data: bytes) -> None:
        """Count bytes into the result that follow the stream in the blob, but don't go through the cutter."""
        assert self._result is not None
        self._result.update(data)
        self.raw_size += len(data)

    def _begin(self, item: TarItem, data: memoryview, base: int) -> None:
        entry = item.entry
        if entry.path in self._left_out_names and entry.kind is Kind.REG:
            self._fork(data, base, item.start)
            self.left_out += 1
            self._skip_until = self._entry_end = item.end
            if self._split is not None:
                self._split.skip(item)
            return
        header = data[item.start - base : item.payload - base]
        rewrite = must_rewrite(item)
        if rewrite:
            self._expander = Expander(item, self._holes)
            self._holes = self._expander.holes
            self._fork(data, base, item.start)
            self.expanded += 1
            header = memoryview(regular_header(entry))
        self._plain(header)
        self._at = item.payload
        self._entry_end = item.end
        content: Content | None = None
        if entry.kind is Kind.REG:
            if entry.path == LANDMARK:
                self._cutter.cut()  # a landmark ends the prefetch region, so its frame starts there
            content = self._cutter.begin(entry.size, Content() if self._split is None else TellingContent())
        if self._split is not None:
            content = self._split.begin(item, header, content, rewritten=rewrite)
        self._payload_left = item.stored
        self._padding_left = item.end - item.payload - item.stored if rewrite else 0
        if rewrite:
            self._expanded_size = entry.size
            if not item.stored:
                self._end_rewritten()
        self.namespace.add(entry, content)

    def _pass(self, data: memoryview, base: int, stop: int) -> None:
        """Hand on the bytes before stream offset `stop`: the rest of a content, then padding and the like."""
        if self._at < self._skip_until:
            self._at = max(self._at, min(stop, self._skip_until))
        if self._payload_left and self._at < stop:
            step = min(self._payload_left, stop - self._at)
            stored = data[self._at - base : self._at - base + step]
            self._at += step
            self._payload_left -= step
            if self._expander is None:
                self._content(stored)
            else:
                for piece in self._expander.expand(stored):
                    self._content(piece)
                if not self._payload_left:
                    self._end_rewritten()
        if self._padding_left and not self._payload_left:
            step = min(self._padding_left, stop - self._at)
            self._at += step
            self._padding_left -= step
        if self._at < stop:
            end = min(stop, self._entry_end) if self._entries_only else stop
            if self._at < end:
                self._plain(data[self._at - base : end - base])
            self._at = stop

    def _end_rewritten(self) -> None:
        assert self._expander is not None
        for piece in self._expander.finish():
            self._content(piece)
        self._expander = None
        self._plain(bytes(pad(self._expanded_size)))

    def _plain(self, data: memoryview | bytes) -> None:
        self.raw_size += len(data)
        if self._result is not None:
            self._result.update(data)
        if self._split is not None:
            self._split.plain(data)
        self._cutter.plain(data)

    def _content(self, data: memoryview) -> None:
        self.raw_size += len(data)
        if self._result is not None:
            self._result.update(data)
        if self._split is not None:
            self._split.content(data)
        self._cutter.content(data)

    def _fork(self, data: memoryview, base: int, stop: int) -> None:
        """From stream offset `stop` on, the result is not the source any more."""
        if self._result is None:
            self._hash(data, base, stop)
            self._result = self._source.copy()

    def _hash(self, data: memoryview, base: int, stop: int) -> None:
        # Behind what was handed on, so that the sum of a rewritten layer can fork at the right byte.
        self._source.update(data[self._hashed - base : stop - base])
        self._hashed = stop
