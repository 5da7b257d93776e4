"""Where the statements of a TOML document lie in its text, so that one value can be changed and the rest stay as it is.

Loose on purpose: the document was parsed by a real parser before, and what an edit gives is parsed again after.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

_BARE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_QUOTES = ('"""', "'''", '"', "'")


@dataclass(frozen=True, slots=True)
class Statement:
    """A table's header (`value` is None), or a key with its value. `path` is whole, from the document's root, and
    `table` that of the header above it.

    `start` and `end` are offsets of its lines, the last line's end included; `value` of the value itself. `in_array`:
    it belongs to a table of an array, of which there can be several with the same path.
    """

    path: tuple[str, ...]
    table: tuple[str, ...]
    start: int
    end: int
    value: tuple[int, int] | None
    in_array: bool


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a well-formed document in order. Raise ValueError for one that is not."""
    table: tuple[str, ...] = ()
    arrays: list[tuple[str, ...]] = []
    at = 0
    while at < len(text):
        start = at
        at = _skip_blanks(text, at)
        if at >= len(text) or text[at] in "#\r\n":
            at = _line_end(text, at)
        elif text[at] == "[":
            array = text.startswith("[[", at)
            table, at = _key(text, at + (2 if array else 1))
            at = _line_end(text, at)
            if array:
                arrays.append(table)
            yield Statement(table, table, start, at, None, array or _below_any(table, arrays))
        else:
            key, at = _key(text, at)
            if text[at : at + 1] != "=":
                raise ValueError("a key without a value")
            first = _skip_blanks(text, at + 1)
            last = _value_end(text, first)
            at = _line_end(text, last)
            yield Statement(table + key, table, start, at, (first, last), _below_any(table, arrays))


def _below_any(table: tuple[str, ...], arrays: list[tuple[str, ...]]) -> bool:
    return any(table[: len(array)] == array for array in arrays)


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t":
        at += 1
    return at


def _line_end(text: str, at: int) -> int:
    found = text.find("\n", at)
    return len(text) if found < 0 else found + 1


def _key(text: str, at: int) -> tuple[tuple[str, ...], int]:
    """Return a dotted key and the offset of what follows it."""
    parts: list[str] = []
    while True:
        at = _skip_blanks(text, at)
        start = at
        if text[at : at + 1] in ('"', "'"):
            at = _string_end(text, at)
            parts.append(next(iter(tomllib.loads(text[start:at] + "=0"))))
        else:
            while at < len(text) and text[at] in _BARE:
                at += 1
            if at == start:
                raise ValueError("an empty key")
            parts.append(text[start:at])
        at = _skip_blanks(text, at)
        if text[at : at + 1] != ".":
            return tuple(parts), at
        at += 1


def _string_end(text: str, at: int) -> int:
    quote = next(quote for quote in _QUOTES if text.startswith(quote, at))
    at += len(quote)
    while not text.startswith(quote, at):
        if at >= len(text):
            raise ValueError("a string without an end")
        at += 2 if text[at] == "\\" and quote[0] == '"' else 1
    at += len(quote)
    if len(quote) == 3:  # up to two quotes may stand before the closing ones
        while text[at : at + 1] == quote[0]:
            at += 1
    return at


def _value_end(text: str, at: int) -> int:
    depth = 0
    last = at
    while at < len(text):
        char = text[at]
        if char in "\"'":
            at = last = _string_end(text, at)
            continue
        if char == "#":
            if depth == 0:
                break
            at = _line_end(text, at)
            continue
        if char == "\n" and depth == 0:
            break
        depth += (char in "[{") - (char in "]}")
        at += 1
        if char not in " \t\r\n":
            last = at
    if depth:
        raise ValueError("brackets that don't close")
    return last
