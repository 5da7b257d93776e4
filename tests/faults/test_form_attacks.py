"""Authors of images against the reader, over all forms: a lazy layer shows what its full unpack leaves, or nothing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import zstandard

from lazyfs.chunks.frames import fetch_frames
from lazyfs.config import Settings
from lazyfs.errors import TocMismatch
from lazyfs.format.entry import LANDMARK, NO_LANDMARK, TOC_NAME
from lazyfs.format.lazy import TocSource, toc_source
from lazyfs.limits import MAX_DECODED
from lazyfs.mount.preparing import Preparer
from lazyfs.oci import OCI_LAYER_ZSTD, OCI_MANIFEST, TOC_DIGEST, ZSTD_POSITION, Descriptor, Manifest
from lazyfs.units import MiB
from tests.helpers.blobs import LayerBlob, Toc, resealed, toc_entry, zstd_chunked_layer
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.foreign import estargz_layer, sha256, storage_layer
from tests.helpers.pattern import pattern
from tests.helpers.served import node as served_node
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of
from tests.unit.test_foreign_forms import check

Edit = Callable[[Toc], object]
Make = Callable[[bytes, Edit | None], LayerBlob]

MAKERS: dict[str, Make] = {
    "zstd:chunked": lambda tar, edit: zstd_chunked_layer(tar, chunk_size=1 << 20, frame_size=0, edit_toc=edit),
    "estargz": lambda tar, edit: estargz_layer(tar, chunk_size=1 << 20, edit_toc=edit),
    "containers/storage": lambda tar, edit: storage_layer(tar, chunk_size=1 << 20, edit_toc=edit),
    "podman 4": lambda tar, edit: storage_layer(tar, podman4=True, chunk_size=1 << 20, edit_toc=edit),
}
every_form = pytest.mark.parametrize("form", MAKERS)

REAL = pattern(70_000, 1)
FALSE = pattern(70_000, 2)
DEAD = pattern(3 << 20, 3)  # more than a reader fetches behind the frame that it wants
WITH_DEAD = tar_of(file("su", REAL), file("dead", DEAD), file("dead", b""))


def lie_of_content(toc: Toc) -> None:
    """Promise other bytes of the same size, which the node has from elsewhere."""
    empty = [one for one in toc["entries"] if one["type"] == "reg" and not one.get("size")]
    toc["entries"] = [toc_entry(toc, "su"), *empty]
    entry = toc_entry(toc, "su")
    for key in {"digest", "chunkDigest"} & set(entry):
        entry[key] = sha256(FALSE)


@every_form
async def test_a_false_digest_before_dead_bytes_is_found(form: str, scratch: Path, registry: FakeRegistry) -> None:
    layer = MAKERS[form](WITH_DEAD, lie_of_content)
    async with served_node(scratch) as one:
        served = one.serve(layer, registry)
        one.copies = lambda layer, digest: FALSE if digest == hashlib.sha256(FALSE).digest() else None
        with trio.fail_after(30):
            why = await one.filler.fill(served)
        assert "chunk 0" in why and not served.verified


@every_form
async def test_dead_bytes_behind_honest_ones_pass(form: str, scratch: Path, registry: FakeRegistry) -> None:
    layer = MAKERS[form](WITH_DEAD, None)
    async with served_node(scratch) as one:
        served = one.serve(layer, registry)
        with trio.fail_after(30):
            assert await one.filler.fill(served) == ""
        assert await one.read(served, b"su") == REAL
        assert await one.read(served, b"dead") == b""


def test_content_borrowed_from_another_layer_is_never_verified(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    donor = zstd_chunked_layer(tar_of(file("donor", FALSE)))
    beside = node.mount(add(registry, "beside", donor))
    node.until_verified()
    liar = add(registry, "liar", estargz_layer(WITH_DEAD, edit_toc=lie_of_content))
    directory = node.new_dir()
    done = node.lazyfs("mount", liar.reference, directory)
    if done.returncode == 0:
        until(lambda: node.layer(mount=1)["quarantine"], "the layer is found false")
        assert "Input/output error" in node.read_fails(directory / "su")
    assert "quarantined" in node.refused(6, "mount", liar.reference, node.new_dir())
    assert node.read(beside / "donor") == FALSE


# -- the names that a tree leaves out


def below_a_link(name: bytes) -> tuple[bytes, bytes]:
    """(A tar that unpacks to `etc/shadow`, one of the same names that doesn't.)"""
    shown = name.decode()
    tail = dir_("etc") + file(f"{shown}/shadow", b"root::")
    return tar_of(symlink(shown, "etc"), tail), tar_of(dir_(shown), tail)


@pytest.mark.parametrize("name", [LANDMARK, NO_LANDMARK, TOC_NAME])
@every_form
def test_a_landmark_that_is_a_link_leads_where_it_leads(form: str, name: bytes) -> None:
    linked, plain = below_a_link(name)
    shown = name.decode()

    def lie(toc: Toc) -> None:
        for entry in list(toc["entries"]):
            if entry["name"].rstrip("/") == shown:
                toc["entries"].remove(entry)

    with pytest.raises(TocMismatch):
        check(MAKERS[form](linked, lie))
    with pytest.raises(TocMismatch):  # its attributes would be nobody's
        check(MAKERS[form](plain, lie))
    for tar in linked, plain:
        if (form, name) == ("estargz", TOC_NAME):  # the TOC itself comes to that name at the end
            with pytest.raises(TocMismatch):
                check(MAKERS[form](tar, None))
        else:
            check(MAKERS[form](tar, None))


@every_form
def test_names_below_a_landmark_are_lies(form: str) -> None:
    tar = tar_of(file(".prefetch.landmark", b"\x0f"), file(".prefetch.landmark/x", b"x"))
    lie: Edit = lambda toc: toc["entries"].pop(0)  # noqa: E731
    with pytest.raises(TocMismatch):
        check(MAKERS["estargz" if form == "zstd:chunked" else form](tar, lie))


@every_form
def test_a_landmark_in_the_place_of_a_directory_passes(form: str) -> None:
    check(
        MAKERS[form](
            tar_of(
                dir_(".prefetch.landmark"),
                file(".prefetch.landmark/gone", b"gone"),
                file(".prefetch.landmark", b"\x0f"),
                symlink("up", "."),
                file("up/.no.prefetch.landmark", b"\x0f"),
                file("kept", b"kept"),
            ),
            None,
        )
    )


def test_a_directory_named_as_a_landmark_is_shown(node: Node, registry: FakeRegistry) -> None:
    tar = tar_of(dir_("stargz.index.json", mode=0o700), file("stargz.index.json/x", b"x"), file("y", b"y"))
    for name, layer in (("plain", tar), ("lazy", zstd_chunked_layer(tar))):
        tree = node.mount(add(registry, name, layer))
        assert node.read(tree / "stargz.index.json" / "x") == b"x"
        assert node.python("print(os.stat(a[0]).st_mode & 0o7777)", tree / "stargz.index.json") == 0o700


@every_form
def test_a_hard_link_to_a_landmark_is_no_way_to_hide_a_file(form: str) -> None:
    """Neither is it shown as something else: such a layer is refused."""
    tar = tar_of(file(".prefetch.landmark", b"\x0f"), file("a", b"a"), hardlink("sh", ".prefetch.landmark"))

    def lie(toc: Toc) -> None:
        toc_entry(toc, "sh")["linkName"] = "a"

    make = MAKERS["estargz" if form == "zstd:chunked" else form]
    with pytest.raises(TocMismatch):
        check(make(tar, lie))


# -- attributes


@every_form
def test_an_attribute_without_value_that_the_tar_has_not_is_a_lie(form: str) -> None:
    def lie(toc: Toc) -> None:
        toc_entry(toc, "su")["xattrs"] = {"security.capability": ""}

    with pytest.raises(TocMismatch, match="extended attributes"):
        check(MAKERS[form](tar_of(file("su", b"su")), lie))
    check(MAKERS[form](tar_of(file("su", b"su", xattrs={"security.capability": b""})), lie))


# -- bombs


async def test_small_frames_of_much_content_are_handed_on_as_they_come(scratch: Path, registry: FakeRegistry) -> None:
    """Sixteen KiB of frames hold half a gigabyte; never more than a little of it is in memory."""
    size, count = 4 << 20, 60
    content = bytes(size)
    tar = tar_of(*(file(f"{number:03}", content) for number in range(count)))
    layer = zstd_chunked_layer(tar, chunk_size=size, frame_size=0, level=19)
    assert layer.payload_end < 64 << 10
    handed: list[int] = []

    def deliver(arrived: dict[int, dict[int, bytes]]) -> None:
        handed.append(sum(len(data) for chunks in arrived.values() for data in chunks.values()))

    async with served_node(scratch) as one:
        served = one.serve(layer, registry, check=False)
        job = lambda: fetch_frames(served, 0, count, time.monotonic() + 30, deliver)  # noqa: E731
        fetched = await trio.to_thread.run_sync(job)
    assert not fetched.damaged
    assert sum(handed) == size * count
    assert max(handed) <= MAX_DECODED + size + MiB


async def test_large_tails_wait_for_their_turn(scratch: Path, registry: FakeRegistry) -> None:
    """A manifest can name hundreds of them; together they are more than a node has memory for."""
    small = zstd_chunked_layer(tar_of(file("a", REAL)))
    size = 1 << 30
    claims = {TOC_DIGEST: sha256(b"toc"), ZSTD_POSITION: f"{size - (100 << 20)}:{90 << 20}:{90 << 20}:1"}
    large = Descriptor(OCI_LAYER_ZSTD, sha256(b"large"), size, claims)
    assert isinstance(toc_source(large), TocSource)
    registry.add_blob(small.blob)
    manifest = Manifest(OCI_MANIFEST, large, (large, small.descriptor), {}, b"{}", sha256(b"{}"))
    async with served_node(scratch / "served") as one:
        preparer = Preparer(one.store, one.catalog, Settings(root=one.root, run=scratch))
        with ThreadPoolExecutor(2) as pool:
            tails = preparer.begin_tails(one.repository(registry.host), manifest, pool, lambda digest: False)
            assert list(tails) == [small.digest]
            assert tails[small.digest].result(10).endswith(small.tail[-48:])
        preparer.builder.close()


# -- frames


def test_a_frame_of_nothing_but_headers_can_not_hide_an_entry() -> None:
    """podman's headers lie in frames of their own, which no TOC names."""
    tar = tar_of(file("a", REAL), file("hidden", b""), file("z", b"z"))
    lie: Edit = lambda toc: toc["entries"].remove(toc_entry(toc, "hidden"))  # noqa: E731
    for make in MAKERS.values():
        with pytest.raises(TocMismatch, match="hidden"):
            check(make(tar, lie))


def test_a_frame_between_toc_and_footer_is_found() -> None:
    honest = storage_layer(tar_of(file("a", b"a")), podman4=True)
    extra = zstandard.ZstdCompressor().compress(tar_of(file("b", b"b")))
    sealed = resealed(honest, honest.toc)
    footer = sealed.blob[-48:]
    blob = sealed.blob[:-48] + extra + footer
    with pytest.raises(TocMismatch):
        check(replace(sealed, blob=blob), blob)
