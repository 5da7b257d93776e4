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
        ("oci-archive:a.tar", Reference("oci-archive", path="a.tar")),
        ("oci-archive:/my files/a.tar:v1", Reference("oci-archive", path="/my files/a.tar", tag="v1")),
        ("oci-archive:a.tar:h/x:1", Reference("oci-archive", path="a.tar", tag="h/x:1")),
        (f"oci-archive:a.tar@{D}", Reference("oci-archive", path="a.tar", digest=D)),
        ("docker-archive:a.tar", Reference("docker-archive", path="a.tar")),
        ("docker-archive:/a b.tar:@3", Reference("docker-archive", path="/a b.tar", tag="@3")),
        ("docker-archive:a.tar:app", Reference("docker-archive", path="a.tar", tag="docker.io/library/app:latest")),
        ("docker-archive:a.tar:h:1/a:b", Reference("docker-archive", path="a.tar", tag="h:1/a:b")),
        (f"docker-archive:/a@b.tar@{D}", Reference("docker-archive", path="/a@b.tar", digest=D)),
        ("docker-archive:/a@b.tar", Reference("docker-archive", path="/a@b.tar")),
        ("containerd:docker.io/library/app:1", Reference("containerd", tag="docker.io/library/app:1")),
        ("containerd:app", Reference("containerd", tag="app")),
        ("containerd://k8s.io/h/app:1", Reference("containerd", "k8s.io", tag="h/app:1")),
        (f"containerd:h/app@{D}", Reference("containerd", tag="h/app", digest=D)),
        ("containerd:a?address=/run/x.sock", Reference("containerd", path="/run/x.sock", tag="a")),
        ("containerd:5000/app", Reference("docker", "containerd:5000", "app", "", "latest")),
    ],
)
def test_what_is_understood(text: str, expected: Reference) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " debian", "debian ", "a b", "a\nb", "Debian", "docker.io/UPPER", "h.example/", "a//b", "a/../b",
        "-a", "a:", "a:-t", "a:" + "t" * 129, "a@sha256:00", "a@md5:" + "0" * 32, f"a@{D}0", "h.example:port/a",
        "http://h.example/a", "containers-storage:x", "docker-daemon:x", "oci:", "oci:a\nb", "oci-archive:",
        "docker-archive:", "oci:a:",
        "docker-archive::x", "docker-archive:/a:b:c/D", "containerd:", "containerd://ns", "containerd://-/a",
        "containerd:///a", "containerd:a?address=run/x", "dir:x", "containerd:a b",
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


@pytest.mark.parametrize(
    "text", ["debian", f"h.example:5000/a/b:t@{D}", f"h.example/a@{D}", "oci:/a/b:t", "oci:rel", "docker-archive:x:a"]
)
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


_NAMES = st.text(alphabet="abz/._-@: 1", max_size=30)


@given(st.sampled_from(("oci:", "oci-archive:", "docker-archive:", "containerd:", "containerd://")), _NAMES, _NAMES)
def test_every_transport_is_written_out_as_it_is_read(transport: str, name: str, tag: str) -> None:
    for text in (
        transport + name,
        f"{transport}{name}:{tag}",
        f"{transport}{name}@{D}",
        f"{transport}{name}?address=/{tag}",
    ):
        try:
            found = parse(text)
        except ReferenceInvalid:
            continue
        assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "way"), [("containers-storage:x", "oci-archive"), ("docker-daemon:x:1", "docker save"), ("dir:x", "oci:")]
)
def test_what_other_tools_have_comes_with_the_way_round(text: str, way: str) -> None:
    with pytest.raises(ReferenceInvalid, match="is not supported") as caught:
        parse(text)
    assert way in caught.value.hint


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("registry.example:5000/team/app:1", "registry.example:5000/team/app"),
        ("debian", "docker.io/library/debian"),
        ("oci:images/app:1", "images/app"),
        ("docker-archive:app.tar", "app.tar"),
        ("containerd:registry.example:5000/team/app:1", "registry.example:5000/team/app"),
        ("containerd:registry.example:5000/team/app@sha256:" + "0" * 64, "registry.example:5000/team/app"),
    ],
)
def test_origin(text: str, origin: str) -> None:
    assert parse(text).origin == origin
