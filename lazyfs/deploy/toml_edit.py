"""Setting values in a TOML document without touching anything else in it: comments, order and spelling stay."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Mapping
from typing import Any

from lazyfs.deploy.toml_lines import Statement, statements
from lazyfs.errors import UsageError

Value = str | bool | int | list[str]
Path = tuple[str, ...]


def parse(text: str, name: str) -> dict[str, Any]:
    """Return what a document says; `name` is for the message. Raise UsageError for one that is no TOML."""
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{name} is no TOML that can be edited: {error}") from None


def set_values(text: str, values: Mapping[Path, Value], name: str) -> str:
    """Return the document with each path set to its value; what is so already is not touched.

    The result is parsed and says what it did, and besides that only what was to be set; where this can't be brought
    about (an inline table in the way, a value that is a table) UsageError is raised. `name` is for its message.
    """
    wanted = parse(text, name)
    for path, value in values.items():
        before = wanted
        wanted = copy.deepcopy(wanted)
        try:
            _put(wanted, path, value)
        except TypeError:
            raise _unfit(name, path) from None
        if wanted == before:
            continue
        try:
            text = _set_one(text, path, value)
            good = tomllib.loads(text) == wanted
        except (ValueError, StopIteration):
            good = False
        if not good:
            raise _unfit(name, path)
    return text


def dotted(path: Path) -> str:
    """Return a path as TOML writes it."""
    return ".".join(part if part and part.isascii() and part.replace("-", "a").replace("_", "a").isalnum() else
                    json.dumps(part, ensure_ascii=False) for part in path)  # fmt: skip


def render(value: Value) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(render(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()


def _unfit(name: str, path: Path) -> UsageError:
    return UsageError(f"{name} is written in a way that {dotted(path)} can't be set in it", hint="set it by hand")


def _put(document: dict[str, Any], path: Path, value: Value) -> None:
    at = document
    for part in path[:-1]:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise TypeError
    if isinstance(at.get(path[-1]), dict):
        raise TypeError
    at[path[-1]] = value


def _set_one(text: str, path: Path, value: Value) -> str:
    found = [statement for statement in statements(text) if not statement.in_array]
    for statement in found:
        if statement.value is not None and statement.path == path:
            first, last = statement.value
            return text[:first] + render(value) + text[last:]
    newline = "\r\n" if "\r\n" in text else "\n"
    line = f"{dotted(path[-1:])} = {render(value)}{newline}"
    table = path[:-1]
    if not table:
        return _insert(text, _last_of_root(text), line, newline)
    header = next((s for s in found if s.value is None and s.path == table), None)
    if header is not None:
        last_line, indent = _last_of(header, text)
        return _insert(text, last_line, indent + line, newline)
    beside = [s for s in found if s.value is not None and s.path[: len(table)] == table and len(s.table) < len(table)]
    if beside:  # the table is one of dotted keys, and can have no header
        line = f"{dotted(path[len(beside[-1].table) :])} = {render(value)}{newline}"
        return _insert(text, beside[-1].end, _indent(text, beside[-1]) + line, newline)
    gap = newline if text.strip() else ""
    text = text if text.endswith("\n") or not text else text + newline
    return f"{text}{gap}[{dotted(table)}]{newline}  {line}"


def _insert(text: str, at: int, line: str, newline: str) -> str:
    before = text[:at]
    if before and not before.endswith("\n"):
        before += newline
    return before + line + text[at:]


def _last_of_root(text: str) -> int:
    """Return the offset behind the last key that stands before any table, or where a first one may stand."""
    end = None
    for statement in statements(text):
        if statement.value is None:
            return end or 0
        end = statement.end
    return len(text)


def _last_of(header: Statement, text: str) -> tuple[int, str]:
    """Return the offset behind the last key of a table, and the indentation of a further one."""
    end, indent = header.end, _indent(text, header) + "  "
    inside = False
    for statement in statements(text):
        if statement.value is None:
            inside = statement.start == header.start
        elif inside:
            end, indent = statement.end, _indent(text, statement)
    return end, indent


def _indent(text: str, statement: Statement) -> str:
    line = text[statement.start : statement.end]
    return line[: len(line) - len(line.lstrip(" \t"))]
