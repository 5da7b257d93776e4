"""What a pull tells containerd: the labels of extractions and of content; and what containerd's answers become."""

from __future__ import annotations

import argparse
import io
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.cli import fetch, pull
from lazyfs.cli.blob_download import BlobSource, Downloads
from lazyfs.cli.output import Output
from lazyfs.cli.pull_image import containerd_name
from lazyfs.containerd import gc_labels
from lazyfs.containerd.calls import Calls, Refused
from lazyfs.containerd.unpack import plan_layers
from lazyfs.digest import of
from lazyfs.errors import BlobMissing, Interrupted, RegistryError, StoreFull, UsageError
from lazyfs.registry.open import open_repository
from snapshotter import labels as read_labels
from tests.helpers.fake_registry import FakeRegistry, Fault

IMAGE = "registry.example:5000/team/app:1"
CONFIG = oci.Descriptor(oci.OCI_CONFIG, of(b"config"), 6)


def manifest_of(*annotations: dict[str, str]) -> oci.Manifest:
    layers = tuple(
        oci.Descriptor(oci.OCI_LAYER_GZIP, of(b"layer%d" % number), 10, given)
        for number, given in enumerate(annotations)
    )
    return oci.Manifest(oci.OCI_MANIFEST, CONFIG, layers, {}, b"{}", of(b"{}"))


def diff_ids(number: int) -> tuple[str, ...]:
    return tuple(of(b"diff%d" % n) for n in range(number))


# -- labels ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=20).map(lambda text: "containerd.io/snapshot/" + text)
            | st.sampled_from(
                [oci.TOC_DIGEST, "containerd.io/snapshot/cri.image-ref", "containerd.io/snapshot.ref", "other"]
            ),
            st.text(max_size=30) | st.just("x" * 4096) | st.just("é" * 2100),
            max_size=4,
        ),
        min_size=1,
        max_size=90,
    )
)
def test_whatever_an_image_says_the_labels_are_taken_and_true(annotations: list[dict[str, str]]) -> None:
    """containerd takes each label, the snapshotter reads them, and an annotation does not pass for a fact."""
    manifest = manifest_of(*annotations)
    plan = plan_layers(IMAGE, manifest, diff_ids(len(annotations)))
    chains = oci.chain_ids(diff_ids(len(annotations)))
    assert [(one.parent, one.chain_id) for one in plan] == list(zip(["", *chains[:-1]], chains, strict=True))
    for number, one in enumerate(plan):
        assert all(gc_labels.fits(key, value) for key, value in one.labels.items())
        assert all(key.startswith("containerd.io/snapshot") for key in one.labels)
        asked = read_labels.read(one.labels, one.parent)
        assert isinstance(asked, read_labels.Asked)
        assert asked.image == "docker://" + IMAGE and asked.manifest_digest == manifest.digest
        assert (asked.chain_id, asked.layer_digest) == (one.chain_id, manifest.layers[number].digest)
        above = one.labels[read_labels.IMAGE_LAYERS].split(",")
        assert above == [layer.digest for layer in manifest.layers[number : number + len(above)]]
        assert len(above) == min(len(plan) - number, 56)  # of 72 bytes each


def test_annotations_for_snapshotters_are_passed_on() -> None:
    (one,) = plan_layers(IMAGE, manifest_of({oci.TOC_DIGEST: of(b"toc"), oci.ZSTD_CHECKSUM: "no"}), diff_ids(1))
    assert one.labels[oci.TOC_DIGEST] == of(b"toc")
    assert oci.ZSTD_CHECKSUM not in one.labels


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("docker.io", "docker.io"), ("registry.example:5000", "registry.example"), ("[::1]:5000", "::1"),
        ("[::1]", "::1"),
    ],
)  # fmt: skip
def test_where_a_blob_is_from(host: str, key: str) -> None:
    label = f"containerd.io/distribution.source.{key}"
    assert gc_labels.origin(host, "b", {}) == {label: "b"}
    assert gc_labels.origin(host, "b", {label: "c,a"}) == {label: "a,b,c"}
    assert gc_labels.origin(host, "b", {label: "a,b"}) == {}
    assert gc_labels.origin(host, "b", {label: "x" * 4096}) == {}


