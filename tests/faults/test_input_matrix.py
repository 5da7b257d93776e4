"""Images that were made to harm, side by side on one daemon: refused, fetched in full, or read as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lazyfs.format.zstd_chunked import encode_tail
from tests.faults.cases import LASTING, NOTHING_SHOWN, RIGHT, Area, Case, shows
from tests.helpers.blobs import LayerBlob, crowded, toc_entry, zstd_chunked_layer
from tests.helpers.fault_bench import Bench, Victim
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, hardlink, symlink, tar_of

DATA = pattern(200_000, 11)
TAR = tar_of(file("data", DATA), file("other", pattern(200_000, 12)))
IN_FULL = "the mount and `status` say why it is fetched in full: “…{}…”"


@pytest.fixture(scope="module")
def bench(module_scratch: Path) -> Iterator[Bench]:
    with Bench(module_scratch, DRIVER="fuse") as one:
        yield one


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def told(**edits: Callable[[dict[str, Any], dict[str, Any]], object]) -> LayerBlob:
    """Return a layer whose TOC an attacker has changed: `edit` gets the entries of `data` and `other`."""

    def edit(toc: dict[str, Any]) -> None:
        for change in edits.values():
            change(toc_entry(toc, "data"), toc_entry(toc, "other"))

    return zstd_chunked_layer(TAR, frame_size=0, edit_toc=edit)


def frame_bomb() -> LayerBlob:
    """Return a layer whose first frame unpacks to a gigabyte."""
    honest = zstd_chunked_layer(tar_of(file("data", pattern(200_000, 13))))  # which no other layer has
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    tail, annotations = encode_tail(honest.toc, len(bomb), 3)
    return replace(honest, blob=bomb + tail, annotations={**honest.annotations, **annotations})


@dataclass(frozen=True, slots=True)
class Refused:
    """A TOC that lies in a way that is seen at once. The layer has a diff ID still. `says`: of the mount's remark."""

    id: str
    fault: str
    says: str
    layer: Callable[[], LayerBlob]

    @property
    def case(self) -> Case:
        return Case(f"input-{self.id}", Area.INPUT, self.fault, RIGHT, IN_FULL.format(self.says), param=self.id)


def borrowed(data: dict[str, Any], other: dict[str, Any]) -> None:
    other["offset"] = data["offset"]


def beyond(data: dict[str, Any], other: dict[str, Any]) -> None:
    other["offset"] = 1 << 40


def huge(data: dict[str, Any], other: dict[str, Any]) -> None:
    data["size"] = 1 << 62


def cycle(data: dict[str, Any], other: dict[str, Any]) -> None:
    other.clear()
    other.update(name="other", type="hardlink", linkName="other")


def outside(data: dict[str, Any], other: dict[str, Any]) -> None:
    other["name"] = "../../etc/passwd"


REFUSED = [
    Refused("overlaps", "chunks of two files overlap in the blob", "blob order", lambda: told(edit=borrowed)),
    Refused("beyond", "a chunk lies behind the end of the blob", "last frame", lambda: told(edit=beyond)),
    Refused("huge-file", "a file of 4 EiB", "size", lambda: told(edit=huge)),
    Refused("cycles", "a hard link to itself", "is a hard link to itself", lambda: told(edit=cycle)),
    Refused("outside", "a name that leads out of the root", "out of the root", lambda: told(edit=outside)),
]


@shows(*(each.case for each in REFUSED))
@pytest.mark.parametrize("each", REFUSED, ids=[each.id for each in REFUSED])
def test_lies_that_are_seen_at_once_cost_a_full_fetch(bench: Bench, each: Refused) -> None:
    victim = bench.victim(each.id, each.layer(), DATA)
    (reason,) = bench.show(victim, ("fuse",))
    assert each.says in reason and reason in bench.node.lazyfs("status").stdout
    for tried in bench.read_all([victim], 20)[victim.name]:
        assert (tried.data, tried.words) == (DATA, "")


