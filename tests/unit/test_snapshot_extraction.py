"""What is decided about a layer that containerd wants extracted, and what each generation of clients sends and gets."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import oci
from lazyfs.config import Settings
from lazyfs.errors import RegistryTimeout
from snapshotter import extraction as module
from snapshotter import labels as told
from snapshotter.collaborators import Collaborators
from snapshotter.directories import Directories
from snapshotter.extraction import Decision, Extraction
from snapshotter.labels import Asked, Unsaid
from snapshotter.model import Kind, LazyImage, LazyLayer, LazyPlace, Shown, Usage
from snapshotter.parts import NoCollector
from snapshotter.reasons import Outcome
from snapshotter.remote import ResolvedChain, ResolvedLayer
from snapshotter.store import Store
from tests.helpers.snapshotter import Client, Refused, serving

IMAGE = "registry.example/team/app:1"
MANIFEST = "sha256:" + "aa" * 32
DIFF_IDS = tuple("sha256:" + f"{number:02x}" * 32 for number in (1, 2, 3))
CHAIN_IDS = oci.chain_ids(DIFF_IDS)
BLOBS = tuple("sha256:" + f"b{number}" * 32 for number in (1, 2, 3))


def chain(*ready: bool, reason: str = "it has no TOC") -> ResolvedChain:
    parts = zip(BLOBS, DIFF_IDS, CHAIN_IDS, ready, strict=True)
    layers = [
        ResolvedLayer(LazyLayer(blob, 100, oci.OCI_LAYER_ZSTD, {}, diff_id, chain_id), ok, ok, "" if ok else reason)
        for blob, diff_id, chain_id, ok in parts
    ]
    return ResolvedChain(f"docker://{IMAGE}", MANIFEST, tuple(layers))


def cri(number: int, **more: str) -> dict[str, str]:
    """The labels that CRI sends with the extraction of a layer."""
    return {
        told.SNAPSHOT_REF: CHAIN_IDS[number],
        told.IMAGE_REF: IMAGE,
        told.MANIFEST_DIGEST: MANIFEST,
        told.LAYER_DIGEST: BLOBS[number],
        told.IMAGE_LAYERS: ",".join(BLOBS[number:]),
        **more,
    }


def stargz(number: int) -> dict[str, str]:
    """The labels of stargz-aware clients, which don't say which manifest it is."""
    return {
        told.SNAPSHOT_REF: CHAIN_IDS[number],
        told.STARGZ_REF: IMAGE,
        told.STARGZ_DIGEST: BLOBS[number],
        "containerd.io/snapshot/remote/stargz.layers": ",".join(BLOBS[number:]),
        "containerd.io/snapshot/stargz/toc.digest": MANIFEST,
    }


class Daemon:
    """Resolves as it is told, and counts."""

    def __init__(self, answer: ResolvedChain | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []
        self.waited_for: list[str] = []
        self.shown: list[LazyPlace] = []

    def resolve(self, image: str, manifest_digest: str, chain_id: str) -> ResolvedChain:
        self.asked.append((image, manifest_digest))
        self.waited_for.append(chain_id)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def show(self, place: LazyPlace) -> Shown:
        self.shown.append(place)
        return Shown("chain", (f"/lazy/{place.index}",), 0o755, 0, 0)

    def usage(self, digests: object) -> Usage:
        return Usage(7, 1)


class Scene:
    """An Extraction over a Daemon."""

    def __init__(self, answer: ResolvedChain | Exception) -> None:
        self.daemon = Daemon(answer)
        self.decisions: list[Decision] = []
        self.extraction = Extraction(self.daemon.resolve, lambda image: image, self.decisions.append)

    def offer(self, labels: Mapping[str, str], parent: str = "") -> int | None:
        found = self.extraction.offer("key", parent, labels)
        return None if found is None else found.index


# -- the labels


NAMES = [
    told.SNAPSHOT_REF, told.IMAGE_REF, told.MANIFEST_DIGEST, told.LAYER_DIGEST, told.STARGZ_REF, told.STARGZ_DIGEST,
    told.PARENT_CHAIN, told.MAX_SIZE,
]  # fmt: skip
VALUES = [IMAGE, MANIFEST, "oci:/etc", "a" * 5000, "a/../b", "@sha256:"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text() | st.sampled_from(VALUES)), st.text())
def test_labels_are_strangers_words(labels: dict[str, str], parent: str) -> None:
    asked = told.read(labels, parent)
    if isinstance(asked, Asked):
        assert asked.image.startswith("docker://") and asked.chain_id == labels[told.SNAPSHOT_REF]
    else:
        assert asked.reason


