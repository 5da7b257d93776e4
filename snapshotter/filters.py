"""containerd's filter language: which snapshots a List wants.

    name==a,labels."containerd.io/snapshot.ref"==sha256:…     both must hold; of several filters any one is enough

Operators: == and != compare, ~= searches a regular expression, none asks whether the field is there. Fields: name,
parent, kind (active, view, committed), labels.NAME. Names and values may stand in double quotes with Go's escapes; a
regular expression in / or | too. Source: containerd, pkg/filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lazyfs.errors import SnapshotInvalid
from lazyfs.limits import MAX_FILTER, MAX_FILTERS
from snapshotter.model import Snapshot
from snapshotter.regexp import Pattern, PatternInvalid

_QUOTES = '"/|'
_OPERATOR = "=!~"
_FIELD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_PLAIN = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_HEX = {"x": 2, "u": 4, "U": 8}

Match = Callable[[Snapshot], bool]


@dataclass(frozen=True, slots=True)
class _Selector:
    """One condition. `operator` is "" where only the presence matters."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""
    pattern: Pattern | None = None

    def matches(self, snapshot: Snapshot) -> bool:
        found = _field(snapshot, self.path)
        if self.operator == "==":
            return found is not None and found == self.value
        if self.operator == "!=":
            return (found or "") != self.value
        if self.pattern is not None:
            return self.pattern.search(found or "")
        return found is not None


def _field(snapshot: Snapshot, path: tuple[str, ...]) -> str | None:
    match path[0]:
        case "name":
            return snapshot.key
        case "parent":
            return snapshot.parent
        case "kind":
            return snapshot.kind.name.lower()
        case "labels":
            return snapshot.labels.get(".".join(path[1:]))
    return None


def parse_all(texts: Sequence[str]) -> Match:
    """Return what tells whether a snapshot matches any of the filters; none, and an empty one, match all.

    Pure. Raise SnapshotInvalid for one that is malformed.
    """
    if len(texts) > MAX_FILTERS:
        raise SnapshotInvalid("", f"there are more than {MAX_FILTERS} filters")
    parsed = [_Parser(text).parse() for text in texts]
    if not parsed:
        return lambda snapshot: True
    return lambda snapshot: any(all(one.matches(snapshot) for one in selectors) for selectors in parsed)


class _Parser:
    """Reads one filter from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> list[_Selector]:
        if not self._text:
            return []
        if len(self._text) > MAX_FILTER or "\0" in self._text:
            raise self._wrong("it is too long, or has a null character")
        selectors = [self._selector()]
        while self._peek():
            if self._peek() != ",":
                raise self._wrong("a comma is missing")
            self._at += 1
            selectors.append(self._selector())
        return selectors

    def _wrong(self, reason: str) -> SnapshotInvalid:
        return SnapshotInvalid("", f"the filter {self._text[:120]!r} is malformed at character {self._at}: {reason}")

    def _peek(self) -> str:
        """Return the next character that is no blank, "" at the end."""
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _run(self, wanted: Callable[[str], bool]) -> str:
        start = self._at
        while self._at < len(self._text) and wanted(self._text[self._at]):
            self._at += 1
        return self._text[start : self._at]

    def _selector(self) -> _Selector:
        path = [self._name()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._name())
        if self._peek() in ("", ","):
            return _Selector(tuple(path))
        operator = self._run(lambda char: char in _OPERATOR)
        if operator not in ("==", "!=", "~="):
            raise self._wrong("it has no operator ==, != or ~= here")
        value = self._value(regular=operator == "~=")
        if operator != "~=":
            return _Selector(tuple(path), operator, value)
        try:
            return _Selector(tuple(path), operator, value, Pattern(value))
        except PatternInvalid as error:
            raise self._wrong(f"the regular expression can't be used: {error}") from None

    def _name(self) -> str:
        if self._peek() == '"':
            return self._quoted()
        name = self._run(_FIELD.__contains__)
        if not name:
            raise self._wrong("a field's name is missing")
        return name

    def _value(self, *, regular: bool) -> str:
        first = self._peek()
        if first and first in _QUOTES:
            if first != '"' and not regular:
                raise self._wrong("only a regular expression may stand in these quotes")
            return self._quoted()
        value = self._run(lambda char: char != "," and not char.isspace() and char.isprintable())
        if not value:
            raise self._wrong("a value is missing")
        return value

    def _quoted(self) -> str:
        """Read a quoted string. Escapes give bytes, as in Go, so the whole is put together as bytes."""
        quote = self._text[self._at]
        self._at += 1
        read = bytearray()
        while (char := self._next()) != quote:
            if char == "\n":
                raise self._wrong("a quoted string does not end on its line")
            read += self._escaped(quote) if char == "\\" else char.encode("utf-8", "surrogatepass")
        return read.decode("utf-8", "surrogateescape")

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._wrong("a quoted string does not end")
        self._at += 1
        return self._text[self._at - 1]

    def _escaped(self, quote: str) -> bytes:
        char = self._next()
        if char == quote:
            return char.encode()
        if char in _PLAIN:
            return bytes([_PLAIN[char]])
        if char in _HEX:
            number = self._digits(_HEX[char], 16, "")
            if char == "x":
                return bytes([number])
            if number > 0x10FFFF:
                raise self._wrong("an escape names no character")
            return chr(number).encode("utf-8", "replace")
        if char in "01234567":
            number = self._digits(2, 8, char)
            if number > 0xFF:
                raise self._wrong("an escape names no byte")
            return bytes([number])
        raise self._wrong(f"the escape \\{char} is unknown")

    def _digits(self, count: int, base: int, first: str) -> int:
        text = first + "".join(self._next() for _ in range(count))
        try:
            if not text.isalnum() or not text.isascii():
                raise ValueError
            return int(text, base)
        except ValueError:
            raise self._wrong("an escape is no number") from None
