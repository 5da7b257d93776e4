"""What outlives a run: the work directory, the cache repository, and what refers to the source."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.options import ConvertOptions
from indexer.record import ARTIFACT_TYPE, tag_of
from indexer.related import SOURCE_REFERRER
from indexer.report import Action, Origin
from indexer.reuse import source_key
from indexer.work import BLOB_AGE, Converted, WorkDirectory
from lazyfs import oci
from lazyfs.digest import EMPTY, of
from lazyfs.errors import DigestMismatch, DocumentInvalid, RegistryFault, StoreBroken, UsageError
from lazyfs.registry.referrers import fallback_tag
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.tars import file, tar_of
from tests.unit.test_indexer_index import convert

BASE, TOP = tar_of(file("etc/hosts", b"localhost")), tar_of(file("etc/motd", b"hello" * 999))
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry(isolated=True) as found:
        yield found


@pytest.fixture
def options(tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(work=tmp_path / "work")


def add_app(registry: FakeRegistry) -> AddedImage:
    return registry.add_image("app", "1", [gzip.compress(BASE, mtime=0), TOP])


def kept_blobs(options: ConvertOptions) -> list[Path]:
    assert options.work is not None
    assert not list((options.work / "runs").iterdir())
    return [path for path in (options.work / "layers").iterdir() if path.suffix != ".json"]


# -- the work directory ---------------------------------------------------------------------------------------------


def test_a_conversion_that_fails_while_pushing_goes_on_there(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = add_app(registry)
    with FakeRegistry() as there:
        there.fault(Fault.STATUS, path="/manifests/", method="PUT", status=500)
        with pytest.raises(RegistryFault):
            convert(image.reference, f"{there.host}/lazy:1", options)
        assert len(kept_blobs(options)) == 2
        there.clear_faults()
        registry.clear_log()
        there.clear_log()
        report = convert(image.reference, f"{there.host}/lazy:1", options)
        assert [layer.origin for layer in report.layers] == [Origin.WORK] * 2
        assert not any(registry.count("GET", digest) for digest in image.layers)  # no layer was read again
        assert report.pushed == 0  # and none sent again
        # What is at its destination takes no room here.
        assert kept_blobs(options) == []
        fresh = convert(image.reference, f"{there.host}/other:1", ConvertOptions())
        assert fresh.manifest_digest == report.manifest_digest


def test_only_layers_that_arrived_nowhere_are_sent(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = add_app(registry)
    with FakeRegistry() as there:
        there.fault(Fault.STATUS, path="/blobs/", method="PUT", status=500, after=1)
        with pytest.raises(RegistryFault):
            convert(image.reference, f"{there.host}/lazy:1", options)
        there.clear_faults()
        there.clear_log()
        report = convert(image.reference, f"{there.host}/lazy:1", options)
        assert {layer.action for layer in report.layers} == {Action.REUSED}
        assert 0 < report.pushed < report.size + len(registry.blobs[image.config])
        assert there.count("PUT", "/blobs/") == 2


def test_the_local_record_serves_when_the_destination_has_the_blob(
    registry: FakeRegistry, options: ConvertOptions
) -> None:
    image = add_app(registry)
    convert(image.reference, f"{registry.host}/lazy:1", options)
    registry.clear_log()
    report = convert(image.reference, f"{registry.host}/lazy:another-tag", options)
    assert [layer.origin for layer in report.layers] == [Origin.WORK] * 2 and report.pushed == 0
    assert not any(registry.count("GET", digest) for digest in image.layers)
    # Where it hasn't, the layers are converted again.
    assert convert(image.reference, f"{registry.host}/elsewhere:1", options).layers[0].action is Action.CONVERTED


def test_a_kept_blob_is_verified_before_it_is_used(registry: FakeRegistry, options: ConvertOptions) -> None:
    image = add_app(registry)
    with FakeRegistry() as there:
        there.fault(Fault.STATUS, method="POST", status=500)
        with pytest.raises(RegistryFault):
            convert(image.reference, f"{there.host}/lazy:1", options)
        there.clear_faults()
        damaged = kept_blobs(options)
        for path in damaged:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
        report = convert(image.reference, f"{there.host}/lazy:1", options)
        assert {layer.action for layer in report.layers} == {Action.CONVERTED}


def test_a_disk_that_is_full_at_the_last_byte_is_a_sentence(
    registry: FakeRegistry, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small layer's bytes go to the disk only when its file is closed."""
    image = registry.add_image("app", "1", [tar_of(file("etc/motd", b"hello"))])
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))
    with pytest.raises(StoreBroken, match="No space left") as caught:
        convert(image.reference, f"{registry.host}/lazy:1", replace(options, prefetch=(b"etc/motd",)))
    assert str(options.work) in caught.value.hint and "--work-dir" in caught.value.hint
    monkeypatch.setattr(WorkDirectory, "new_file", lambda *_: Path("/dev/full"))
    with pytest.raises(StoreBroken, match="No space left") as caught:
        convert(image.reference, f"{registry.host}/lazy:1", options)
    assert str(options.work) in caught.value.hint and "lazy" not in registry.repositories


