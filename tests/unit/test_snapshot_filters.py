"""containerd's filter language, and its regular expressions, against Python's own where they mean the same."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import SnapshotInvalid
from lazyfs.limits import MAX_PATTERN
from snapshotter.filters import parse_all
from snapshotter.model import Kind, Snapshot
from snapshotter.regexp import Pattern, PatternInvalid

REF = "containerd.io/snapshot.ref"
CHAIN = "sha256:" + "a" * 64


def snapshot(**labels: str) -> Snapshot:
    named = {REF: CHAIN, "l": "1", "a.b": "dotted", **labels}
    return Snapshot("k8s.io/7/name", "the/parent", Kind.COMMITTED, named, 1, 1, 1)


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ([], True),
        ([""], True),
        (["name==k8s.io/7/name"], True),
        (["name==other", "kind==committed"], True),
        (["name==other,kind==committed"], False),
        ([f'labels."{REF}"=={CHAIN},parent=="the/parent"'], True),
        ([f'labels."{REF}"=={CHAIN},parent==the/other'], False),
        ([f' labels . "{REF}" == {CHAIN} , kind==committed'], True),
        (["labels.l"], True),
        (["labels.missing"], False),
        (["labels.missing!=x"], True),
        (["labels.missing==x"], False),
        (["labels.l!=1"], False),
        (["labels.a.b==dotted"], True),
        (['labels."a.b"==dotted'], True),
        (["nosuchfield"], False),
        (["nosuchfield!=1"], True),
        (["kind==active"], False),
        (["name~=/7/"], True),
        (["name~=|^k8s\\\\.io/[0-9]+/|"], True),
        (["name~=/^k8s\\\\.io\\/7/"], True),
        (["name~=^name$"], False),
        ([r'labels.l=="\x31"'], True),
        ([r'labels.l=="\061"'], True),
        ([r'labels.l=="\u0031"'], True),
        ([r'labels.l=="\xff"'], False),
    ],
)
def test_filters(filters: list[str], matches: bool) -> None:
    assert parse_all(filters)(snapshot()) is matches


@pytest.mark.parametrize(
    "text",
    [
        ",", "name==", "name==a,", "==a", "name=a", "name===a", "name==/a/", 'name=="a', 'name=="\\q"', "name=='a' b",
        "name a", ".name", "name.", 'name=="\\x1"', "name~=(", "name~=|a**|", "name~=/\\", "\0",
        'name=="\n"', "a" * 20000,
        'name=="\\400"', 'name=="\\U00110000"', "name~=(?=a)", "name~=(a{1000}){1000}",
        "name~=" + "a" * (MAX_PATTERN + 1),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(SnapshotInvalid) as caught:
        parse_all(["name==fine", text])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_too_many_filters() -> None:
    with pytest.raises(SnapshotInvalid):
        parse_all(["name==a"] * 101)


@given(st.text(max_size=60) | st.text('name.labels"=!~/|\\,() \t1x', max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        match = parse_all([text])
    except SnapshotInvalid:
        return
    assert match(snapshot()) in (True, False)


@given(st.text(), st.text())
def test_a_quoted_label_and_value_are_found(name: str, value: str) -> None:
    def quote(text: str) -> str:
        return '"' + "".join(f"\\U{ord(c):08x}" if c in '\\"\n\0' else c for c in text) + '"'

    assert parse_all([f"labels.{quote(name)}=={quote(value)}"])(snapshot(**{name: value}))
    assert not parse_all([f"labels.{quote(name)}!={quote(value)}"])(snapshot(**{name: value}))


# -- regular expressions ---------------------------------------------------------------------------------------------

_atoms = st.sampled_from(
    ["a", "b", "-", ".", "[ab]", "[^a]", "[a-c]", r"\d", r"\W", r"\.", "^", "$", r"\b", "(?:ab|b)"]
)
_patterns = st.recursive(
    _atoms,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map("|".join)
        | inner.map(lambda part: f"({part})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])).map(
            lambda x: f"({x[0]}){x[1]}"
        )
    ),
    max_leaves=6,
)


@given(_patterns, st.text("ab-c1. ", max_size=12))
def test_patterns_mean_what_they_mean_elsewhere(pattern: str, text: str) -> None:
    # "$" of Python also matches before a last newline; there is none in these texts.
    assert Pattern(pattern).search(text) == (re.search(pattern, text, re.ASCII) is not None)


@given(st.text(max_size=40) | st.text("ab()[]{}*+?|\\^$.-,0123:P<>x", max_size=40))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternInvalid:
        return
    pattern.search("ab(1")


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("", "", True),
        ("a{,2}", "a{,2}", True),  # no repeat: literal
        ("x{", "x{", True),
        ("(?P<name>a)b", "ab", True),
        (r"\x41\x{42}", "AB", True),
        (r"\Aab\z", "ab\n", False),
        ("[]a]", "]", True),
        (r"[\d-]", "-", True),
        ("a.c", "a\nc", False),
        ("ä+", "ää", True),
    ],
)
def test_the_less_usual(pattern: str, text: str, found: bool) -> None:
    assert Pattern(pattern).search(text) is found


def test_no_pattern_takes_exponential_time() -> None:
    """Backtracking would take longer than the universe lasts: the test would not end."""
    assert not Pattern("^(((a+)+)+)+$").search("a" * 200 + "b")
