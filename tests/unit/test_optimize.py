"""lazyfs optimize: the right traces come to the image in its registry, wrong ones nowhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazyfs import reference
from lazyfs.cli.main import main
from lazyfs.digest import of
from lazyfs.format.trace import Read, Request, Trace, decode, encode, stripped
from lazyfs.oci import OCI_MANIFEST, Descriptor
from lazyfs.registry import traces
from lazyfs.registry.open import open_repository
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.tars import file, tar_of


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRegistry]:
    monkeypatch.setattr(traces, "_SETTLE", 0.02)
    monkeypatch.chdir(tmp_path)
    for name, value in (("LAZYFS_CONFIG", "/dev/null"), ("LAZYFS_ROOT", tmp_path / "store"), ("HOME", tmp_path)):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "store").mkdir(mode=0o700)
    with FakeRegistry(referrers=True) as found:
        yield found


def add_image(registry: FakeRegistry, **config: Any) -> AddedImage:
    return registry.add_image("app", "1", [tar_of(file("a", b"a")), tar_of(file("b", b"b"))], config or None)


def trace_of(image: AddedImage, *paths: str) -> Trace:
    reads = tuple(Read(path.encode(), 1, 0, 10, float(at), 0.5) for at, path in enumerate(paths))
    return Trace(image.digest, image.layers, reads, (Request(0, 0, 9, 0, 0, 1, 2),), 3.0, ("secret", "word"))


def attached(registry: FakeRegistry, image: AddedImage) -> Trace | None:
    repository = open_repository(reference.parse(image.reference))
    try:
        return traces.find(repository, image.digest, time.monotonic() + 10, layers=image.layers)
    finally:
        repository.close()


def optimize(*words: str) -> int:
    return main(["optimize", *words])


def test_traces_are_merged_with_what_is_there_and_say_no_more_than_they_must(
    registry: FakeRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_image(registry)
    for name, paths in (("one", ("a", "b")), ("two", ("b", "c")), ("three", ("d",))):
        Path(name).write_bytes(encode(trace_of(image, *paths)))
    before = dict(registry.manifests_of("app"))
    assert optimize("--json", image.reference, "one", "two") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["known"], told["new"], told["reads"], told["inline"]) == (0, 3, 3, True)
    assert told["artifact"] in registry.manifests_of("app")
    assert [(each["source"], each["reads"], each["files"], each["bytes"]) for each in told["traces"]] == [
        ("one", 2, 2, 20), ("two", 2, 2, 20),
    ]  # fmt: skip
    assert optimize(image.reference, "three") == 0
    assert "3 reads; new: 1" in capsys.readouterr().out
    found = attached(registry, image)
    assert found is not None and {read.path for read in found.reads} == {b"a", b"b", b"c", b"d"}
    assert found == stripped(found)
    # The image itself is what it was.
    assert before.items() <= registry.manifests_of("app").items()


def test_invented_reads_in_the_registry_leave_room_for_ours(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazyfs.format.trace.MAX_READS", 4)
    image = add_image(registry)
    repository = open_repository(reference.parse(image.reference))
    invented = trace_of(image, "w", "x", "y", "z")
    subject = Descriptor(OCI_MANIFEST, image.digest, len(image.raw))
    traces.attach(repository, subject, stripped(invented))
    repository.close()
    ours = trace_of(image, "a", "b")
    Path("one").write_bytes(encode(replace(ours, reads=tuple(replace(read, at=9.0) for read in ours.reads))))
    before = set(registry.blobs)
    assert optimize(image.reference, "one") == 0
    pushed = [decode(raw) for digest, raw in registry.blobs.items() if digest not in before]
    assert [[read.path for read in trace.reads] for trace in pushed] == [[b"w", b"x", b"a", b"b"]]


def test_what_is_known_is_not_attached_again(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    image = add_image(registry)
    Path("one").write_bytes(encode(trace_of(image, "a")))
    assert optimize(image.reference, "one") == 0
    registry.clear_log()
    assert optimize(image.reference, "one") == 0
    assert "nothing is new" in capsys.readouterr().out
    assert registry.count("PUT") == registry.count("POST") == 0


def test_a_dry_run_pushes_nothing(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    image = add_image(registry)
    Path("one").write_bytes(encode(trace_of(image, "a", "b")))
    assert optimize("--dry-run", image.reference, "one") == 0
    assert "would attach 2 reads" in capsys.readouterr().out
    assert registry.count("PUT") == registry.count("POST") == 0


def test_without_a_file_it_is_what_the_node_learned(
    registry: FakeRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_image(registry)
    assert optimize(image.reference) == 2
    assert "has learned nothing" in capsys.readouterr().err
    learned = tmp_path / "store/traces" / image.digest.removeprefix("sha256:")
    learned.parent.mkdir(mode=0o700)
    learned.write_bytes(encode(trace_of(image, "a", "b")))
    assert optimize(image.reference) == 0
    assert attached(registry, image) == stripped(trace_of(image, "a", "b"))


def test_a_trace_is_of_one_platform(registry: FakeRegistry) -> None:
    images = {name: add_image(registry, architecture=name) for name in ("amd64", "arm64")}
    registry.add_index("app", "all", {f"linux/{name}": image for name, image in images.items()})
    Path("arm").write_bytes(encode(trace_of(images["arm64"], "a")))
    assert optimize("--platform", "linux/amd64", f"{registry.host}/app:all", "arm") == 2
    assert optimize("--platform", "linux/arm64", f"{registry.host}/app:all", "arm") == 0
    assert attached(registry, images["arm64"]) is not None and attached(registry, images["amd64"]) is None


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"manifest": of(b"other")}, 2, f"bad is a trace of {of(b'other')}"),
        ({"layers": (of(b"x"), of(b"y"))}, 7, "other layers"),
        ({"reads": ()}, 7, "no read"),
    ],
)
def test_a_wrong_trace_is_refused_before_anything_is_pushed(
    registry: FakeRegistry, change: dict[str, Any], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_image(registry)
    Path("good").write_bytes(encode(trace_of(image, "a")))
    Path("bad").write_bytes(encode(replace(trace_of(image, "a"), **change)))
    assert optimize(image.reference, "good", "bad") == code
    assert said in capsys.readouterr().err
    assert registry.count("PUT") == registry.count("POST") == 0


@pytest.mark.parametrize(("content", "code"), [(None, 2), (b"", 7), (b"no trace", 7), (bytes(2 << 20), 7)])
def test_a_file_that_is_no_trace(
    registry: FakeRegistry, content: bytes | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("bad").write_bytes(content)
    assert optimize(f"{registry.host}/app:1", "bad") == code
    assert "bad" in capsys.readouterr().err
    assert not registry.requests


def test_a_registry_that_lets_nobody_write(registry: FakeRegistry, capsys: pytest.CaptureFixture[str]) -> None:
    image = add_image(registry)
    Path("one").write_bytes(encode(trace_of(image, "a")))
    registry.fault(Fault.STATUS, path="/blobs/uploads/", status=403)
    assert optimize(image.reference, "one") == 4
    assert registry.host in capsys.readouterr().err
    assert attached(registry, image) is None


def test_a_layout_is_a_registry_and_an_archive_is_none(
    registry: FakeRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_image(registry)
    assert main(["convert", image.reference, f"oci:{tmp_path / 'layout'}:app"]) == 0
    repository = open_repository(reference.parse(f"oci:{tmp_path / 'layout'}:app"))
    manifest = json.loads(repository.manifest("app")[1])
    layers = tuple(layer["digest"] for layer in manifest["layers"])
    trace = replace(trace_of(image, "a"), manifest=of(repository.manifest("app")[1]), layers=layers)
    Path("one").write_bytes(encode(trace))
    assert optimize(f"oci:{tmp_path / 'layout'}:app", "one") == 0
    assert traces.find(repository, trace.manifest, time.monotonic() + 10) == stripped(trace)
    assert optimize("oci-archive:app.tar:app", "one") == 2
    assert "in a registry, or in oci:DIR" in capsys.readouterr().err


def test_a_converted_image_does_not_inherit_traces_of_its_source(
    registry: FakeRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_image(registry)
    Path("one").write_bytes(encode(trace_of(image, "a")))
    assert optimize(image.reference, "one") == 0
    target = f"oci:{tmp_path / 'layout'}:app"
    assert main(["convert", "--prefetch", "one", "--copy-referrers", image.reference, target]) == 0
    repository = open_repository(reference.parse(target))
    assert repository.referrers(of(repository.manifest("app")[1])) == []
