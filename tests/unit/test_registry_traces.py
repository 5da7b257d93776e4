"""Traces in a registry: attached and found, with and without the referrers API, in spite of what others put there."""

from __future__ import annotations

import base64
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.errors import PushRejected, TraceInvalid, Unauthorized
from lazyfs.format.trace import Read, Trace, decode, encode
from lazyfs.limits import MAX_INLINE, MAX_TRACE, MAX_TRACES
from lazyfs.registry import traces
from lazyfs.registry.referrers import fallback_tag, listed_with
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault, Request, Rule
from tests.helpers.referrers import KEEPERS, SUBJECT, kept_by, opened_at

LAYERS = (of(b"base"), of(b"top"))
SMALL = Trace(SUBJECT.digest, LAYERS, (Read(b"usr/bin/app", 0, 0, 100, 0.5), Read(b"etc/app", 1, 0, 10, 1.0)), (), 2.0)
_NOISE = random.Random(6)
LARGE = replace(
    SMALL, reads=tuple(Read(b"lib/%d" % n, 0, _NOISE.getrandbits(50), _NOISE.getrandbits(50)) for n in range(9000))
)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_SETTLE", 0.02)


@pytest.fixture(params=KEEPERS)
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    with kept_by(request.param, tmp_path) as found:
        yield found


@pytest.fixture(params=[True, False], ids=["api", "no api"])
def registry(request: pytest.FixtureRequest) -> Iterator[FakeRegistry]:
    with FakeRegistry(referrers=request.param) as found:
        yield found


def find(repository: Repository, layers: tuple[str, ...] | None = LAYERS) -> Trace | None:
    return traces.find(repository, SUBJECT.digest, time.monotonic() + 20, layers=layers, subject=SUBJECT)


def reading(*paths: str) -> Trace:
    return replace(SMALL, reads=tuple(Read(path.encode(), 0, 0, 1, float(at)) for at, path in enumerate(paths)))


def files(trace: Trace | None) -> set[bytes]:
    return {read.path for read in trace.reads} if trace else set()


def test_what_is_attached_is_found_and_the_same_again_is_one(repository: Repository) -> None:
    assert find(repository) is None
    for trace in (SMALL, LARGE):
        one = traces.attach(repository, SUBJECT, trace)
        assert traces.attach(repository, SUBJECT, trace) == one
        assert one.digest in [entry.digest for entry in repository.referrers(SUBJECT.digest)]
    assert len(repository.referrers(SUBJECT.digest)) == 2
    found = find(repository)
    assert found is not None and set(found.reads) == {*SMALL.reads, *LARGE.reads}
    assert find(repository, None) == found
    assert find(repository, LAYERS[:1]) is None


def test_it_is_an_artifact_as_the_specification_has_it(registry: FakeRegistry) -> None:
    repository = opened_at(registry)
    artifact = traces.attach(repository, SUBJECT, LARGE)
    document = oci.load_json(registry.manifests_of("app")[artifact.digest][1], "artifact")
    assert document["artifactType"] == traces.ARTIFACT and document["subject"]["digest"] == SUBJECT.digest
    assert document["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert registry.blobs[document["config"]["digest"]] == b"{}"
    assert registry.blobs[document["layers"][0]["digest"]] == encode(LARGE)
    repository.close()


def test_a_small_trace_costs_no_request_but_the_list(registry: FakeRegistry) -> None:
    repository = opened_at(registry)
    traces.attach(repository, SUBJECT, SMALL)
    registry.clear_log()
    assert find(repository) == SMALL
    assert [request.path.split("/")[3] for request in registry.requests] == (
        ["referrers"] if registry.referrers else ["referrers", "manifests"]
    )
    repository.close()


def put(registry: FakeRegistry, raw: bytes, *, inline: str | None = None, **changes: Any) -> str:
    """Store an artifact with `raw` as its layer, as somebody else may write it."""
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "artifactType": traces.ARTIFACT,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": of(b"{}"), "size": 2},
        "layers": [{"mediaType": traces.LAYER, "digest": of(raw), "size": len(raw)}],
        "subject": SUBJECT.to_json(),
        "annotations": {"org.opencontainers.image.created": "2999-01-01T00:00:00Z"},
        **changes,
    }
    if inline is not None:
        document["annotations"] = {traces.INLINE: inline, traces.READS: "999999"}
    registry.add_blob(raw)
    manifest = oci.canonical_json(document)
    repository = opened_at(registry)
    repository.push_manifest(of(manifest), oci.OCI_MANIFEST, manifest)
    repository.close()
    return of(manifest)


