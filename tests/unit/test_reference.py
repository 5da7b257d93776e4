"""Image references as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import ReferenceInvalid
from lazyfs.reference import Reference, parse

D = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", Reference("docker", "docker.io", "library/debian", "", "latest")),
        ("debian:12", Reference("docker", "docker.io", "library/debian", "", "12")),
        ("team/app", Reference("docker", "docker.io", "team/app", "", "latest")),
        ("docker.io/debian", Reference("docker", "docker.io", "library/debian", "", "latest")),
        ("index.docker.io/library/debian:x", Reference("docker", "docker.io", "library/debian", "", "x")),
        ("registry.example/a/b/c:v1.2-3_4", Reference("docker", "registry.example", "a/b/c", "", "v1.2-3_4")),
        ("docker://registry.example/a/b", Reference("docker", "registry.example", "a/b", "", "latest")),
        ("localhost/a", Reference("docker", "localhost", "a", "", "latest")),
        ("localhost:5000/a:t", Reference("docker", "localhost:5000", "a", "", "t")),
        ("127.0.0.1:5000/debian:base", Reference("docker", "127.0.0.1:5000", "debian", "", "base")),
        ("[::1]:5000/debian", Reference("docker", "[::1]:5000", "debian", "", "latest")),
        (f"h.example/a@{D}", Reference("docker", "h.example", "a", "", "", D)),
        (f"h.example/a:t@{D}", Reference("docker", "h.example", "a", "", "t", D)),
        ("oci:dir", Reference("oci", path="dir")),
        ("oci:dir:tag", Reference("oci", path="dir", tag="tag")),
        ("oci:/a/b:c/d", Reference("oci", path="/a/b:c/d")),
        (f"oci:/a/b@{D}", Reference("oci", path="/a/b", digest=D)),
        (f"oci:/a@b/c:t@{D}", Reference("oci", path="/a@b/c", tag="t", digest=D)),
        ("oci:/my images/b:t", Reference("oci", path="/my images/b", tag="t")),
        ("oci:/a/b:docker.io/x", Reference("oci", path="/a/b:docker.io/x")),
    ],
)
def test_what_is_understood(text: str, expected: Reference) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " debian", "debian ", "a b", "a\nb", "Debian", "docker.io/UPPER", "h.example/", "a//b", "a/../b",
        "-a", "a:", "a:-t", "a:" + "t" * 129, "a@sha256:00", "a@md5:" + "0" * 32, f"a@{D}0", "h.example:port/a",
        "http://h.example/a", "containers-storage:x", "docker-daemon:x", "oci:", "oci:a\nb", "oci-archive:x",
        "a" * 300, "[::1/a",
        "user@h.example/a", "h.example/a?x=1", "h.example/a#x", "h.example/a%2fb",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ReferenceInvalid):
        parse(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.1.2.3", True),
        ("[::1]:80", True),
        ("[::1]", True), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("128.0.0.1", False),
        ("registry.example:5000", False),
    ],
)  # fmt: skip
def test_loopback_is_only_loopback(host: str, expected: bool) -> None:
    assert parse(f"{host}/a").is_loopback is expected


@pytest.mark.parametrize("text", ["debian", f"h.example:5000/a/b:t@{D}", f"h.example/a@{D}", "oci:/a/b:t", "oci:rel"])
def test_written_out_it_means_the_same(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_the_digest_is_what_is_asked_for() -> None:
    pinned = parse("h.example/a:t").with_digest(D)
    assert (parse("h.example/a:t").target, pinned.target, pinned.tag) == ("t", D, "t")


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=80))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = parse(text)
    except ReferenceInvalid:
        return
    assert parse(str(found)) == found