def layer_of(raw: bytes) -> Converted:
    return Converted(oci.Descriptor(oci.OCI_LAYER_ZSTD, of(raw), len(raw), {"a": "b"}), EMPTY)


def put(work: WorkDirectory, key: str, raw: bytes) -> Converted:
    layer = layer_of(raw)
    path = work.new_file(of(raw))
    path.write_bytes(raw)
    work.keep(key, layer, path)
    return layer


def test_what_was_kept_is_found_by_the_next_run(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "w") as work:
        layer = put(work, "key", b"blob")
        assert work.find("other key") is None
    with WorkDirectory(tmp_path / "w") as work:
        assert work.find("key") == layer
        path = work.blob("key", layer)
        assert path is not None and path.read_bytes() == b"blob"
        work.arrived("key")
        # A run's own file stays until the run ends, whoever tidies up meanwhile.
        assert path.read_bytes() == b"blob"
    with WorkDirectory(tmp_path / "w") as work:
        assert work.find("key") == layer and work.blob("key", layer) is None
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o700


def test_files_of_dead_runs_are_swept_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path) as work:
        mine = work.new_file(EMPTY)
        mine.write_bytes(b"under way")
        dead, early = tmp_path / "runs/dead", tmp_path / "runs/early"
        dead.mkdir()
        (dead / "lock").touch()
        (dead / "blob").write_bytes(b"x" * 100)
        early.mkdir()
        with WorkDirectory(tmp_path):
            assert not dead.exists() and not early.exists() and mine.read_bytes() == b"under way"


def test_bounds(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path) as work:
        layers = [put(work, f"key{n}", bytes([n]) * 1000) for n in range(5)]
    for number, path in enumerate(sorted((tmp_path / "layers").iterdir(), key=lambda path: path.stat().st_mtime)):
        os.utime(path, (10_000 + number, 2_000_000_000 + number))
    with WorkDirectory(tmp_path, max_size=2500) as work:
        there = [work.blob(f"key{n}", layer) is not None for n, layer in enumerate(layers)]
        assert there == [False, False, False, True, True]
        assert all(work.find(f"key{n}") for n in range(5))
    old = BLOB_AGE + 10
    for path in (tmp_path / "layers").iterdir():
        os.utime(path, (0, time.time() - old))
    with WorkDirectory(tmp_path) as work:
        assert work.blob("key4", layers[4]) is None


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(StoreBroken, match="others may write") as caught, WorkDirectory(open_to_all):
        pass
    assert "--work-dir" in caught.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(StoreBroken, match="can't be used"), WorkDirectory(tmp_path / "file"):
        pass
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir(0o700)
        os.chown(foreign, 12345, 12345)
        with pytest.raises(StoreBroken, match="another user"), WorkDirectory(foreign):
            pass


@given(st.binary(max_size=200))
def test_any_bytes_as_a_record_are_no_record(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory, WorkDirectory(Path(directory)) as work:
        put(work, "key", b"blob")
        (record,) = (Path(directory) / "layers").glob("*.json")
        record.write_bytes(raw)
        assert work.find("key") is None


def test_two_runs_share_a_directory(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def one(number: int) -> None:
        with WorkDirectory(tmp_path) as work:
            together.wait(10)
            for turn in range(20):
                layer = put(work, f"key{turn}", b"%d" % turn)
                assert work.find(f"key{turn}") == layer
                path = work.blob(f"key{turn}", layer)
                assert path is None or path.read_bytes() == b"%d" % turn
                if number % 2:
                    work.arrived(f"key{turn}")

    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            one(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_run_waits_for_another_ones_tidying(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path):
        pass
    with (tmp_path / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entered = threading.Event()

        def enter() -> None:
            with WorkDirectory(tmp_path):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert entered.wait(10)
        thread.join()


# -- the cache repository -------------------------------------------------------------------------------------------


def test_a_machine_that_never_saw_the_image_takes_its_layers_from_the_cache(registry: FakeRegistry) -> None:
    image = add_app(registry)
    cache = f"{registry.host}/cache"
    first = convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), cache)
    tags = [tag for tag in registry.manifests_of("cache") if tag.startswith("lazyfs-")]
    assert sorted(tags) == sorted(tag_of(source_key(digest, ConvertOptions())) for digest in image.layers)
    registry.clear_log()
    second = convert(image.reference, f"{registry.host}/fleet/lazy:1", ConvertOptions(), cache)
    assert second.manifest_digest == first.manifest_digest
    assert [layer.origin for layer in second.layers] == [Origin.CACHE] * 2
    assert not any(registry.count("GET", digest) for digest in image.layers)
    assert second.pushed == 0 and second.mounted >= second.size  # the registry took everything over
    # With other options the records are others.
    other = convert(image.reference, f"{registry.host}/fleet/lazy:2", ConvertOptions(level=5), cache)
    assert {layer.action for layer in other.layers} == {Action.CONVERTED}


def test_a_cache_in_another_registry_is_copied_and_verified(registry: FakeRegistry) -> None:
    image = add_app(registry)
    with FakeRegistry(isolated=True) as elsewhere:
        cache = f"{registry.host}/cache"
        convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), cache)
        report = convert(image.reference, f"{elsewhere.host}/lazy:1", ConvertOptions(), cache)
        assert [layer.origin for layer in report.layers] == [Origin.CACHE] * 2 and report.pushed > report.size
        blob = report.layers[0].digest
        registry.blobs[blob] = registry.blobs[blob][:-1] + b"\0"
        again = convert(image.reference, f"{elsewhere.host}/fresh:1", ConvertOptions(), cache)
        assert [layer.origin for layer in again.layers] == [None, Origin.CACHE]  # one was of no use
        assert again.manifest_digest == report.manifest_digest