def test_what_rides_inline_is_the_layer_of_its_artifact(registry: FakeRegistry) -> None:
    """Whoever writes the list can't put another trace into it under the digest of a good artifact."""
    repository = opened_at(registry)
    artifact = traces.attach(repository, SUBJECT, SMALL)
    other = encode(reading("etc/passwd"))
    forged = replace(artifact, annotations={**artifact.annotations, traces.INLINE: in_base64(other)})
    document = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [forged.to_json()]}
    listed = oci.canonical_json(document)
    registry.pages = (listed, "")
    registry.repositories["app"].manifests[fallback_tag(SUBJECT.digest)] = (oci.OCI_INDEX, listed)
    assert find(repository) is None
    repository.close()


def test_an_inline_trace_of_somebody_elses_making_costs_its_manifest(registry: FakeRegistry) -> None:
    repository = opened_at(registry)
    put(registry, encode(SMALL), inline=in_base64(encode(SMALL)))
    registry.clear_log()
    assert find(repository) == SMALL
    assert registry.count("GET", "/blobs/") == 0
    # So it is where nothing but the digest of the image is known.
    traces.attach(repository, SUBJECT, reading("more"))
    assert traces.find(repository, SUBJECT.digest, time.monotonic() + 20) is not None
    repository.close()


def test_traces_are_read_as_long_as_there_is_time(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = opened_at(registry)
    for name in ("old", "new"):
        put(registry, encode(reading(name, name)), inline=in_base64(encode(reading(name, name))))
    deadline = time.monotonic() + 2
    decoded = []

    def slow(raw: bytes) -> Trace:
        decoded.append(raw)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return decode(raw)

    monkeypatch.setattr(traces, "decode", slow)
    found = traces.find(repository, SUBJECT.digest, deadline, layers=LAYERS)
    assert len(decoded) == 1 and files(found) == {b"new"}
    repository.close()


def test_no_more_is_read_than_one_trace_may_tell(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = opened_at(registry)
    for name in ("oldest", "old", "new"):
        traces.attach(repository, SUBJECT, reading(name, "x", "y"))
    monkeypatch.setattr(traces, "MAX_READS", 6)
    assert files(find(repository)) == {b"new", b"old", b"x", b"y"}
    repository.close()


def in_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def test_what_is_foreign_tampered_or_enormous_is_passed_over(
    registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    repository = opened_at(registry)
    traces.attach(repository, SUBJECT, SMALL)
    other = replace(SMALL, manifest=of(b"another image"))
    wrong_layers = replace(SMALL, layers=(of(b"x"), of(b"y")))
    bad = [
        put(registry, encode(other)),
        put(registry, encode(wrong_layers)),
        put(registry, b"x", inline=in_base64(encode(other))),
        put(registry, b"x", inline="%%%"),
        put(registry, b"x", inline=in_base64(b"no trace")),
        put(registry, b"x", inline="A" * (MAX_INLINE + 4)),
        put(registry, bytes(MAX_TRACE + 1)),
    ]
    assert find(repository) == SMALL
    assert {line.split()[1] for line in caplog.messages if "passed over" in line} == set(bad)
    assert registry.count("GET", of(bytes(MAX_TRACE + 1))) == 0  # nobody fetches it to find that out
    repository.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": [{"mediaType": oci.OCI_LAYER, "digest": of(encode(SMALL)), "size": len(encode(SMALL))}]},
        {"layers": [{"mediaType": traces.LAYER, "digest": of(encode(SMALL)), "size": len(encode(SMALL)) - 1}]},
        {"layers": [{"mediaType": traces.LAYER, "digest": of(b"gone"), "size": 4}]},
        {"schemaVersion": 1},
        {"padding": "x" * 300_000},
    ],
)
def test_artifacts_of_another_shape_are_passed_over(registry: FakeRegistry, changes: dict[str, Any]) -> None:
    repository = opened_at(registry)
    put(registry, encode(SMALL), **changes)
    assert find(repository) is None
    repository.close()


def test_a_claim_that_an_artifact_of_another_image_belongs_here() -> None:
    with FakeRegistry(referrers=True) as registry:
        elsewhere = put(registry, encode(SMALL), subject=oci.Descriptor(oci.OCI_MANIFEST, of(b"other"), 5).to_json())
        entry = oci.Descriptor(oci.OCI_MANIFEST, elsewhere, 700, artifact_type=traces.ARTIFACT).to_json()
        registry.pages = (oci.canonical_json({"schemaVersion": 2, "manifests": [entry]}), "")
        repository = opened_at(registry)
        assert find(repository) is None
        repository.close()


def test_a_tampered_layer_is_passed_over(registry: FakeRegistry) -> None:
    repository = opened_at(registry)
    traces.attach(repository, SUBJECT, LARGE)
    registry.fault(Fault.FLIP, path=of(encode(LARGE)))
    assert find(repository) is None
    repository.close()


def test_no_more_than_eight_are_read_the_newest(registry: FakeRegistry) -> None:
    repository = opened_at(registry)
    for number in range(MAX_TRACES + 3):
        traces.attach(repository, SUBJECT, reading(*map(str, range(number + 1))))
    listed = repository.referrers(SUBJECT.digest)
    assert len(listed) == MAX_TRACES + 3
    # The list stays short: the last ones don't ride in it.
    assert sum(traces.INLINE in entry.annotations for entry in listed) == MAX_TRACES
    registry.clear_log()
    assert len(files(find(repository))) == MAX_TRACES + 3
    assert registry.count("GET", "/blobs/") == 3
    repository.close()


def test_two_nodes_attach_at_once_and_both_are_found(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has read the list before the other one writes it."""
    together = threading.Barrier(2)
    node_has = threading.local()

    def met(old: list[oci.Descriptor], entry: oci.Descriptor) -> bytes:
        if not hasattr(node_has, "met"):
            node_has.met = True
            together.wait(10)
        return listed_with(old, entry)

    monkeypatch.setattr("lazyfs.registry.http.client.listed_with", met)
    failed: list[BaseException] = []

    def node(name: str) -> None:
        repository = opened_at(registry)
        try:
            traces.attach(repository, SUBJECT, reading(name))
        except BaseException as error:
            failed.append(error)
        finally:
            repository.close()

    threads = [threading.Thread(target=node, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    repository = opened_at(registry)
    assert files(find(repository)) == {b"one", b"two"}
    repository.close()


def test_an_entry_that_somebody_else_overwrites_later_is_written_again() -> None:
    with FakeRegistry() as registry:
        tag = fallback_tag(SUBJECT.digest)
        lost: list[bytes] = []
        empty = oci.canonical_json({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": []})

        def somebody(request: Request) -> Rule | None:
            found = registry.repositories["app"].manifests if "app" in registry.repositories else {}
            if request.method == "GET" and tag in request.path and tag in found and not lost:
                lost.append(found[tag][1])
                found[tag] = (oci.OCI_INDEX, empty)
            return None

        registry.faults.append(somebody)
        repository = opened_at(registry)
        traces.attach(repository, SUBJECT, SMALL)
        assert lost and find(repository) == SMALL
        repository.close()


def test_a_registry_that_never_lists_it_is_an_error_with_an_end() -> None:
    with FakeRegistry(referrers=True) as registry:
        registry.pages = (oci.canonical_json({"schemaVersion": 2, "manifests": []}), "")
        repository = opened_at(registry)
        with pytest.raises(PushRejected, match="does not list"):
            traces.attach(repository, SUBJECT, SMALL)
        repository.close()


def test_without_the_right_to_write_it_says_so(registry: FakeRegistry) -> None:
    registry.fault(Fault.STATUS, path="/blobs/uploads/", status=403)
    repository = opened_at(registry)
    with pytest.raises(Unauthorized):
        traces.attach(repository, SUBJECT, SMALL)
    repository.close()


def test_a_trace_of_another_image_is_not_attached(repository: Repository) -> None:
    with pytest.raises(TraceInvalid, match="is of"):
        traces.attach(repository, SUBJECT, replace(SMALL, manifest=of(b"other")))
    assert repository.referrers(SUBJECT.digest) == []
