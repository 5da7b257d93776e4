"""Digests of runs of zeros: what a chunk of type "zeros" must claim, and what its pieces read back as."""

from __future__ import annotations

import hashlib

from lazyfs.units import MiB

_STEP = 4 * MiB  # bytes between two remembered states
_ZEROS = bytes(64 * 1024)


class ZeroDigests:
    """sha256 of any number of zero bytes; each stretch of 4 MiB is hashed once, whatever is asked."""

    def __init__(self) -> None:
        self._states = [hashlib.sha256()]
        self._known: dict[int, bytes] = {}

    def digest(self, size: int) -> bytes:
        """Return the 32 raw bytes for `size` zeros. Blocks: 1 ms a MiB beyond what was asked before."""
        found = self._known.get(size)
        if found is None:
            while len(self._states) <= size // _STEP:
                state = self._states[-1].copy()
                _extend(state, _STEP)
                self._states.append(state)
            state = self._states[size // _STEP].copy()
            _extend(state, size % _STEP)
            found = self._known[size] = state.digest()
        return found


def _extend(state: hashlib._Hash, size: int) -> None:
    while size:
        step = min(size, len(_ZEROS))
        state.update(_ZEROS[:step])
        size -= step