@pytest.mark.parametrize("image", ["oci:/var/lib/secret", "containerd:app", "docker-archive:/x.tar", ""])
def test_labels_lead_to_registries_alone(image: str) -> None:
    assert isinstance(told.read(cri(0) | {told.IMAGE_REF: image}, ""), Unsaid)


# -- the decision


def test_an_image_is_resolved_once_for_all_its_layers() -> None:
    scene = Scene(chain(True, True, True))
    assert [scene.offer(cri(number), parent) for number, parent in enumerate(("", *CHAIN_IDS[:2]))] == [0, 1, 2]
    assert scene.daemon.asked == [(f"docker://{IMAGE}", MANIFEST)]
    assert [one.outcome for one in scene.decisions] == [Outcome.LAZY] * 3


def test_layers_that_are_asked_for_at_once_share_the_question() -> None:
    scene = Scene(chain(True, True, True))
    gate, resolve = threading.Event(), scene.daemon.resolve

    def slow(image: str, digest: str, chain_id: str) -> ResolvedChain:
        gate.wait(10)
        return resolve(image, digest, chain_id)

    extraction = Extraction(slow, lambda image: image, scene.decisions.append)
    found: list[int] = []

    def ask(number: int) -> None:
        offer = extraction.offer("key", "", cri(number))
        assert offer is not None
        found.append(offer.index)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1, 2)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(10)
    assert sorted(found) == [0, 1, 2] and len(scene.daemon.asked) == 1


def test_a_layer_waits_for_none_above_it() -> None:
    """The first answer comes when its layer is settled; later ones are asked for as long as theirs is not."""
    done = chain(True, True, True)
    scene = Scene(done)
    scene.daemon.answer = replace(
        done, layers=(*done.layers[:2], replace(done.layers[2], ready=False, lazy=False, settled=False))
    )
    assert [scene.offer(cri(number)) for number in (0, 1)] == [0, 1]
    assert scene.daemon.waited_for == [CHAIN_IDS[0]]
    assert scene.offer(cri(2)) is None, "a daemon that leaves its own question open"
    scene.daemon.answer = done
    assert [scene.offer(cri(number)) for number in (2, 0)] == [2, 0]
    assert scene.daemon.waited_for == [CHAIN_IDS[0], CHAIN_IDS[2], CHAIN_IDS[2]]


def test_what_is_still_coming_may_be_promised() -> None:
    done = chain(True, True, True)
    scene = Scene(replace(done, layers=(done.layers[0], *(replace(one, settled=False) for one in done.layers[1:]))))
    assert scene.offer(cri(0)) == 0
    scene.extraction.forget({BLOBS[2]})
    assert scene.offer(cri(0)) == 0 and len(scene.daemon.asked) == 2


def test_nothing_is_lazy_above_a_layer_that_is_not() -> None:
    scene = Scene(chain(True, False, True))
    assert [scene.offer(cri(number)) for number in (0, 1, 2)] == [0, None, None]
    assert [one.outcome for one in scene.decisions] == [Outcome.LAZY, Outcome.NO_TOC, Outcome.BELOW_NOT_LAZY]
    assert "below it is not lazy: it has no TOC" in scene.decisions[2].reason


def test_a_registry_that_hangs_is_asked_once_a_pull_and_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(RegistryTimeout("registry.example", "no answer within 30 s"))
    assert [scene.offer(cri(number)) for number in (0, 1, 2)] == [None] * 3
    assert len(scene.daemon.asked) == 1
    assert {one.outcome for one in scene.decisions} == {Outcome.TIMEOUT}
    monkeypatch.setattr(module, "_BAD", 0.0)
    scene.daemon.answer = chain(True, True, True)
    assert scene.offer(cri(0)) == 0