def test_a_layout_as_cache(registry: FakeRegistry, tmp_path: Path) -> None:
    image = add_app(registry)
    cache = f"oci:{tmp_path}/cache"
    convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), cache)
    report = convert(image.reference, f"{registry.host}/fresh:1", ConvertOptions(), cache)
    assert [layer.origin for layer in report.layers] == [Origin.CACHE] * 2


def test_layers_reused_from_elsewhere_are_recorded_too(registry: FakeRegistry) -> None:
    image = add_app(registry)
    convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions())
    convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), f"{registry.host}/cache")
    report = convert(image.reference, f"{registry.host}/fresh:1", ConvertOptions(), f"{registry.host}/cache")
    assert [layer.origin for layer in report.layers] == [Origin.CACHE] * 2


@pytest.mark.parametrize("what", ["rubbish", "another key", "no blob", "no record", "down"])
def test_a_cache_that_is_of_no_use_is_passed_by(registry: FakeRegistry, what: str) -> None:
    image = add_app(registry)
    with FakeRegistry(isolated=True) as cache:
        first = convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), f"{cache.host}/cache")
        manifests = cache.manifests_of("cache")
        for tag in [tag for tag in manifests if tag.startswith("lazyfs-")]:
            if what == "rubbish":
                manifests[tag] = (oci.OCI_MANIFEST, b"{}")
            elif what == "no record":
                del manifests[tag]
            elif what == "another key":
                document = json.loads(manifests[tag][1])
                config = oci.canonical_json({"version": 1, "key": "sha256:0;x", "diff_id": EMPTY})
                cache.add_blob(config, "cache")
                document["config"] |= {"digest": of(config), "size": len(config)}
                manifests[tag] = (oci.OCI_MANIFEST, oci.canonical_json(document))
        if what == "no blob":
            for layer in first.layers:
                del cache.blobs[layer.digest]
        elif what == "down":
            cache.fault(Fault.STATUS, status=500)
        report = convert(image.reference, f"{registry.host}/fresh:1", ConvertOptions(), f"{cache.host}/cache")
        assert {layer.action for layer in report.layers} == {Action.CONVERTED}
        assert report.manifest_digest == first.manifest_digest
        assert any("took no record" in note for note in report.notes) is (what == "down")


def test_a_cache_that_does_not_answer_is_asked_once(registry: FakeRegistry) -> None:
    source = registry.add_image("app", "1", [tar_of(file(f"f{number}", b"x")) for number in range(20)])
    with FakeRegistry(isolated=True) as cache:
        cache.fault(Fault.REFUSE)
        report = convert(source.reference, f"{registry.host}/lazy:1", ConvertOptions(jobs=1), f"{cache.host}/cache")
        assert cache.count("GET", "/manifests/lazyfs-") <= 2  # with one more try
    assert sum("took no record" in note for note in report.notes) == 1


def test_a_record_is_a_manifest_that_registries_and_people_understand(registry: FakeRegistry) -> None:
    image = add_app(registry)
    report = convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(), f"{registry.host}/cache")
    raw = registry.manifests_of("cache")[tag_of(source_key(image.layers[0], ConvertOptions()))][1]
    document = json.loads(raw)
    assert document["artifactType"] == ARTIFACT_TYPE
    assert [layer["digest"] for layer in document["layers"]] == [report.layers[0].digest]


# -- what refers to the source --------------------------------------------------------------------------------------