@shows(
    Case(
        "input-frame-bomb",
        Area.INPUT,
        "a frame that unpacks to a gigabyte of something else",
        LASTING,
        "log: “damaged or tampered with”",
        '`errors_total{class="DigestMismatch"}`',
    )
)
def test_a_frame_that_is_a_bomb(bench: Bench) -> None:
    victim = bench.victim("bomb", frame_bomb(), DATA)
    bench.show(victim)
    before = bench.node.status()["daemon"]["memory"]
    for tried in bench.read_all([victim], 20)[victim.name]:
        assert tried.failed and tried.data == b""
    assert bench.node.status()["daemon"]["memory"] < before + (100 << 20)
    assert bench.errors()["DigestMismatch"] >= 1
    assert "damaged or tampered with" in bench.node.log()


READ_NAMES = """
import hashlib
top, found = os.fsencode(a[0]), {}
for name in os.listdir(top):
    with open(os.path.join(top, name), "rb") as handle:
        found[name.hex()] = hashlib.sha256(handle.read()).hexdigest()
print(json.dumps(found))
"""
NAMES = [
    b"new\nline", b"tab\tback\\slash", b"\xff\xfe not UTF-8", "r\xe9sum\xe9".encode("latin-1"), "日本語".encode(),
    b"-rf", b"x" * 255, b" ", b"\x01\x7f\x1b[31m", b"%s{}$(touch x)`'\"",
]  # fmt: skip


@shows(
    Case(
        "input-odd-names",
        Area.INPUT,
        "names with newlines, escapes and invalid UTF-8, of 255 bytes, of blanks",
        RIGHT,
        "nothing",
    )
)
def test_odd_names(bench: Bench) -> None:
    contents = {name: pattern(3000, number) for number, name in enumerate(NAMES, 20)}
    tar = tar_of(file("data", DATA), *(file(b"odd/" + name, data) for name, data in contents.items()))
    victim = bench.victim("odd", zstd_chunked_layer(tar), DATA)
    bench.show(victim)
    for tree in victim.trees.values():
        found = bench.node.python(READ_NAMES, tree / "odd")
        assert found == {name.hex(): digest_of(data)[7:] for name, data in contents.items()}


@shows(
    Case("input-symlink-loop", Area.INPUT, "symbolic links in a circle, and files below one", "ELOOP", "nothing"),
)
def test_symlinks_in_a_circle(bench: Bench) -> None:
    tar = tar_of(file("data", DATA), symlink("a", "b"), symlink("b", "a"), symlink("self", "self/x"))
    victim = bench.victim("loop", zstd_chunked_layer(tar), DATA)
    bench.show(victim)
    for tree in victim.trees.values():
        for name in ("a", "b", "self"):
            assert "Too many levels of symbolic links" in bench.node.read_fails(tree / name)
        assert bench.node.read(tree / "data") == DATA


@shows(
    Case(
        "input-link-cycle-plain",
        Area.INPUT,
        "a layer without a TOC whose hard links go in a circle",
        NOTHING_SHOWN,
        "exit 7, names the entry",
    )
)
def test_hard_links_in_a_circle_of_a_plain_layer(bench: Bench) -> None:
    victim = bench.victim("circle")
    image = victim.registry.add_image("circle", "latest", [tar_of(hardlink("a", "b"), hardlink("b", "a"))])
    sentence = bench.node.refused(7, "--quiet", "mount", image.reference, bench.node.new_dir())
    assert "'a'" in sentence


@shows(
    Case(
        "input-million-names",
        Area.INPUT,
        "a million names in one directory",
        "right names and bytes",
        "nothing",
    )
)
def test_a_million_names_in_a_directory(bench: Bench) -> None:
    count = 1_000_000
    victim: Victim = bench.victim("crowd", crowded(count), b"crowded")
    bench.show(victim)
    for tree in victim.trees.values():
        assert bench.node.read(tree / "data") == b"crowded"
        code = "print(json.dumps([os.stat(a[0] + '/%d' % n).st_size for n in (0, 77777, 999999)]))"
        assert bench.node.python(code, tree / "crowd") == [0, 0, 0]
        assert "No such file" in bench.node.read_fails(tree / "crowd" / "1000000")
    code = "names = os.listdir(a[0]); print(json.dumps([len(names), len(set(names))]))"
    assert bench.node.python(code, victim.trees["erofs"] / "crowd", timeout=60) == [count, count]
    code = "import itertools; print(json.dumps(len(list(itertools.islice(os.scandir(a[0]), 20000)))))"
    assert bench.node.python(code, victim.trees["fuse"] / "crowd", timeout=60) == 20000
