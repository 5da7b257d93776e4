"""Values are set in other people's TOML files without touching anything else in them."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.deploy import toml_edit
from lazyfs.deploy.toml_lines import statements
from lazyfs.errors import UsageError

CRI = ("plugins", "io.containerd.grpc.v1.cri", "containerd")
WANTED: dict[toml_edit.Path, toml_edit.Value] = {
    ("version",): 2,
    ("proxy_plugins", "lazyfs", "type"): "snapshot",
    ("proxy_plugins", "lazyfs", "exports", "root"): "/var/lib/lazyfs",
    (*CRI, "snapshotter"): "lazyfs",
    (*CRI, "disable_snapshot_annotations"): False,
}

SHAPES = {
    "empty": "",
    "comments": "# ours\n\n# no settings yet",
    "no line end": 'root = "/x"',
    "tables": '[plugins]\n  [plugins."io.containerd.grpc.v1.cri"]\n    x = 1 # one\n    [plugins.cri.y]\n',
    "literal quotes": "[plugins.'io.containerd.grpc.v1.cri'.'containerd']\n\tsnapshotter = 'overlayfs' # was native\n",
    "escapes": '[plugins."io.containerd.grpc.v1\\u002Ecri".containerd]\nsnapshotter = """over\nlayfs"""\n',
    "dotted": '[plugins."io.containerd.grpc.v1.cri"]\ncontainerd.snapshotter = "overlayfs"\ncontainerd.x = 1\n',
    "blanks": ' [ plugins . "io.containerd.grpc.v1.cri" . containerd ] # here\n snapshotter="x"#y\n',
    "windows": 'version = 2\r\n[proxy_plugins]\r\n[proxy_plugins.lazyfs]\r\naddress = "x"\r\n',
    "strings like headers": 'a = """\n[proxy_plugins.lazyfs]\ntype = "no"\n"""\nb = [ # [x]\n "]", \'[\',\n]\n'
    'c = """""""\n',
    "arrays of tables": '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = "linux"\n[last]\nx=1',
    "set already": 'version = 2\n[proxy_plugins.lazyfs]\ntype="snapshot"\n',
    "end of a table": '[plugins."io.containerd.grpc.v1.cri".containerd]\n\n  # why\n\n[other]\nx = 1\n',
}


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_shapes(text: str) -> None:
    after = toml_edit.set_values(text, WANTED, "it")
    found = tomllib.loads(after)
    assert found["proxy_plugins"]["lazyfs"]["exports"]["root"] == "/var/lib/lazyfs"
    assert found["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["snapshotter"] == "lazyfs"
    assert found["version"] == 2
    kept = [line for line in text.splitlines() if "snapshotter" not in line and "layfs" not in line]
    lines = iter(after.splitlines())
    assert all(line in lines for line in kept)  # all of them, in their order
    assert "\r\n" not in text or after.count("\n") == after.count("\r\n")
    assert toml_edit.set_values(after, WANTED, "it") == after


def test_a_value_is_replaced_where_it_stands() -> None:
    text = '# a\nx = 1\n[t]  # b\n  name = "old"  # c\n\n[u]\ny = 2\n'
    after = toml_edit.set_values(text, {("t", "name"): "new", ("t", "more"): ["a", 'b"']}, "it")
    assert after == '# a\nx = 1\n[t]  # b\n  name = "new"  # c\n  more = ["a", "b\\""]\n\n[u]\ny = 2\n'


@pytest.mark.parametrize(
    "text",
    [
        'proxy_plugins = {}\n[x]\na = "b"',
        "[[proxy_plugins]]\n",
        "proxy_plugins = 1\n",
        "[proxy_plugins.lazyfs]\ntype = {a = 1}\n",
        "[proxy_plugins]\nlazyfs = {}\n",
        "{{ template }}\n",
        "a = 1\na = 2\n",
        "\ufeffversion = 2\n",
    ],
)
def test_what_can_not_be_edited_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the file"):
        toml_edit.set_values(text, WANTED, "the file")


NAMES = st.sampled_from(["a", "b", "c.d", "proxy_plugins", "lazyfs", 'q"', "'", "é", "", "x y", "[z]", "#"])
SCALARS = st.one_of(
    st.integers(-5, 5), st.booleans(), st.text("ab\"'\\#[]={}\n é", max_size=6), st.just("long\n[x]\ny = 1\n")
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
DOCUMENTS = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=3),
    lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=3),
    max_leaves=6,
)


def written(document: dict[str, Any], draw: Any, at: tuple[str, ...] = ()) -> str:
    """Write a document in one of TOML's many ways."""
    text, tables = "", ""
    for name, value in document.items():
        if isinstance(value, dict):
            if at and value and draw(st.integers(0, 4)) == 0:
                text += f"{key(name)} = {inline(value)} # inline\n"
            else:
                head = ".".join(key(part) for part in (*at, name))
                tables += f"{draw(st.sampled_from(['', '  ']))}[{head}] # [no]\n{written(value, draw, (*at, name))}"
        else:
            text += f"{draw(st.sampled_from(['', ' ']))}{key(name)} = {inline(value)}{draw(COMMENTS)}\n"
    return text + tables


COMMENTS = st.sampled_from(["", " # comment", "#[t]", " \t"])


def key(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {inline(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str) and "\n" in value and "'''" not in value and not value.endswith("'"):
        return f"'''\n{value}'''"
    return json.dumps(value, ensure_ascii=False)


@given(st.data(), DOCUMENTS, st.lists(NAMES, min_size=1, max_size=3), SCALARS)
def test_any_document_says_what_it_said_and_the_new_value(
    data: st.DataObject, document: dict[str, Any], path: list[str], value: Any
) -> None:
    text = written(document, data.draw)
    before = tomllib.loads(text)
    try:
        after = toml_edit.set_values(text, {tuple(path): value}, "it")
    except UsageError:
        tables = [document]
        for part in path:
            inner = tables[-1].get(part) if isinstance(tables[-1], dict) else None
            tables.append(inner)  # type: ignore[arg-type]
        in_the_way = any(table is not None and not isinstance(table, dict) for table in tables[:-1])
        assert in_the_way or isinstance(tables[-1], dict) or "# inline" in text
        return
    found = tomllib.loads(after)
    at = found
    for part in path[:-1]:
        at = at[part]
    assert at.pop(path[-1]) == value
    assert without(found, path) == without(before, path)
    assert after.count("#") >= text.count("# comment")


def without(document: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """Return the document less what lies at the path, and less tables that are empty then."""
    if path[0] not in document:
        return document
    rest = {name: value for name, value in document.items() if name != path[0]}
    inner = document[path[0]]
    if len(path) > 1 and isinstance(inner, dict):
        left = without(inner, path[1:])
        return {**rest, path[0]: left} if left else rest
    return rest


@given(st.text("ab[]{}=.\"'#\\\n\r\t ,1é", max_size=60))
@example('a = "')
@example("a = [")
@example("[")
@example('"a')
def test_no_text_surprises_the_scanner(text: str) -> None:
    try:
        found = list(statements(text))
    except (ValueError, StopIteration):
        return
    assert [one.start for one in found] == sorted(one.start for one in found)


@given(st.text(max_size=60))
def test_no_text_surprises_the_editor(text: str) -> None:
    try:
        after = toml_edit.set_values(text, WANTED, "it")
    except UsageError:
        return
    assert tomllib.loads(after)["version"] == 2
