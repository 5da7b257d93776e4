"""Inputs from inputs: a mutator of the standard library alone, that knows of bytes, numbers, words and JSON.

It does what atheris' own mutator does, without its feedback; and it is given to atheris for trees of JSON, which bytes
that are turned over hardly ever leave readable.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz.target import Target

_EDGES = (0, 1, 2, 7, 8, 255, 256, *((1 << bits) - 1 for bits in (15, 16, 31, 32, 40, 62, 63, 64)))
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**400, 0.5, 1e308, float("inf"), float("nan"),
    "", "\0", "/", "..", "a/../b", "\ud800", "\ufffd", "x" * 999, "sha256:" + "0" * 64, [], {}, [[]], [None],
    {"": None},
)  # fmt: skip


def mutate(target: Target, data: bytes, corpus: Sequence[bytes], source: random.Random) -> bytes:
    """Return a changed input of at most `target.most` bytes; `corpus` (not empty) lends parts."""
    if target.json and source.random() < 0.6:
        data = mutate_json(data, source)
    else:
        for _ in range(1 << source.randrange(5)):
            data = _change(target, data, corpus, source)
    return data[: target.most]


def mutate_json(data: bytes, source: random.Random) -> bytes:
    """Return lines of JSON with some values changed; lines that are none stay as they are."""
    lines = data.split(b"\n")
    number = source.randrange(len(lines))
    try:
        document = [json.loads(lines[number])]
    except (ValueError, RecursionError):
        return data
    for _ in range(1 + source.randrange(3)):
        _change_tree(document, source)
    try:
        lines[number] = json.dumps(document[0], ensure_ascii=source.random() < 0.8, separators=(",", ":")).encode()
    except (ValueError, RecursionError):  # half a surrogate pair that is no escape
        return data
    return b"\n".join(lines)


def _change_tree(document: Any, source: random.Random) -> None:
    """Change one place in a list or object, somewhere below."""
    here = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = source.choice(keys)
        below = here[key]
        if isinstance(below, list | dict) and below and source.random() < 0.85:
            here = below
            continue
        break
    kind = source.randrange(6)
    if kind == 0 and here is not document:
        del here[key]
    elif kind == 1 and isinstance(here, list) and here is not document:
        here[source.randrange(len(here)) : 0] = [here[key]] * source.choice((1, 2, 30))
    elif kind == 2 and isinstance(here, dict):
        here[source.choice(keys)] = here[key]
    elif kind == 3 and isinstance(below, str) and below:
        at = source.randrange(len(below))
        here[key] = below[:at] + source.choice(("", "/", "\0", "..", "\ud800", "é", below)) + below[at + 1 :]
    elif kind == 4 and isinstance(below, int) and not isinstance(below, bool):
        here[key] = source.choice((below + 1, below - 1, -below, below << 1, source.choice(_EDGES)))
    else:
        here[key] = source.choice(_VALUES)


def _change(target: Target, data: bytes, corpus: Sequence[bytes], source: random.Random) -> bytes:
    at = source.randrange(len(data) + 1)
    size = min(1 << source.randrange(8), len(data) - at)
    kind = source.randrange(10)
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + source.randbytes(1 + source.randrange(8)) + data[at:]
    if kind == 3:
        return data[:at] + data[at : at + size] * source.choice((2, 3, 50)) + data[at + size :]
    if kind == 4 and target.words:
        word = source.choice(target.words)
        return data[:at] + word + data[at + source.choice((0, len(word))) :]
    if kind == 5:
        width = source.choice((1, 2, 4, 8))
        number = source.choice(_EDGES) & ((1 << 8 * width) - 1)
        return data[:at] + number.to_bytes(width, source.choice(("little", "big"))) + data[at + width :]
    if kind == 6:
        digits = str(source.choice(_EDGES)).encode()
        return data[:at] + digits + data[at + source.choice((0, len(digits))) :]
    if kind == 7:
        other = source.choice(corpus)
        start = source.randrange(len(other) + 1)
        part = other[start : start + (1 << source.randrange(12))]
        return data[:at] + part + data[at + source.choice((0, len(part))) :]
    if kind == 8:
        lines = data.split(b"\n")
        lines.insert(source.randrange(len(lines)), source.choice(source.choice(corpus).split(b"\n")))
        if source.random() < 0.5:
            del lines[source.randrange(len(lines))]
        return b"\n".join(lines)
    return data[:at]