def test_a_name_is_what_containerd_calls_it() -> None:
    assert containerd_name(references.parse("debian")) == "docker.io/library/debian:latest"
    assert containerd_name(references.parse("docker://" + IMAGE)) == IMAGE
    assert containerd_name(references.parse(f"app@{of(b'x')}")) == f"docker.io/library/app@{of(b'x')}"


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_and_an_old_containerd_are_called_so() -> None:
    calls = Calls("/no/such.sock", "default", 1)
    full = calls.fault("unpacking layer x", Refused("UNKNOWN", "write /a: no space left on device: unknown"))
    assert isinstance(full, StoreFull) and "disk of containerd" in full.message
    old = calls.fault("applying", Refused("UNIMPLEMENTED", "unknown service"))
    assert "too old" in old.hint and not old.temporary


# -- downloads -------------------------------------------------------------------------------------------------------


def source(registry: FakeRegistry, data: bytes, stop: threading.Event, moved: list[int]) -> BlobSource:
    digest = registry.add_blob(data)
    repository = open_repository(references.parse(f"{registry.host}/app:1"))
    return BlobSource(repository, oci.Descriptor("", digest, len(data)), stop, moved.append)


def test_a_source_can_begin_anywhere_and_goes_on_after_a_break() -> None:
    data = bytes(range(256)) * 4096
    moved: list[int] = []
    with FakeRegistry() as registry:
        blob = source(registry, data, threading.Event(), moved)
        registry.fault(Fault.TRUNCATE, path="/blobs/", at=100_000, times=1)
        assert blob.seek(500_000) == blob.tell() == 500_000
        read = io.BytesIO()
        while piece := blob.read(1 << 16):
            read.write(piece)
        blob.close()
    assert read.getvalue() == data[500_000:]
    assert blob.fetched == len(data) - 500_000 and sum(moved) == len(data)


def test_a_source_that_is_stopped_or_is_not_there() -> None:
    stop = threading.Event()
    with FakeRegistry() as registry:
        blob = source(registry, b"x" * 100, stop, [])
        registry.blobs.clear()
        with pytest.raises(BlobMissing):
            blob.read(10)
        stop.set()
        with pytest.raises(Interrupted):
            blob.read(10)
        blob.close()


def test_downloads_come_in_order_each_once_and_errors_reach_who_waits() -> None:
    begun: list[str] = []

    def fetch_one(blob: oci.Descriptor, stop: threading.Event) -> int:
        begun.append(blob.digest)
        if blob.size == 3:
            raise RegistryError("h", "gone")
        return blob.size

    downloads = Downloads(fetch_one, 1)
    blobs = [oci.Descriptor("", of(b"%d" % n), n) for n in range(5)]
    downloads.start(blobs)
    downloads.start(blobs)
    assert [downloads.wait(blobs[n].digest) for n in (4, 0, 1, 2)] == [4, 0, 1, 2]
    with pytest.raises(RegistryError):
        downloads.wait(blobs[3].digest)
    downloads.stop()
    assert begun == [blob.digest for blob in blobs]


# -- arguments -------------------------------------------------------------------------------------------------------


def parsed(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.set_defaults(root=None)
    module.add_parser(parser.add_subparsers())
    return parser.parse_args([module.__name__.rpartition(".")[2], *words])


@pytest.mark.parametrize(
    "words", [("--jobs", "0", "app"), ("--snapshotter", "", "app"), ("oci:dir:x",), ("containerd:app",)]
)  # fmt: skip
def test_pulls_that_make_no_sense(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        pull.run(parsed(pull, *words), Output(quiet=True))


@pytest.mark.parametrize(
    "words", [("--all-platforms", "app"), ("--content", "--offline", "app"), ("--content", "oci:dir:x")]
)  # fmt: skip
def test_fetches_that_make_no_sense(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        fetch.run(parsed(fetch, *words), Output(quiet=True))
