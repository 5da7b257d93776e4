"""Regular expressions as containerd's filters have them (RE2's syntax, the usual part of it), in linear time.

Python's own `re` backtracks: a filter of twenty characters could hold the interpreter for hours. Here all states are
followed at once (Thompson's construction), and pattern and program are bounded.
Source: the RE2 syntax page of google/re2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyfs.limits import MAX_PATTERN, MAX_PATTERN_DEPTH, MAX_PROGRAM

_Test = Callable[[str], bool]
_ESCAPES = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_CLASSES = {"d": frozenset("0123456789"), "w": _WORD, "s": frozenset("\t\n\f\r ")}


class PatternInvalid(ValueError):
    """A pattern that is malformed, too large, or uses what is not supported."""


@dataclass(slots=True)
class _Step:
    """One instruction: a character to be tested, an assertion, a fork, or (with none of them) the end."""

    test: _Test | None = None
    assertion: str = ""
    fork: tuple[int, ...] = ()
    next: int = -1


class Pattern:
    """A compiled pattern."""

    def __init__(self, pattern: str) -> None:
        """Compile. Raise PatternInvalid."""
        if len(pattern) > MAX_PATTERN:
            raise PatternInvalid(f"it has more than {MAX_PATTERN} characters")
        self._program: list[_Step] = [_Step()]  # the end is number 0
        self._start = self._alternatives(_Parser(pattern).parse(), 0)

    def search(self, text: str) -> bool:
        """Tell whether the pattern matches anywhere in `text`. Time: the text's length by the program's."""
        states: set[int] = set()
        for at in range(len(text) + 1):
            reached: set[int] = set()
            for state in (*states, self._start):
                self._follow(state, text, at, reached)
            if 0 in reached:
                return True
            if at < len(text):
                steps = (self._program[state] for state in reached)
                states = {step.next for step in steps if step.test is not None and step.test(text[at])}
        return False

    def _follow(self, state: int, text: str, at: int, reached: set[int]) -> None:
        waiting = [state]
        while waiting:
            state = waiting.pop()
            if state in reached:
                continue
            reached.add(state)
            step = self._program[state]
            if step.fork:
                waiting.extend(step.fork)
            elif step.assertion and _holds(step.assertion, text, at):
                waiting.append(step.next)

    # Each of these writes what matches its node and then goes on at `then`, and returns where it begins.

    def _alternatives(self, node: _Node, then: int) -> int:
        kind, low, high, parts, test, assertion = node
        if kind == "any":
            return self._add(_Step(fork=tuple(self._alternatives(part, then) for part in parts)))
        if kind == "all":
            for part in reversed(parts):
                then = self._alternatives(part, then)
            return then
        if kind == "repeat":
            return self._repeat(parts[0], low, high, then)
        if kind == "assert":
            return self._add(_Step(assertion=assertion, next=then))
        return self._add(_Step(test=test, next=then))

    def _repeat(self, part: _Node, low: int, high: int, then: int) -> int:
        if high < 0:
            loop = self._add(_Step())
            self._program[loop].fork = (self._alternatives(part, loop), then)
            then = loop
        for _ in range(high - low):
            then = self._add(_Step(fork=(self._alternatives(part, then), then)))
        for _ in range(low):
            then = self._alternatives(part, then)
        return then

    def _add(self, step: _Step) -> int:
        if len(self._program) >= MAX_PROGRAM:
            raise PatternInvalid("it is too large")
        self._program.append(step)
        return len(self._program) - 1


# kind ("any", "all", "repeat", "assert", "char"), least and most repeats (-1: no bound), parts, test, assertion
_Node = tuple[str, int, int, tuple["_Node", ...], _Test | None, str]


def _node(kind: str, *parts: _Node, low: int = 0, high: int = 0, test: _Test | None = None, what: str = "") -> _Node:
    return (kind, low, high, parts, test, what)


def _holds(assertion: str, text: str, at: int) -> bool:
    if assertion == "^":
        return at == 0
    if assertion == "$":
        return at == len(text)
    before = at > 0 and text[at - 1] in _WORD
    after = at < len(text) and text[at] in _WORD
    return (before != after) == (assertion == "b")


def _in(chars: frozenset[str]) -> _Test:
    return lambda char: char in chars


def _not(test: _Test) -> _Test:
    return lambda char: not test(char)


def _between(low: str, high: str) -> _Test:
    return lambda char: low <= char <= high


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._any()
        if self._at < len(self._pattern):
            raise PatternInvalid("a ) is too much")
        return node

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise PatternInvalid("it ends too early")
        self._at += 1
        return char

    def _takes(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _any(self) -> _Node:
        branches = [self._all()]
        while self._takes("|"):
            branches.append(self._all())
        return branches[0] if len(branches) == 1 else _node("any", *branches)

    def _all(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._one()))
        return _node("all", *parts)

    def _repeated(self, node: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        self._takes("?")  # lazy or greedy: the same for whether it matches
        if self._bounds() is not None:
            raise PatternInvalid("a repeat of a repeat needs a group")
        return _node("repeat", node, low=bounds[0], high=bounds[1])

    def _bounds(self) -> tuple[int, int] | None:
        for char, bounds in (("*", (0, -1)), ("+", (1, -1)), ("?", (0, 1))):
            if self._takes(char):
                return bounds
        end = self._pattern.find("}", self._at)
        if self._peek() != "{" or end < 0:
            return None
        low, comma, high = self._pattern[self._at + 1 : end].partition(",")
        if not _is_number(low) or (high and not _is_number(high)):
            return None  # then { is a character like others
        self._at = end + 1
        least = int(low)
        most = int(high) if high else (-1 if comma else least)
        if least > MAX_PROGRAM or most > MAX_PROGRAM or 0 <= most < least:
            raise PatternInvalid("a repeat has bounds that can't be")
        return least, most

    def _one(self) -> _Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return _node("char", test=self._set())
        if char == ".":
            return _node("char", test=_not(_in(frozenset("\n"))))
        if char in "^$":
            return _node("assert", what=char)
        if char in "*+?":
            raise PatternInvalid(f"there is nothing before {char} to repeat")
        if char == "\\":
            special = self._peek()
            if special in ("b", "B", "A", "z"):
                self._at += 1
                return _node("assert", what={"A": "^", "z": "$"}.get(special, special))
            test, _ = self._escape()
            return _node("char", test=test)
        return _node("char", test=_in(frozenset(char)))

    def _group(self) -> _Node:
        if self._takes("?P<"):
            end = self._pattern.find(">", self._at)
            if end < 0:
                raise PatternInvalid("a group's name does not end")
            self._at = end + 1
        elif not self._takes("?:") and self._peek() == "?":
            raise PatternInvalid("flags and look-around are not supported")
        self._depth += 1
        if self._depth > MAX_PATTERN_DEPTH:
            raise PatternInvalid("it has too many groups in groups")
        node = self._any()
        self._depth -= 1
        if not self._takes(")"):
            raise PatternInvalid("a ) is missing")
        return node

    def _escape(self) -> tuple[_Test, str]:
        """Return what an escape matches, and the one character that it is ("" for a class)."""
        char = self._take()
        if char.lower() in _CLASSES:
            test = _in(_CLASSES[char.lower()])
            return (test if char.islower() else _not(test)), ""
        if char == "x":
            digits = self._hex()
            literal = chr(int(digits, 16))
        elif char in _ESCAPES:
            literal = _ESCAPES[char]
        elif char.isascii() and not char.isalnum():
            literal = char
        else:
            raise PatternInvalid(f"the escape \\{char} is not supported")
        return _in(frozenset(literal)), literal

    def _hex(self) -> str:
        if self._takes("{"):
            end = self._pattern.find("}", self._at)
            digits, self._at = self._pattern[self._at : max(end, self._at)], end + 1
        else:
            digits = self._take() + self._take()
        if not digits or not all(c in "0123456789abcdefABCDEF" for c in digits) or int(digits, 16) > 0x10FFFF:
            raise PatternInvalid("a hexadecimal escape is malformed")
        return digits

    def _set(self) -> _Test:
        negated = self._takes("^")
        tests: list[_Test] = []
        first = True
        while first or not self._takes("]"):
            first = False
            if self._pattern.startswith("[:", self._at):
                raise PatternInvalid("named classes are not supported")
            low = self._take()
            if low == "\\":
                test, low = self._escape()
            else:
                test = _in(frozenset(low))
            if low and self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._take()
                if high == "\\":
                    _, high = self._escape()
                if not high or high < low:
                    raise PatternInvalid("a range of characters is malformed")
                test = _between(low, high)
            tests.append(test)
        return (
            (lambda char: not any(test(char) for test in tests))
            if negated
            else (lambda char: any(test(char) for test in tests))
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 4
