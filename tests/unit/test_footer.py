"""Footers: every form in the field is told by content, and impossible numbers are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import FooterInvalid
from lazyfs.format.footer import MAX_FOOTER, Footer, Form, parse_footer

GZIP_HEAD = bytes.fromhex("1f8b08040000000000ff")
GZIP_END = bytes.fromhex("010000ffff0000000000000000")


def estargz(offset: int) -> bytes:
    return GZIP_HEAD + b"\x1a\0SG\x16\0%016xSTARGZ" % offset + GZIP_END


def legacy(offset: int) -> bytes:
    return GZIP_HEAD + b"\x16\0%016xSTARGZ" % offset + GZIP_END


def external() -> bytes:
    return GZIP_HEAD + b"\x15\0SG\x11\0STARGZEXTERNALTOC" + GZIP_END


def stargz_zstd(offset: int, size: int, raw: int, kind: int = 1) -> bytes:
    return b"\x50\x2a\x4d\x18\x28\0\0\0" + struct.pack("<4Q", offset, size, raw, kind) + b"GnUlInUx"


def storage_zstd(offset: int, size: int, raw: int) -> bytes:
    return b"\x50\x2a\x4d\x18\x40\0\0\0" + struct.pack("<7Q", offset, size, raw, 1, offset + size, 9, 9) + b"GNUlInUx"


FORMS = [
    (estargz(100), 51, Footer(Form.ESTARGZ, 100, 900, -1, 51)),
    (legacy(100), 47, Footer(Form.LEGACY_STARGZ, 100, 900, -1, 47)),
    (external(), 46, Footer(Form.EXTERNAL_TOC, -1, 0, -1, 46)),
    (stargz_zstd(100, 900, 5000), 48, Footer(Form.ZSTD_CHUNKED, 100, 900, 5000, 48)),
    (storage_zstd(100, 880, 5000), 72, Footer(Form.STORAGE_ZSTD_CHUNKED, 100, 880, 5000, 72)),
]


@pytest.mark.parametrize("last, size, expected", FORMS, ids=lambda value: getattr(value, "form", None))
def test_each_form_is_told_by_its_last_bytes(last: bytes, size: int, expected: Footer) -> None:
    assert len(last) == size <= MAX_FOOTER
    assert parse_footer(last.rjust(MAX_FOOTER, b"\xaa"), 1000 + size) == expected
    assert parse_footer(last, 1000 + size) == expected


def test_the_specifications_example_is_read() -> None:
    example = bytes.fromhex(
        "1f8b08040000000000ff1a00534716003030303030303030303030303132333453544152475a010000ffff0000000000000000"
    )
    assert parse_footer(example, 0x2000).toc_offset == 0x1234


@pytest.mark.parametrize(
    "last",
    [
        b"",
        bytes(100),
        estargz(100)[:-1],
        estargz(1200),
        stargz_zstd(1000, 1, 1),
        stargz_zstd(100, 0, 1),
        stargz_zstd(100, 901, 1),
        stargz_zstd(2**64 - 1, 2, 1),
        stargz_zstd(100, 2**64 - 1, 1),
        stargz_zstd(100, 900, 1, kind=2),
        stargz_zstd(100, 900, 1)[:-8] + b"GNUlInUx",  # the right length with the other's magic
        storage_zstd(100, 900, 1)[:-8] + b"GnUlInUx",
        GZIP_HEAD + b"\x1a\0SG\x16\0" + b"%016X" % 0xABC + b"STARGZ" + GZIP_END,
        GZIP_HEAD + b"\x1a\0SG\x16\0" + b" " * 15 + b"1STARGZ" + GZIP_END,
    ],
)
def test_what_is_no_footer_or_points_outside_is_refused(last: bytes) -> None:
    with pytest.raises(FooterInvalid):
        parse_footer(last.rjust(MAX_FOOTER, b"\0"), 1048)


def test_more_bytes_than_the_blob_has_are_refused() -> None:
    with pytest.raises(FooterInvalid):
        parse_footer(bytes(100), 99)


@given(st.sampled_from(FORMS), st.integers(0, 71), st.integers(0, 255), st.integers(0, 2**41))
def test_a_damaged_footer_never_points_outside_of_the_blob(
    form: tuple[bytes, int, Footer], at: int, value: int, blob_size: int
) -> None:
    last = bytearray(form[0].rjust(MAX_FOOTER, b"\0"))
    last[at] = value
    try:
        footer = parse_footer(bytes(last), blob_size)
    except FooterInvalid:
        return
    if footer.form is not Form.EXTERNAL_TOC:
        assert 0 <= footer.toc_offset < footer.toc_offset + footer.toc_size <= blob_size - footer.footer_size
