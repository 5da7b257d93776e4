"""Images in archives: read by ranges where they lie, written whole or not at all, and no archive is trusted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.digest import of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DigestMismatch,
    DocumentInvalid,
    FormatError,
    LazyfsError,
    ManifestMissing,
    PushRejected,
    RegistryFault,
    TarInvalid,
    UsageError,
)
from lazyfs.registry.local.docker_archive import DockerArchiveRepository
from lazyfs.registry.local.files import FileStream
from lazyfs.registry.local.oci_archive import OciArchiveRepository
from lazyfs.registry.local.open_local import check_destination
from lazyfs.registry.local.tar_members import MAX_MEMBERS, MAX_NAMES, find_members, follow
from lazyfs.registry.open import open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.archives import docker_archive, image, oci_archive
from tests.helpers.tars import declared, dir_, fifo, file, global_pax, hardlink, header, sparse, symlink, tar_of

LAYER = tar_of(file("hello", b"world" * 1000))
UPPER = tar_of(file("other", b"more"))
IMAGE = image(LAYER, UPPER)


def read(repository: Repository, digest: str, offset: int, size: int) -> bytes:
    with repository.fetch(digest, offset, size) as stream:
        return b"".join(iter(lambda: stream.read(1000), b""))


def opened(path: Path, content: bytes | None = None, transport: str = "oci-archive") -> Repository:
    if content is not None:
        path.write_bytes(content)
    return open_repository(references.parse(f"{transport}:{path}"))


def check_image(repository: Repository, target: str, layers: tuple[bytes, ...] = IMAGE.layers) -> oci.Manifest:
    """The image is there with all its bytes, whole and in parts."""
    media_type, raw = repository.manifest(target)
    manifest = oci.parse_manifest(raw, media_type)
    oci.parse_config(repository.blob(manifest.config))
    assert len(manifest.layers) == len(layers)
    for descriptor, layer in zip(manifest.layers, layers, strict=True):
        assert (descriptor.digest, descriptor.size) == (of(layer), len(layer))
        assert repository.has_blob(descriptor.digest)
        assert read(repository, descriptor.digest, 0, len(layer)) == layer
        assert read(repository, descriptor.digest, 30, 50) == layer[30:80]
    assert repository.manifest(manifest.digest)[1] == raw
    return manifest


# -- members of a tar ------------------------------------------------------------------------------------------------


def members_of(tar: bytes) -> dict[str, tuple[int, int]]:
    found = find_members(lambda size, at: tar[at : at + size], len(tar))
    return {name: (member.offset, member.size) for name, member in found.items() if member.is_file}


_NAME = st.lists(st.text("abcé.-_ ", min_size=1, max_size=90), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(_NAME, st.binary(max_size=1500), max_size=8), st.sampled_from((0, 1, 2)))
def test_members_are_where_tarfile_finds_them(files: dict[str, bytes], form: int) -> None:
    kept = {}
    for name, data in files.items():
        clean = "/".join(word for word in name.split("/") if word not in ("", "."))
        if clean and ".." not in name.split("/") and clean not in kept:
            kept[clean] = data
    out = io.BytesIO()
    try:
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, data in kept.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    except ValueError:
        return  # ustar has no place for such a name
    raw = out.getvalue()
    assert {name: raw[at : at + size] for name, (at, size) in members_of(raw).items()} == kept


@given(st.binary(max_size=3000))
def test_any_bytes_are_an_archive_or_refused(raw: bytes) -> None:
    try:
        members_of(raw)
    except TarInvalid:
        pass


@given(st.data())
def test_a_flipped_byte_leaves_ranges_within_the_archive(data: st.DataObject) -> None:
    raw = bytearray(docker_archive(IMAGE, "app:1"))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = members_of(bytes(raw))
    except TarInvalid:
        return
    assert all(offset + size <= len(raw) for offset, size in found.values())


_BIG = 1 << 40

HOSTILE = {
    "a name twice": (tar_of(file("a", b"1"), file("a", b"2")), "two members"),
    "a directory and a file": (tar_of(file("a", b"1"), dir_("a/")), "two members"),
    "a name that leads out": (tar_of(file("../a", b"1")), "leads out"),
    "a name in the middle that leads out": (tar_of(file("a/../../b", b"1")), "leads out"),
    "an absolute name": (tar_of(file("/etc/passwd", b"1")), "leads out"),
    "a sparse member": (tar_of(sparse("a", [(0, b"data")], 1 << 30)), "sparse"),
    "an old sparse member": (tar_of(sparse("a", [(0, b"data")], 1 << 30, "gnu")), "sparse"),
    "a member larger than the archive": (declared("a", _BIG), "cut short"),
    "a huge extension header": (header(b"x", size=_BIG, kind=b"x"), "extension header"),
    "a header cut short": (tar_of(file("a", b"1"), end=False) + b"x" * 100, "cut short"),
    "a wrong checksum": (tar_of(file("a", b"1"), end=False) + b"y" * 512, "checksum"),
    "no tar at all": (b"not a tar" * 100, "no tar archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    raw, reason = HOSTILE[name]
    for transport in ("oci-archive", "docker-archive"):
        with pytest.raises(DocumentInvalid, match=reason) as caught:
            opened(tmp_path / "a.tar", raw, transport).manifest("")
        assert str(tmp_path / "a.tar") in str(caught.value)


def test_members_are_bounded() -> None:
    block = {0: header(b"d", kind=b"5")}
    count = 0

    def read_at(size: int, at: int) -> bytes:
        nonlocal count
        count += 1
        return block[0]

    with pytest.raises(TarInvalid, match="more than"):
        find_members(read_at, 1 << 50)
    assert count == MAX_MEMBERS + 1


def test_all_names_together_are_bounded() -> None:
    long = b"n" * 4000
    raw = tar_of(*(symlink(b"%d" % number, long) for number in range(MAX_NAMES // len(long) + 1)))
    with pytest.raises(TarInvalid, match="names have more than"):
        find_members(lambda size, at: raw[at : at + size], len(raw))


def test_global_headers_and_leading_dots_do_not_matter() -> None:
    tar = tar_of(global_pax([(b"path", b"evil")]), dir_("./"), dir_("./blobs/"), file("./blobs//x", b"abc"))
    assert {name: tar[at : at + size] for name, (at, size) in members_of(tar).items()} == {"blobs/x": b"abc"}


def test_links_are_followed_within_the_archive_only() -> None:
    tar = tar_of(
        file("one/layer.tar", b"abc"), symlink("two/layer.tar", "../one/layer.tar"),
        symlink("out", "../../etc/passwd"), symlink("root", "/etc/passwd"), symlink("a", "b"), symlink("b", "a"),
        symlink("gone", "nowhere"), dir_("d/"),
    )  # fmt: skip
    found = find_members(lambda size, at: tar[at : at + size], len(tar))
    member = follow(found, "two/layer.tar")
    assert member is not None and member.name == "one/layer.tar"
    assert follow(found, "gone") is None and follow(found, "d") is None and follow(found, "x") is None
    for name, reason in (("out", "leads out"), ("root", "leads out"), ("a", "circles"), ("../x", "leads out")):
        with pytest.raises(TarInvalid, match=reason):
            follow(found, name)


# -- oci-archive -----------------------------------------------------------------------------------------------------


def test_an_oci_archive_is_read_by_name_and_digest(tmp_path: Path) -> None:
    other = image(UPPER)
    repository = opened(tmp_path / "a.tar", oci_archive(v1=IMAGE, v2=other))
    manifest = check_image(repository, "v1")
    check_image(repository, manifest.digest)
    check_image(repository, "v2", (UPPER,))
    with pytest.raises(ManifestMissing, match="several") as caught:
        repository.manifest("")
    assert "v1, v2" in caught.value.hint
    with pytest.raises(ManifestMissing, match="no image v3"):
        repository.manifest("v3")
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"none"), 0, 1)
    assert not repository.has_blob(of(b"none"))
    with pytest.raises(BadAnswer, match="it has"):
        repository.fetch(of(LAYER), len(LAYER) - 1, 2)
    assert repository.referrers(manifest.digest) == []


@pytest.mark.parametrize(
    ("compress", "name"),
    [(gzip.compress, "gzip"), (lambda raw: zstandard.ZstdCompressor().compress(raw), "zstd"), (None, "")],
)
def test_a_compressed_archive_is_refused_with_the_command_that_helps(
    compress: Callable[[bytes], bytes] | None, name: str, tmp_path: Path
) -> None:
    raw = oci_archive(v1=IMAGE)
    repository = opened(tmp_path / "a.tar", compress(raw) if compress else raw)
    if compress is None:
        check_image(repository, "")
        return
    with pytest.raises(DocumentInvalid, match=f"compressed with {name}") as caught:
        repository.manifest("v1")
    assert f"{name} -d FILE" in caught.value.hint


def push(repository: Repository, name: str, *layers: bytes) -> None:
    made = image(*layers)
    for raw in (*made.layers, made.config):
        repository.push_blob(of(raw), len(raw), io.BytesIO(raw))
    repository.push_manifest(name, oci.OCI_MANIFEST, made.manifest)
    repository.close()


def test_what_is_written_is_read_by_a_full_unpack_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "new.tar"
    push(opened(path), "v1", LAYER, UPPER)
    check_image(opened(path), "v1")
    with tarfile.open(path) as archive:
        names = archive.getnames()
        index = archive.extractfile("index.json")
        assert index is not None
        (entry,) = json.load(index)["manifests"]
        assert entry["annotations"] == {"org.opencontainers.image.ref.name": "v1"}
        for name in names:
            if name.startswith("blobs/sha256/"):
                blob = archive.extractfile(name)
                assert blob is not None and of(blob.read())[7:] == name.rpartition("/")[2]
    assert names[:2] == ["oci-layout", "index.json"] and len(names) == 2 + 2 + 4
    assert [p.name for p in tmp_path.iterdir()] == ["new.tar"]


def test_the_same_image_gives_the_same_archive(tmp_path: Path) -> None:
    push(opened(tmp_path / "1.tar"), "v1", LAYER, UPPER)
    two = opened(tmp_path / "2.tar")
    for raw in (UPPER, IMAGE.config, LAYER):
        two.push_blob(of(raw), len(raw), io.BytesIO(raw))
    two.push_manifest("v1", oci.OCI_MANIFEST, IMAGE.manifest)
    two.close()
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_adding_keeps_what_is_there_and_a_name_moves(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(oci_archive(v1=IMAGE))
    push(opened(path), "v2", UPPER)
    push(opened(path), "v3", LAYER)
    push(opened(path), "v2", LAYER, UPPER)
    repository = opened(path)
    for name, layers in (("v1", (LAYER, UPPER)), ("v2", (LAYER, UPPER)), ("v3", (LAYER,))):
        check_image(repository, name, layers)


def test_nothing_shows_before_the_name_and_nothing_is_left_without_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    repository = opened(path)
    assert repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert not repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert repository.has_blob(of(LAYER)) and read(repository, of(LAYER), 5, 20) == LAYER[5:25]
    assert not path.exists()
    repository.close()
    assert not repository.has_blob(of(LAYER)) and list(tmp_path.iterdir()) == []


def test_wrong_bytes_are_not_taken(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar")
    for raw in (LAYER[:-1], LAYER[:-1] + b"x"):
        with pytest.raises(PushRejected):
            repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(raw))
    assert not repository.has_blob(of(LAYER))
    with pytest.raises(PushRejected):
        repository.push_manifest(of(b"other"), oci.OCI_MANIFEST, IMAGE.manifest)
    repository.close()


@pytest.mark.parametrize(
    "there", [docker_archive(IMAGE, "app"), tar_of(file("oci-layout", b"{}"), hardlink("x", "oci-layout"))]
)
def test_an_archive_of_another_kind_is_not_added_to(there: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(there)
    repository = opened(path)
    with pytest.raises(PushRejected):  # before any work was done
        repository.push_blob(of(b"new"), 3, io.BytesIO(b"new"))
    assert path.read_bytes() == there


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            push(opened(path), f"v{number}", tar_of(file(f"f{number}", b"x" * number)))
        except PushRejected as error:  # too many others replaced it meanwhile: told, not lost
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repository = opened(path)
    for number in range(4 if not failures else 0):
        check_image(repository, f"v{number}", (tar_of(file(f"f{number}", b"x" * number)),))
    assert not failures


def test_no_place_to_write_is_one_sentence(tmp_path: Path) -> None:
    repository = opened(tmp_path / "missing" / "a.tar")
    with pytest.raises(RegistryFault, match="No such file") as caught:
        repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER))
    assert not caught.value.temporary


def test_referrers_are_listed_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    push(opened(path), "v1", LAYER)
    subject = oci.parse_manifest(opened(path).manifest("v1")[1])
    config = b"{}"
    about = oci.canonical_json(
        {
            "schemaVersion": 2, "mediaType": oci.OCI_MANIFEST, "artifactType": "application/spdx+json",
            "config": oci.Descriptor("application/vnd.oci.empty.v1+json", of(config), 2).to_json(), "layers": [],
            "subject": oci.Descriptor(oci.OCI_MANIFEST, subject.digest, len(subject.raw)).to_json(),
        }
    )  # fmt: skip
    repository = opened(path)
    repository.push_blob(of(config), 2, io.BytesIO(config))
    repository.push_manifest(of(about), oci.OCI_MANIFEST, about)
    repository.close()
    (found,) = opened(path).referrers(subject.digest)
    assert (found.digest, found.artifact_type) == (of(about), "application/spdx+json")
    check_image(opened(path), "", (LAYER,))  # the only image stays the only one


# -- archives that change under the reader -----------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_an_archive_that_is_replaced_never_gives_other_bytes(transport: str, tmp_path: Path) -> None:
    make = (lambda one: oci_archive(v1=one)) if transport == "oci-archive" else docker_archive
    path = tmp_path / "a.tar"
    repository = opened(path, make(IMAGE), transport)
    check_image(repository, "")
    with repository.fetch(of(LAYER), 0, len(LAYER)) as stream:
        assert stream.read(10) == LAYER[:10]
        fresh = tmp_path / "new.tar"
        fresh.write_bytes(make(image(UPPER)))
        fresh.rename(path)
        rest = b"".join(iter(lambda: stream.read(1 << 20), b""))
    assert LAYER[:10] + rest == LAYER  # who reads on has the old file
    with pytest.raises(BlobMissing):
        repository.fetch(of(LAYER), 0, 10)
    check_image(repository, "", (UPPER,))
    path.unlink()
    with pytest.raises(BlobMissing):
        repository.fetch(of(UPPER), 0, 1)
    with pytest.raises(ManifestMissing):
        repository.manifest("")


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_an_archive_cut_short(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    raw = oci_archive(v1=IMAGE) if transport == "oci-archive" else docker_archive(IMAGE)
    repository = opened(path, raw, transport)
    check_image(repository, "")
    with repository.fetch(of(LAYER), 0, len(LAYER)) as stream:
        os.truncate(path, 2000)
        with pytest.raises(BadAnswer, match="shorter"):
            while stream.read(1 << 20):
                pass
    for call in (lambda: repository.fetch(of(LAYER), 0, 1), lambda: repository.manifest("")):
        with pytest.raises(DocumentInvalid, match="cut short"):
            call()


def test_damaged_documents_are_noticed(tmp_path: Path) -> None:
    raw = oci_archive(v1=IMAGE)
    for part in (IMAGE.manifest, IMAGE.config):
        bad = part.replace(b"linux", b"Linux").replace(b"schemaVersion", b"schemaversion")
        repository = opened(tmp_path / "a.tar", raw.replace(part, bad))
        with pytest.raises(DigestMismatch):
            check_image(repository, "v1")


@pytest.mark.parametrize("transport", ["oci-archive", "docker-archive"])
def test_what_is_no_file_is_refused_and_blocks_nobody(transport: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(ManifestMissing):
            opened(path, transport=transport).manifest("")


def test_a_member_that_is_no_file(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", tar_of(fifo("index.json")))
    with pytest.raises(ManifestMissing):
        repository.manifest("")


# -- docker-archive --------------------------------------------------------------------------------------------------


def test_a_docker_archive_is_an_image(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", docker_archive(IMAGE, "app:1", "h.example/team/app:2"), "docker-archive")
    for target in ("", "docker.io/library/app:1", "h.example/team/app:2", "@0"):
        manifest = check_image(repository, target)
    assert {layer.media_type for layer in manifest.layers} == {oci.OCI_LAYER}
    again = DockerArchiveRepository(tmp_path / "a.tar")
    assert read(again, of(UPPER), 0, len(UPPER)) == UPPER  # with no manifest asked for before
    assert again.manifest(manifest.digest)[1] == manifest.raw
    for target in ("docker.io/library/app:3", "@1"):
        with pytest.raises(ManifestMissing, match="no image") as caught:
            repository.manifest(target)
        assert "docker.io/library/app:1" in caught.value.hint
    assert repository.referrers(manifest.digest) == []
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"none"), 0, 1)


def test_several_images_in_one_archive(tmp_path: Path) -> None:
    two = image(UPPER)
    listed = [
        {"Config": "a.json", "RepoTags": ["a:1"], "Layers": ["1/layer.tar", "2/layer.tar"]},
        {"Config": "b.json", "RepoTags": None, "Layers": ["3/layer.tar"]},
    ]
    raw = tar_of(
        dir_("1/"), file("1/layer.tar", LAYER), file("2/layer.tar", UPPER), symlink("3/layer.tar", "../2/layer.tar"),
        file("a.json", IMAGE.config), file("b.json", two.config), file("manifest.json", json.dumps(listed).encode()),
    )  # fmt: skip
    repository = opened(tmp_path / "a.tar", raw, "docker-archive")
    check_image(repository, "docker.io/library/a:1")
    check_image(repository, "@1", (UPPER,))
    with pytest.raises(ManifestMissing, match="holds 2 images") as caught:
        repository.manifest("")
    assert "@0 to @1" in caught.value.hint


@pytest.mark.parametrize("form", ["gzip", "zstd"])
@pytest.mark.parametrize("named", [False, True])
def test_compressed_layers_keep_their_digest(form: str, named: bool, tmp_path: Path) -> None:
    packed = gzip.compress(LAYER, mtime=0) if form == "gzip" else zstandard.ZstdCompressor().compress(LAYER)
    one = image(packed, diff_ids=[of(LAYER)])
    name = f"blobs/sha256/{of(packed)[7:]}" if named else "layer.tar.gz"
    raw = tar_of(
        file(name, packed), file("c.json", one.config),
        file("manifest.json", json.dumps([{"Config": "c.json", "Layers": [name]}]).encode()),
    )  # fmt: skip
    manifest = check_image(opened(tmp_path / "a.tar", raw, "docker-archive"), "", (packed,))
    assert manifest.layers[0].media_type == f"{oci.OCI_LAYER}+{form}"


def test_a_layer_under_many_names_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(LAYER, mtime=0) + bytes(1 << 20)
    names = [f"{number}/layer.tar" for number in range(200)]
    one = image(*[packed] * 200, diff_ids=[of(LAYER)] * 200)
    raw = tar_of(
        file("layer.tar", packed), *(symlink(name, "../layer.tar") for name in names), file("c.json", one.config),
        file("manifest.json", json.dumps([{"Config": "c.json", "Layers": names}]).encode()),
    )  # fmt: skip
    sizes: list[int] = []
    plain = FileStream.read

    def counted(stream: FileStream, size: int) -> bytes:
        data = plain(stream, size)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(FileStream, "read", counted)
    _, manifest = opened(tmp_path / "a.tar", raw, "docker-archive").manifest("")
    assert [layer.digest for layer in oci.parse_manifest(manifest).layers] == [of(packed)] * 200
    assert sum(sizes) < 2 * len(raw)


def test_a_layer_that_is_not_its_diff_id_is_somebody_elses_bytes(tmp_path: Path) -> None:
    """The archive claims a digest by the config; whoever reads the blob finds it false."""
    one = image(LAYER)
    raw = docker_archive(one).replace(LAYER, LAYER.replace(b"world", b"WORLD"))
    repository = opened(tmp_path / "a.tar", raw, "docker-archive")
    manifest = oci.parse_manifest(repository.manifest("")[1])
    got = read(repository, manifest.layers[0].digest, 0, len(LAYER))
    assert hashlib.sha256(got).hexdigest() != manifest.layers[0].digest[7:]


@pytest.mark.parametrize(
    "listed",
    [
        b"", b"{}", b"[]", b"[1]", b'[{"Config": 1}]', b'[{"Config": ""}]', b'[{"Config": "c.json", "Layers": "x"}]',
        b'[{"Config": "c.json", "Layers": [1]}]', b'[{"Config": "c.json", "RepoTags": [1]}]', b"[" * 100_000,
        b'[{"Config": "c.json", "Layers": []}]', b'[{"Config": "../c.json", "Layers": []}]',
        json.dumps([{"Config": "c.json", "Layers": ["x"] * 600}]).encode(),
        b'[{"Config": "gone.json", "Layers": []}]', b'[{"Config": "c.json", "Layers": ["gone"]}]',
        b'[{"Config": "manifest.json", "Layers": []}]',
    ],
)  # fmt: skip
def test_a_malformed_list_of_images(listed: bytes, tmp_path: Path) -> None:
    raw = tar_of(file("c.json", image(LAYER).config), file("manifest.json", listed))
    with pytest.raises((FormatError, ManifestMissing, BlobMissing)):
        opened(tmp_path / "a.tar", raw, "docker-archive").manifest("")


@given(st.binary(max_size=300))
def test_any_list_of_images_is_read_or_refused(listed: bytes) -> None:
    path = Path(f"/dev/shm/lazyfs-test-{os.getpid()}-{zlib.crc32(listed)}.tar")
    try:
        with pytest.raises(LazyfsError):
            opened(path, tar_of(file("manifest.json", listed)), "docker-archive").manifest("")
    finally:
        path.unlink()


def test_one_kind_of_archive_tells_of_the_other(tmp_path: Path) -> None:
    with pytest.raises(ManifestMissing) as caught:
        opened(tmp_path / "a.tar", oci_archive(v1=IMAGE), "docker-archive").manifest("")
    assert "oci-archive:" in caught.value.hint
    with pytest.raises(ManifestMissing) as caught:
        opened(tmp_path / "b.tar", docker_archive(IMAGE), "oci-archive").manifest("")
    assert "docker-archive:" in caught.value.hint


def test_a_docker_archive_is_not_written(tmp_path: Path) -> None:
    repository = opened(tmp_path / "a.tar", transport="docker-archive")
    calls: list[Callable[[], object]] = [
        lambda: repository.push_blob(of(LAYER), len(LAYER), io.BytesIO(LAYER)),
        lambda: repository.push_manifest("x", oci.OCI_MANIFEST, IMAGE.manifest),
        lambda: check_destination(references.parse(f"docker-archive:{tmp_path}/a.tar:x")),
    ]
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert "oci-archive:" in caught.value.hint


def test_repositories_of_archives_hold_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    repository = OciArchiveRepository(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(oci_archive(v1=IMAGE))
    check_image(repository, "v1")
    with pytest.raises(BadAnswer):
        repository.fetch(of(LAYER), 1 << 40, 1)
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"x"), 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before