def refer(registry: FakeRegistry, kind: str, subject: AddedImage, content: bytes) -> str:
    for blob in (b"{}", content):
        registry.add_blob(blob, "app")
    raw = oci.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "artifactType": kind,
            "config": {"mediaType": EMPTY_TYPE, "digest": of(b"{}"), "size": 2},
            "layers": [{"mediaType": "text/plain", "digest": of(content), "size": len(content)}],
            "subject": {"mediaType": oci.OCI_MANIFEST, "digest": subject.digest, "size": len(subject.raw)},
            "annotations": {"made": "by a test"},
        }
    )
    return registry.add_manifest("app", "", oci.OCI_MANIFEST, raw)


SBOM, SIGNATURE = "application/spdx+json", "application/vnd.dev.cosign.artifact.sig.v1+json"


@pytest.mark.parametrize("api", [True, False])
def test_what_refers_to_the_source_is_listed_and_copied(api: bool) -> None:
    with FakeRegistry(isolated=True, referrers=True) as registry, FakeRegistry(referrers=api) as there:
        image = add_app(registry)
        sbom, signature = refer(registry, SBOM, image, b"sbom"), refer(registry, SIGNATURE, image, b"signed")
        registry.add_manifest(
            "app", f"sha256-{image.digest[7:]}.sig", oci.OCI_MANIFEST, registry.manifests_of("app")[sbom][1]
        )
        listed = convert(image.reference, f"{there.host}/lazy:1", ConvertOptions())
        assert [(r.kind, r.copy) for r in listed.referrers if r.kind == SBOM] == [(SBOM, "")]
        assert len(listed.referrers) == 3 and any(SIGNATURE in note for note in listed.notes)
        assert all(referrer.reason for referrer in listed.referrers)
        report = convert(image.reference, f"{there.host}/lazy:1", ConvertOptions(copy_referrers=True))
        assert not any(SBOM in note for note in report.notes) and any(SIGNATURE in note for note in report.notes)
        by_kind = {referrer.kind: referrer for referrer in report.referrers}
        assert by_kind[SIGNATURE].digest == signature and "anew" in by_kind[SIGNATURE].reason
        assert not by_kind[SIGNATURE].copy and not by_kind["cosign signature"].copy
        copy = json.loads(there.manifests_of("lazy")[by_kind[SBOM].copy][1])
        assert copy["subject"]["digest"] == report.manifest_digest
        assert copy["annotations"] == {"made": "by a test", SOURCE_REFERRER: sbom}
        assert there.blobs[of(b"sbom")] == b"sbom" and of(b"signed") not in there.blobs
        assert (fallback_tag(report.manifest_digest) in there.manifests_of("lazy")) is not api
        # Again: the same copy, not a second one.
        again = convert(image.reference, f"{there.host}/lazy:1", ConvertOptions(copy_referrers=True))
        assert {r.copy for r in again.referrers} == {r.copy for r in report.referrers}
        assert there.matching("PUT")[-1].path.endswith("/manifests/1")


def test_a_registry_that_lies_about_referrers(registry: FakeRegistry, tmp_path: Path) -> None:
    image, other = add_app(registry), registry.add_image("app", "2", [BASE])
    wrong = refer(registry, SBOM, other, b"sbom of another image")
    raw = registry.manifests_of("app")[wrong][1]
    entry = {"mediaType": oci.OCI_MANIFEST, "digest": wrong, "size": len(raw), "artifactType": SBOM}
    listing = oci.canonical_json({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry]})
    registry.add_manifest("app", fallback_tag(image.digest), oci.OCI_INDEX, listing)
    with pytest.raises(DocumentInvalid, match="another subject"):
        convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions(copy_referrers=True))
    assert "lazy" not in registry.repositories
    registry.blobs[of(b"sbom of another image")] = b"tampered with, this is"
    convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions())  # listing believes nobody, and copies nothing


def test_referrers_that_cannot_be_listed_stop_only_their_copying(registry: FakeRegistry) -> None:
    image = add_app(registry)
    registry.fault(Fault.STATUS, path="/referrers/", status=500)
    report = convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions())
    assert any("not known" in note for note in report.notes) and report.referrers == ()
    with pytest.raises(UsageError, match="--copy-referrers"):
        convert(image.reference, f"{registry.host}/other:1", replace(ConvertOptions(), copy_referrers=True))
    assert "other" not in registry.repositories


def test_a_listing_that_hangs_holds_up_no_failure(registry: FakeRegistry) -> None:
    image = add_app(registry)
    registry.fault(Fault.BLACK_HOLE, path="/referrers/")
    registry.blobs[image.layers[1]] = TOP.replace(b"hello", b"jello")
    began = time.monotonic()
    with pytest.raises(DigestMismatch):
        convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions())
    assert time.monotonic() - began < 10
    registry.release()