def test_what_is_about_to_be_removed_is_promised_to_nobody() -> None:
    scene = Scene(chain(True, True, False))
    assert scene.offer(cri(0)) == 0
    scene.extraction.forget({BLOBS[2], "sha256:" + "77" * 32})  # it was never promised
    assert scene.offer(cri(1)) == 1 and len(scene.daemon.asked) == 1
    scene.extraction.forget({BLOBS[1]})
    scene.daemon.answer = chain(True, False, False)
    assert scene.offer(cri(1)) is None and len(scene.daemon.asked) == 2


def test_why_an_image_is_not_lazy_is_asked_once_whatever_is_collected_meanwhile() -> None:
    scene = Scene(chain(False, True, True))
    assert scene.offer(cri(0)) is None
    scene.extraction.forget(set(BLOBS))  # what was fetched for the upper ones is given back during the pull
    assert scene.offer(cri(1)) is None and len(scene.daemon.asked) == 1


@pytest.mark.parametrize(
    "wrong", [{told.SNAPSHOT_REF: "sha256:" + "ee" * 32}, {told.LAYER_DIGEST: BLOBS[1]}, {told.SNAPSHOT_REF: "x"}]
)
def test_a_chain_id_that_is_not_the_layers_is_never_lazy(wrong: dict[str, str]) -> None:
    scene = Scene(chain(True, True, True))
    assert scene.offer(cri(0) | wrong) is None
    assert scene.decisions[0].reason and not scene.decisions[0].outcome.is_ready


def test_a_tag_that_moved_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """stargz-aware clients say no manifest: what the tag was some minutes ago says nothing of what it is now."""
    scene = Scene(chain(True, True, True))
    assert scene.offer(stargz(0)) == 0
    moved = oci.chain_ids(("sha256:" + "77" * 32,))[0]
    layer = LazyLayer("sha256:" + "78" * 32, 100, oci.OCI_LAYER_ZSTD, {}, "sha256:" + "77" * 32, moved)
    scene.daemon.answer = ResolvedChain(f"docker://{IMAGE}", MANIFEST, (ResolvedLayer(layer, True, True, ""),))
    labels = stargz(0) | {told.SNAPSHOT_REF: moved, told.STARGZ_DIGEST: layer.digest}
    assert scene.offer(labels) is None, "asked a moment ago"
    monkeypatch.setattr(module, "_BAD", 0.0)
    assert scene.offer(labels) == 0
    assert scene.offer(cri(0) | {told.SNAPSHOT_REF: "sha256:" + "ee" * 32}) is None
    assert len(scene.daemon.asked) == 3, "a manifest's digest leads to the same layers whenever it is asked for"


def test_without_labels_the_reason_says_so() -> None:
    scene = Scene(chain(True, True, True))
    assert scene.offer({told.SNAPSHOT_REF: CHAIN_IDS[0]}) is None
    assert scene.decisions[0].outcome is Outcome.NO_LABELS and scene.daemon.asked == []


# -- replayed: what each client sends, over the socket


@contextmanager
def node(place: Path, daemon: Daemon) -> Iterator[Client]:
    def connect(settings: Settings, store: Store, directories: Directories) -> Collaborators:
        extraction = Extraction(daemon.resolve, store.put_image, lambda decision: None)
        return Collaborators(extraction, daemon, NoCollector())

    with serving(place, connect) as client:
        yield client


def there(client: Client, key: str, parent: str, labels: dict[str, str]) -> None:
    """Prepare a layer that is lazy, and look for it as containerd's metadata does afterwards."""
    with pytest.raises(Refused) as refused:
        client.prepare(key, parent, labels)
    assert refused.value.code is grpc.StatusCode.ALREADY_EXISTS
    ref = labels[told.SNAPSHOT_REF]
    (found,) = client.list(f'labels."{told.SNAPSHOT_REF}"=={ref},parent=="{parent}"').values()
    assert found.kind is Kind.COMMITTED and found.labels[told.SNAPSHOT_REF] == ref and found.parent == parent
    assert client.stat(found.name).name == found.name


@pytest.mark.parametrize("labels", [cri, stargz], ids=["cri", "stargz"])
def test_layers_one_after_another(tmp_path: Path, labels: type) -> None:
    """containerd 1.6 to 2.1, and stargz-aware clients."""
    daemon = Daemon(chain(True, True, True))
    with node(tmp_path, daemon) as client:
        for number, parent in enumerate(("", *CHAIN_IDS[:2])):
            there(client, f"ns/{number}/extract {CHAIN_IDS[number]}", parent, labels(number))
        (mount,) = client.prepare("ns/9/container", CHAIN_IDS[2])
        assert "lowerdir=/lazy/2" in mount.options
        assert len(daemon.asked) == 1 and daemon.shown[0].index == 2


