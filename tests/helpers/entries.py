"""Hypothesis strategies for the entries of a layer: few names, so that they meet, in any order and of any kind."""

from __future__ import annotations

from hypothesis import strategies as st
from msgspec.structs import replace

from lazyfs.format.entry import OPAQUE_MARKER, WHITEOUT_PREFIX, Entry, Kind

_NAMES = st.sampled_from((b"a", b"b", b"c"))
PATHS = st.lists(_NAMES, min_size=1, max_size=4).map(b"/".join)
_TARGETS = st.one_of(
    PATHS,
    PATHS.map(lambda path: b"/" + path),
    PATHS.map(lambda path: b"../" + path),
    PATHS.map(lambda path: path + b"/../c"),
    st.sampled_from((b"/", b".", b"..", b"../..", b"b/./", b"/c//a/")),
)


def entry(path: bytes, kind: Kind = Kind.REG, link: bytes = b"", mode: int = 0o644) -> Entry:
    """One entry; its owner is set by `numbered`."""
    return Entry(path, kind, mode, 0, 0, 0, link=link)


def _whiteout(path: bytes) -> Entry:
    above, slash, name = path.rpartition(b"/")
    return entry(above + slash + WHITEOUT_PREFIX + name)


_MODES = st.sampled_from((0o600, 0o755, 0o4711))
_KINDS = st.one_of(
    st.builds(lambda path, mode: entry(path, Kind.REG, mode=mode), PATHS, _MODES),
    st.builds(lambda path, mode: entry(path, Kind.DIR, mode=mode), PATHS, _MODES),
    st.builds(lambda path, mode: entry(path, Kind.DIR, mode=mode), PATHS, _MODES),
    st.builds(lambda path, link: entry(path, Kind.SYMLINK, link, 0o777), PATHS, _TARGETS),
    st.builds(lambda path, link: entry(path, Kind.HARDLINK, link), PATHS, PATHS),
    st.builds(lambda path: entry(path, Kind.FIFO), PATHS),
)
_ROOT = st.builds(lambda mode: entry(b"", Kind.DIR, mode=mode), _MODES)
_MARKERS = st.one_of(PATHS.map(_whiteout), PATHS.map(lambda path: entry(path + b"/" + OPAQUE_MARKER)))
BASE_LAYERS = st.lists(st.one_of(_KINDS, _KINDS, _KINDS, _KINDS, _ROOT), max_size=14)
UPPER_LAYERS = st.builds(
    lambda marks, others: marks + others, st.lists(_MARKERS, max_size=3), st.lists(st.one_of(_KINDS, _ROOT), max_size=7)
)


def numbered(layers: list[list[Entry]]) -> list[list[Entry]]:
    """Give each entry its number in the chain, from 1, as owner: `unpack.Unpacker` counts the same way."""
    out, count = [], 0
    for layer in layers:
        out.append([])
        for one in layer:
            count += 1
            out[-1].append(replace(one, uid=count, gid=count))
    return out
