"""The checksum of cache files: the same from memory and from the file, and any changed byte is another one."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.format import checksum as sums
from lazyfs.format.checksum import SIZE, checksum, file_checksum
from lazyfs.units import MiB


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_where_the_parts_end_makes_no_difference(data: bytes, cuts: list[int]) -> None:
    ends = sorted([0, *cuts, len(data)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_PIECE", 64)
        whole = checksum([data])
        assert checksum([data[a:b] for a, b in pairwise(ends)]) == whole
        for at in range(0, len(data), 37):
            assert checksum([data[:at], bytes([data[at] ^ 1]), data[at + 1 :]]) != whole


@pytest.mark.parametrize("size", [48, MiB, 3 * MiB + 5, 11 * MiB - 1])
def test_a_file_has_that_of_its_bytes_with_zeros_in_the_place_of_its_own(tmp_path: Path, size: int) -> None:
    data = bytearray(os.urandom(size))
    path = tmp_path / "file"
    path.write_bytes(data)
    data[16 : 16 + SIZE] = bytes(SIZE)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert file_checksum(fd, 0, size, 16) == checksum([data])
        os.truncate(path, size - 1)
        assert file_checksum(fd, 0, size, 16) != checksum([data])
    finally:
        os.close(fd)