def test_layers_above_one_that_is_not_lazy_are_applied(tmp_path: Path) -> None:
    with node(tmp_path, Daemon(chain(True, False, True))) as client:
        there(client, "ns/1/extract", "", cri(0))
        (mount,) = client.prepare("ns/2/extract", CHAIN_IDS[0], cri(1))
        assert "lowerdir=/lazy/0" in mount.options
        client.commit("ns/3/two", "ns/2/extract", {told.SNAPSHOT_REF: CHAIN_IDS[1]})
        client.prepare("ns/4/extract", "ns/3/two", cri(2))
        client.commit("ns/5/three", "ns/4/extract", {})
        (mount,) = client.prepare("ns/6/container", "ns/5/three")
        (lower,) = [option for option in mount.options if option.startswith("lowerdir=")]
        assert len(lower.split(":")) == 3 and lower.endswith(":/lazy/0")


def test_layers_side_by_side(tmp_path: Path) -> None:
    """containerd 2.2 and 2.3 with the capability "rebase": no parent at Prepare, the parent at Commit."""
    daemon = Daemon(chain(True, True, False))
    with node(tmp_path, daemon) as client:
        there(client, "ns/2/extract", "", cri(1, **{told.PARENT_CHAIN: CHAIN_IDS[0]}))
        there(client, "ns/1/extract", "", cri(0))
        (mount,) = client.prepare("ns/3/extract", "", cri(2, **{told.PARENT_CHAIN: CHAIN_IDS[1]}))
        # An overlay, though nothing is below it: whiteouts are written down only there.
        assert mount.type == "overlay" and [o.partition("=")[0] for o in mount.options] == ["workdir", "upperdir"]
        client.commit(CHAIN_IDS[2], "ns/3/extract", {}, parent=CHAIN_IDS[1])
        (mount,) = client.prepare("ns/4/container", CHAIN_IDS[2])
        (lower,) = [option for option in mount.options if option.startswith("lowerdir=")]
        assert lower.endswith(":/lazy/1"), "the lazy layer's whole chain, whatever the records say of its parent"


def test_staged_layers(tmp_path: Path) -> None:
    """containerd 2.4: a last mount that is read-only says that nothing has to be fetched or applied."""
    daemon = Daemon(chain(True, True, True))
    more = {told.MAX_SIZE: "100"}
    with node(tmp_path, daemon) as client:
        for number in (1, 2):
            labels = cri(number, **more, **{told.PARENT_CHAIN: CHAIN_IDS[number - 1]})
            assert "ro" in client.prepare(f"ns/{number}/extract", "", labels)[-1].options
        there(client, "ns/0/extract", "", cri(0, **more))
        for number in (1, 2):
            client.commit(CHAIN_IDS[number], f"ns/{number}/extract", {}, parent=CHAIN_IDS[number - 1])
        assert client.stat(CHAIN_IDS[2]).parent == CHAIN_IDS[1]
        (mount,) = client.view("ns/9/view", CHAIN_IDS[2])
        assert (mount.type, mount.source) == ("bind", "/lazy/2")


def test_two_namespaces_share_what_is_lazy(tmp_path: Path) -> None:
    daemon = Daemon(chain(True, True, True))
    with node(tmp_path, daemon) as client:
        there(client, "one/1/extract", "", cri(0))
        there(client, "two/2/extract", "", cri(0))
        assert len(client.list()) == 1 and len(daemon.asked) == 1


def test_images_are_recorded_with_their_chain(tmp_path: Path) -> None:
    with node(tmp_path, Daemon(chain(True, True, True))) as client:
        there(client, "ns/1/extract", "", cri(0))
    store = Store(tmp_path / "r" / "snapshots.db")
    (snapshot,) = store.walk()
    assert snapshot.lazy is not None and snapshot.lazy.layer.digest == BLOBS[0]
    assert isinstance(snapshot.lazy.image, LazyImage) and snapshot.lazy.image.manifest_digest == MANIFEST
    store.close()
