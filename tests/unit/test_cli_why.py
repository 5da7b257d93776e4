"""`lazyfs why`: from the snapshotter's records, written by its own store, and from a daemon that tells of mounts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs import errors
from lazyfs.cli import image_facts
from lazyfs.cli.main import main
from lazyfs.cli.why import lines
from snapshotter.extraction import Decision
from snapshotter.metrics import Metrics
from snapshotter.model import REF_LABEL, Kind, LazyImage, LazyLayer, Usage
from snapshotter.noting import Noting
from snapshotter.reasons import ADVICE, Outcome, classify
from snapshotter.records import open_records
from snapshotter.store import Store

IMAGE = "docker://r.test/app:1"
OTHER = "docker://r.test/other:1"


def sha(letter: str) -> str:
    return "sha256:" + letter * 64


def layer(letter: str, size: int = 1_000_000) -> LazyLayer:
    return LazyLayer(sha(letter), size, "m", {}, sha(letter), sha(letter))


LAZY = LazyImage(0, IMAGE, sha("9"), (layer("a"), layer("b"), layer("c", 60_000_000)))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    monkeypatch.setenv("LAZYFS_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("LAZYFS_ROOT", str(root))
    monkeypatch.setenv("LAZYFS_CONFIG", str(tmp_path / "none.toml"))
    found = Store(root / "snapshots.db")
    yield found
    found.close()


def pulled(store: Store) -> None:
    """Record a pull: a lazy layer, a small one, and one that fell back; and a container on them."""
    note = Noting(store, Metrics())
    for each, outcome, reason in [
        ("a", Outcome.LAZY, ""),
        ("b", Outcome.SMALL, "it has no TOC, or no digest for one"),
        ("c", Outcome.NO_TOC, "it has no TOC, or no digest for one"),
    ]:
        note(Decision(IMAGE, sha(each), f"k8s/1/extract-7 {sha(each)}", outcome, reason, 0.1))
    for index, each in enumerate("ab"):
        parent = sha("a") if index else ""
        store.commit_lazy(sha(each), parent, {REF_LABEL: sha(each)}, LAZY, index, Usage())
    store.create("k8s/3/x", sha("b"), Kind.ACTIVE, {})
    store.commit(f"k8s/4/{sha('c')}", "k8s/3/x", {REF_LABEL: sha("c")}, Usage(5, 1))
    store.create("k8s/5/web", f"k8s/4/{sha('c')}", Kind.ACTIVE, {})
    note(Decision(OTHER, sha("d"), "k", Outcome.REGISTRY, "r.test refused the connection", 0.1))


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["why", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_layer_with_its_reason_while_the_snapshotter_runs_and_after(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    pulled(store)
    before = told(capsys, IMAGE)
    store.close()
    assert told(capsys, "r.test/app:1") == before
    (image,) = before["images"]
    assert (image["image"], image["manifest_digest"]) == (IMAGE, sha("9"))
    assert [(one["digest"], one["state"], one["reason_class"], one["size"]) for one in image["layers"]] == [
        (sha("a"), "lazy", "", 1_000_000),
        (sha("b"), "small", "", 1_000_000),
        (sha("c"), "fallback", "no_toc", 60_000_000),
    ]
    assert image["layers"][2]["advice"] == ADVICE[Outcome.NO_TOC]
    assert image["users"] == ["k8s/5/web"]
    assert set(image["snapshots"]) == {sha("a"), sha("b"), f"k8s/4/{sha('c')}"}


def test_the_text_says_what_to_do(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    pulled(store)
    assert main(["why", IMAGE]) == 0
    text = capsys.readouterr().out
    for words in (
        f"{IMAGE}: 3 layers, 1 lazy, 1 fetched in full because it is small, 1 downloaded in the ordinary way",
        "60.0 MB  downloaded in the ordinary way: it has no TOC, or no digest for one, decided 0 s ago",
        "3 snapshots of its layers, used by k8s/5/web",
        "to do: convert the image: lazyfs convert",
    ):
        assert words in text, words
    assert "r.test/other" not in text


@pytest.mark.parametrize("name", ["sha256:999999", "99999999", f"r.test/app@{sha('9')}", f"r.test/app:7@{sha('9')}"])
def test_an_image_is_found_by_its_manifests_digest(store: Store, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pulled(store)
    assert [image["image"] for image in told(capsys, name)["images"]] == [IMAGE]


def test_the_latest_decision_counts(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    note = Noting(store, Metrics())
    for outcome, reason in [(Outcome.TIMEOUT, "not here in time"), (Outcome.LOGIN, "the registry wants a login")]:
        note(Decision(OTHER, sha("d"), "k", outcome, reason, 0.1))
    (found,) = told(capsys, OTHER)["images"][0]["layers"]
    assert (found["reason"], found["reason_class"]) == ("the registry wants a login", "login")


def test_a_layer_that_came_with_another_image_has_its_reason(store: Store) -> None:
    """containerd asks once for a layer: what was decided then holds for every image that has it."""
    pulled(store)  # a is lazy, b small, c plain, in this order
    note = Noting(store, Metrics())
    below = f"layer {sha('c')[:19]}… below it is not lazy: it has no TOC"
    note(Decision(OTHER, sha("e"), f"k8s/9/extract-7 {sha('e')}", Outcome.BELOW_NOT_LAZY, below, 0.1))
    # The same layer elsewhere in an image, where the one below it was in the way: that says nothing of itself.
    note(Decision("docker://r.test/third:1", sha("c"), f"k/8/extract-7 {sha('7')}", Outcome.BELOW_NOT_LAZY, below, 0.1))
    images = [{"references": [OTHER], "digest": sha("8"), "layers": [sha(each) for each in "abcde"]}]
    records = open_records(store.path)
    try:
        (image,) = image_facts.gather(OTHER, image_facts.Sources(records, images, {}, []))
    finally:
        records.close()
    assert [(one.state, one.reason_class) for one in image.layers] == [
        ("lazy", ""), ("small", ""), ("fallback", "no_toc"), ("fallback", "registry"), ("fallback", "below_not_lazy"),
    ]  # fmt: skip
    assert image.layers[2].advice == ADVICE[Outcome.NO_TOC] and image.layers[2].decided


@pytest.mark.parametrize(
    "name", ["r.test/nobody:1", "sha256:777777", f"r.test/else@{sha('9')}", f"r.test/app@{sha('8')}"]
)
def test_an_image_that_nobody_knows(store: Store, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pulled(store)
    assert main(["why", name]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and "was neither pulled nor mounted here" in printed.err


def test_clients_that_do_not_tell_their_image_are_the_hint(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    Noting(store, Metrics())(
        Decision("", "", "k", Outcome.NO_LABELS, "the client does not say which image it pulls", 0)
    )
    assert main(["why", IMAGE]) == 3
    assert "hint: 1 layer of late came from a client that does not tell its image: " in capsys.readouterr().err


def test_without_anything_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYFS_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("LAZYFS_ROOT", str(tmp_path / "root"))
    assert main(["why", IMAGE]) == 3
    assert not (tmp_path / "root").exists()


def test_records_that_are_damaged_are_a_warning(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.close()
    store.path.write_bytes(b"x" * 5000)
    for path in (store.path.with_name("snapshots.db-wal"), store.path.with_name("snapshots.db-shm")):
        path.unlink(missing_ok=True)
    assert main(["why", IMAGE]) == 3
    assert "lazyfs: warning: the snapshots' database" in capsys.readouterr().err


def test_what_was_only_mounted_comes_from_the_daemon() -> None:
    mounted = {
        "mount": "7", "image": f"{IMAGE}@{sha('9')}", "manifest_digest": sha("9"), "dir": "/mnt", "kind": "ro",
        "layers": [
            {"digest": sha("a"), "size": 9, "lazy": True, "reason": "", "present": 4, "complete": False,
             "verified": False, "quarantine": "it does not describe its tar"},
            {"digest": sha("b"), "size": 8, "lazy": False, "reason": "it has no TOC, or no digest for one",
             "present": 8, "complete": True, "verified": True, "quarantine": ""},
        ],
    }  # fmt: skip
    chain = {**mounted, "kind": "chain", "mount": "c1"}
    (image,) = image_facts.gather("r.test/app:1", image_facts.Sources(None, [], {}, [mounted, chain]))
    assert (image.mounts, image.chains) == (["/mnt"], ["c1"])
    assert [one.reason_class for one in image.layers] == ["quarantined", "no_toc"]
    text = "\n".join(lines(image, 0.0))
    assert "QUARANTINED: it does not describe its tar" in text
    assert "fetched in full: it has no TOC, or no digest for one, all of it here, checked whole" in text
    assert "mounted on /mnt" in text and "shown by the daemon: 1 chain" in text


def test_status_tells_of_the_snapshotter(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    pulled(store)
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshotter"] == {
        "snapshots": {"active": 1, "view": 0, "committed": 1, "lazy": 2},
        "chains_in_use": 1,
        "layers": {"lazy": 1, "small": 1, "no_toc": 1, "registry": 1},
        "listens": False,
    }
    assert main(["status"]) == 0
    assert "snapshots NOT RUNNING; 1 active, 1 committed, 2 lazy; 1 lazy chain in use" in capsys.readouterr().out


# -- reasons


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("it has no TOC, or no digest for one", Outcome.NO_TOC),
        ("a layer of type application/x has no TOC", Outcome.NO_TOC),
        ("it is too small to have a TOC", Outcome.NO_TOC),
        ("no digest vouches for its TOC", Outcome.UNTRUSTED),
        ("it was not checked in full in time", Outcome.UNTRUSTED),
        ("its TOC has 99999999999 bytes, more than the 1073741824 allowed", Outcome.TOO_LARGE),
        ("its TOC was not here in time", Outcome.TIMEOUT),
        ("its image's config was not here in time", Outcome.TIMEOUT),
        ("its annotation x is not a sha256 digest", Outcome.MALFORMED),
        ("layer sha256:aa… below it is not lazy: it has no TOC", Outcome.BELOW_NOT_LAZY),
        (errors.LayerQuarantined("sha256:aa", "x").message, Outcome.QUARANTINED),
        (errors.LayerQuarantined("sha256:aa", "x"), Outcome.QUARANTINED),
        (errors.DigestMismatch("blob", sha("a"), sha("b")), Outcome.MALFORMED),
        (errors.DigestMismatch("blob", sha("a"), sha("b")).message, Outcome.MALFORMED),
        (errors.Unauthorized("r.test", "r.test wants credentials"), Outcome.LOGIN),
        (errors.RegistryUnreachable("r.test", "no connection to r.test"), Outcome.REGISTRY),
        (errors.RegistryTimeout("r.test", "x"), Outcome.TIMEOUT),
        (errors.DaemonUnreachable("x"), Outcome.DAEMON),
        (errors.StoreFull("x"), Outcome.DISK),
        ("", Outcome.OTHER),
    ],
)
def test_reasons_have_classes(reason: str | errors.LazyfsError, outcome: Outcome) -> None:
    assert classify(reason) is outcome


def test_every_class_has_advice() -> None:
    assert set(ADVICE) == set(Outcome)


def test_a_full_disk_loses_the_record_and_nothing_else(store: Store) -> None:
    store.close()  # so that it raises StoreBroken
    metrics = Metrics()
    Noting(store, metrics)(Decision(IMAGE, sha("a"), "k", Outcome.LAZY, "", 0.1))
    assert b'layers_total{outcome="lazy",reason=""} 1.0' in metrics.text()
