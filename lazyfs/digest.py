"""sha256 digests in the two shapes the code uses: 32 raw bytes, and OCI's "sha256:<hex>" string.

Other algorithms are refused: nothing in the field uses them for layers, and each would be one more way to be wrong.
"""

from __future__ import annotations

import hashlib
import re

from lazyfs.errors import DigestMismatch, DocumentInvalid

SIZE = 32  # bytes of a raw digest
EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Tell whether `text` is a well-formed "sha256:<64 lower-case hex>"."""
    return isinstance(text, str) and _PATTERN.fullmatch(text) is not None


def parse(text: str, what: str = "digest") -> bytes:
    """Return the 32 raw bytes of "sha256:<hex>". Raise DocumentInvalid naming `what` for anything else."""
    if not is_digest(text):
        raise DocumentInvalid(f"{what} {str(text)[:100]!r} is not a sha256 digest")
    return bytes.fromhex(text[7:])


def text(raw: bytes) -> str:
    """Return "sha256:<hex>" of 32 raw bytes."""
    return "sha256:" + raw.hex()


def of(data: bytes | bytearray | memoryview) -> str:
    """Return the digest of `data` as a string."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def raw_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digest of `data` as 32 bytes."""
    return hashlib.sha256(data).digest()


def check(data: bytes | bytearray | memoryview, expected: str, what: str) -> None:
    """Raise DigestMismatch unless `data` has the digest `expected`."""
    actual = of(data)
    if actual != expected:
        raise DigestMismatch(what, expected, actual)


def hex_of(text_digest: str) -> str:
    """Return the 64 hex digits of a digest string, safe as a file name. Raise DocumentInvalid if it is malformed."""
    return parse(text_digest).hex()
