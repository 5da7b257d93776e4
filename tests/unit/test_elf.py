"""ELF files: what a real program needs is found, and no bytes at all make the reader fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.format import elf


def needs_of(data: bytes) -> tuple[bytes, elf.Needs | None]:
    """Read a whole file in memory the way `lazyfs.mount.ahead` reads it in pieces."""
    header = data[:256]
    segments = elf.program_headers(header)
    if segments is None:
        return b"", None
    found = elf.layout(header, data[segments.offset : segments.offset + segments.size])
    interpreter = found.interpreter
    name = data[interpreter.offset : interpreter.offset + interpreter.size] if interpreter else b""
    if found.dynamic is None:
        return name.rstrip(b"\0"), None
    names = elf.strings_at(found, data[found.dynamic.offset : found.dynamic.offset + found.dynamic.size])
    if names is None:
        return name.rstrip(b"\0"), None
    return name.rstrip(b"\0"), elf.needs(names[1], data[names[0] : names[0] + (64 << 10)])


def test_a_real_program_names_its_loader_and_its_libraries() -> None:
    program = Path("/bin/sh").resolve()
    interpreter, needed = needs_of(program.read_bytes())
    assert Path(interpreter.decode()).exists()
    assert needed is not None
    told = subprocess.run(["objdump", "-p", program], capture_output=True, text=True, check=True, timeout=60).stdout
    expected = [line.split()[1].encode() for line in told.splitlines() if line.strip().startswith("NEEDED")]
    assert list(needed.libraries) == expected != []


def test_what_is_no_elf_program_has_no_headers() -> None:
    for data in (b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x02" + bytes(100), bytes(300)):
        assert elf.program_headers(data) is None


@given(st.data())
def test_no_flipped_byte_makes_the_reader_fail(data: st.DataObject) -> None:
    program = bytearray(Path("/bin/true").read_bytes()[: 1 << 17])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, 1023) | st.integers(0, len(program) - 1))
        program[at] = data.draw(st.integers(0, 255))
    needs_of(bytes(program))


@given(st.binary(max_size=512))
def test_no_bytes_make_the_reader_fail(rest: bytes) -> None:
    for word in (1, 2):
        needs_of(b"\x7fELF" + bytes([word, 1]) + rest)


def test_python_is_one_of_many() -> None:
    interpreter, needed = needs_of(Path(sys.executable).resolve().read_bytes())
    assert interpreter.startswith(b"/lib")
    assert needed is not None and any(name.startswith(b"libc.so") for name in needed.libraries)
