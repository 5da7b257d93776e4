"""Pulling from a registry over HTTP: what a good one answers, and what a bad one must not get away with."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lazyfs import oci, reference
from lazyfs.digest import of
from lazyfs.errors import (
    BadAnswer,
    BlobMissing,
    DigestMismatch,
    DocumentInvalid,
    LazyfsError,
    ManifestMissing,
    RegistryFault,
    RegistryTimeout,
    RegistryUnreachable,
    TooManyRequests,
    Unauthorized,
)
from lazyfs.limits import MAX_DOCUMENT
from lazyfs.registry.hops import Hop
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import ByteStream, Repository
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault

BLOB = bytes(range(256)) * 4096  # 1 MiB
QUICK = RetryPolicy(attempts=3, first=0.001, longest=0.002)
ONCE = RetryPolicy(attempts=1)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as running:
        yield running


@pytest.fixture
def image(registry: FakeRegistry) -> AddedImage:
    return registry.add_image("team/app", "v1", [BLOB])


@pytest.fixture
def hops() -> list[Hop]:
    return []


@pytest.fixture
def repository(registry: FakeRegistry, hops: list[Hop]) -> Iterator[Repository]:
    opened = open_repository(
        reference.parse(f"{registry.host}/team/app:v1"), OpenOptions(on_hop=hops.append, retry=QUICK)
    )
    yield opened
    opened.close()


def opened(registry: FakeRegistry, **options: object) -> Repository:
    return open_repository(
        reference.parse(f"{registry.host}/team/app:v1"),
        OpenOptions(**options),  # type: ignore[arg-type]
    )


def read_all(stream: ByteStream) -> bytes:
    with stream:
        return b"".join(iter(lambda: stream.read(100_000), b""))


def test_a_manifest_by_tag_and_by_digest(repository: Repository, image: AddedImage) -> None:
    assert repository.manifest("v1") == (oci.OCI_MANIFEST, image.raw)
    assert repository.manifest(image.digest) == (oci.OCI_MANIFEST, image.raw)


def test_no_request_is_made_that_nobody_needs(
    repository: Repository, registry: FakeRegistry, image: AddedImage, hops: list[Hop]
) -> None:
    repository.manifest("v1")
    read_all(repository.fetch(image.layers[0], 0, len(BLOB)))
    assert [(r.method, r.path) for r in registry.requests] == [
        ("GET", "/v2/team/app/manifests/v1"),
        ("GET", f"/v2/team/app/blobs/{image.layers[0]}"),
    ]
    assert [(hop.kind, hop.status, hop.size, hop.host) for hop in hops] == [
        ("manifest", 200, len(image.raw), registry.host),
        ("blob", 206, len(BLOB), registry.host),
    ]
    assert all(hop.seconds > 0 for hop in hops)


@pytest.mark.parametrize(("blob_offset", "size"), [(0, 1), (0, len(BLOB)), (12345, 4096), (len(BLOB) - 1, 1), (77, 0)])
def test_a_fetch_gives_exactly_the_range(
    repository: Repository, image: AddedImage, blob_offset: int, size: int
) -> None:
    assert read_all(repository.fetch(image.layers[0], blob_offset, size)) == BLOB[blob_offset : blob_offset + size]


def test_the_connection_is_reused(repository: Repository, registry: FakeRegistry, image: AddedImage) -> None:
    seen: set[tuple[str, int]] = set()
    assert registry._registry is not None
    process = registry._registry.process_request

    def note(request: object, client_address: tuple[str, int]) -> None:
        seen.add(client_address)
        process(request, client_address)

    registry._registry.process_request = note  # type: ignore[method-assign]
    for _ in range(5):
        repository.manifest("v1")
        read_all(repository.fetch(image.layers[0], 5, 300_000))
        with pytest.raises(BlobMissing):
            repository.fetch(of(b"nothing"), 0, 1)
        assert not repository.has_blob(of(b"nothing"))
    assert len(seen) == 1


def test_a_small_document_is_verified(repository: Repository, registry: FakeRegistry, image: AddedImage) -> None:
    raw = registry.blobs[image.config]
    assert repository.blob(oci.Descriptor(oci.OCI_CONFIG, image.config, len(raw))) == raw
    registry.fault(Fault.FLIP, path=image.config)
    with pytest.raises(DigestMismatch):
        repository.blob(oci.Descriptor(oci.OCI_CONFIG, image.config, len(raw)))


@pytest.mark.parametrize("declared", [-1, 1])
def test_a_document_of_another_size_than_declared_is_refused(
    repository: Repository, registry: FakeRegistry, image: AddedImage, declared: int
) -> None:
    size = len(registry.blobs[image.config]) + declared
    with pytest.raises(LazyfsError) as caught:
        repository.blob(oci.Descriptor(oci.OCI_CONFIG, image.config, size))
    assert isinstance(caught.value, (BadAnswer, DocumentInvalid))


def test_a_tampered_manifest_is_refused_by_tag_and_by_digest(
    repository: Repository, registry: FakeRegistry, image: AddedImage
) -> None:
    registry.fault(Fault.FLIP, path="/manifests/")
    with pytest.raises(DigestMismatch):
        repository.manifest("v1")
    with pytest.raises(DigestMismatch):
        repository.manifest(image.digest)


def test_a_document_without_end_is_not_read(repository: Repository, registry: FakeRegistry) -> None:
    registry.add_manifest("team/app", "huge", oci.OCI_MANIFEST, b" " * (MAX_DOCUMENT + 1))
    with pytest.raises(DocumentInvalid, match="more than"):
        repository.manifest("huge")
    with pytest.raises(DocumentInvalid, match="more than"):
        repository.blob(oci.Descriptor(oci.OCI_CONFIG, of(b""), MAX_DOCUMENT + 1))


def test_what_is_not_there_has_an_error_of_its_own(repository: Repository) -> None:
    with pytest.raises(ManifestMissing, match="team/app:v2"):
        repository.manifest("v2")
    with pytest.raises(BlobMissing):
        repository.fetch(of(b"nothing"), 0, 10)
    assert not repository.has_blob(of(b"nothing"))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (Fault.REFUSE, {}, RegistryUnreachable),
        (Fault.STATUS, {"status": 500}, RegistryFault),
        (Fault.STATUS, {"status": 502}, RegistryFault),
        (Fault.STATUS, {"status": 429}, TooManyRequests),
        (Fault.STATUS, {"status": 403}, Unauthorized),
        (Fault.STATUS, {"status": 401}, Unauthorized),
        (Fault.STATUS, {"status": 404}, BlobMissing),
        (Fault.STATUS, {"status": 418}, BadAnswer),
        (Fault.STATUS, {"status": 204}, BadAnswer),
        (Fault.IGNORE_RANGE, {}, BadAnswer),
        (Fault.WRONG_RANGE, {}, BadAnswer),
        (Fault.SHORT_RANGE, {}, BadAnswer),
        (Fault.REDIRECT_LOOP, {}, BadAnswer),
        (Fault.REDIRECT, {"location": "file:///etc/passwd"}, BadAnswer),
        (Fault.REDIRECT, {"location": "ftp://127.0.0.1/x"}, BadAnswer),
        (Fault.REDIRECT, {"location": ""}, BadAnswer),
        (Fault.REDIRECT, {"location": "http://[::1/x"}, BadAnswer),
        (Fault.REDIRECT, {"location": "http://user:word@127.0.0.1/x"}, BadAnswer),
    ],
)
def test_a_fault_that_stays_becomes_its_error(
    registry: FakeRegistry, image: AddedImage, kind: Fault, options: dict[str, object], expected: type[LazyfsError]
) -> None:
    repository = opened(registry, retry=QUICK)
    rule = registry.fault(kind, path="/blobs/", **options)  # type: ignore[arg-type]
    with pytest.raises(expected) as caught:
        repository.fetch(image.layers[0], 4096, 4096)
    assert registry.host in str(caught.value)
    assert type(caught.value) is expected
    if kind is not Fault.REDIRECT_LOOP:
        assert rule.hits == (3 if caught.value.temporary else 1)
    repository.close()


@pytest.mark.parametrize("kind", [Fault.REFUSE, Fault.STATUS, Fault.IGNORE_RANGE, Fault.WRONG_RANGE, Fault.SHORT_RANGE])
def test_a_fault_that_passes_is_not_seen(
    registry: FakeRegistry, repository: Repository, image: AddedImage, kind: Fault
) -> None:
    registry.fault(kind, path="/blobs/", times=2)
    assert read_all(repository.fetch(image.layers[0], 1, 5000)) == BLOB[1:5001]


@pytest.mark.parametrize("kind", [Fault.TRUNCATE, Fault.RESET])
def test_a_body_that_breaks_off_is_an_error_and_what_came_is_good(
    registry: FakeRegistry, repository: Repository, image: AddedImage, kind: Fault
) -> None:
    registry.fault(kind, path="/blobs/", at=600_000)
    got = bytearray()
    with (
        repository.fetch(image.layers[0], 10, 1_000_000) as stream,
        pytest.raises(BadAnswer, match=r"broke off|too few"),
    ):
        while piece := stream.read(65536):
            got += piece
    assert bytes(got) == BLOB[10 : 10 + len(got)]
    assert len(got) < 1_000_000


def test_a_truncated_document_is_asked_for_again(
    registry: FakeRegistry, repository: Repository, image: AddedImage
) -> None:
    rule = registry.fault(Fault.TRUNCATE, path="/manifests/", times=2)
    assert repository.manifest("v1")[1] == image.raw
    assert rule.hits == 2


def test_a_range_beyond_the_blob_is_refused_at_once(
    registry: FakeRegistry, repository: Repository, image: AddedImage
) -> None:
    with pytest.raises(BadAnswer, match="shorter") as caught:
        repository.fetch(image.layers[0], len(BLOB), 1)
    assert not caught.value.temporary
    with pytest.raises(BadAnswer):
        repository.fetch(image.layers[0], len(BLOB) - 1, 2)


def test_200_is_the_whole_blob_or_nothing(registry: FakeRegistry, repository: Repository, image: AddedImage) -> None:
    registry.fault(Fault.IGNORE_RANGE, path="/blobs/")
    assert read_all(repository.fetch(image.layers[0], 0, len(BLOB))) == BLOB
    with pytest.raises(BadAnswer, match="ranges"):
        repository.fetch(image.layers[0], 0, len(BLOB) - 1)


@pytest.mark.parametrize("kind", [Fault.BLACK_HOLE, Fault.DRIP_HEADERS])
def test_a_registry_that_never_answers_costs_no_more_than_the_deadline(
    registry: FakeRegistry, repository: Repository, image: AddedImage, kind: Fault
) -> None:
    registry.fault(kind, path="/blobs/", rate=10)
    started = time.monotonic()
    with pytest.raises(RegistryTimeout, match=registry.host):
        repository.fetch(image.layers[0], 0, 10, deadline=started + 0.4)
    assert 0.3 < time.monotonic() - started < 5


def test_a_black_hole_is_left_after_the_answer_timeout(registry: FakeRegistry, image: AddedImage) -> None:
    registry.fault(Fault.BLACK_HOLE, path="/manifests/", times=1)
    repository = opened(registry, answer_timeout=0.2, retry=QUICK)
    assert repository.manifest("v1")[1] == image.raw
    repository.close()


def test_a_body_that_stalls_is_noticed(registry: FakeRegistry, image: AddedImage) -> None:
    registry.fault(Fault.STALL, path="/blobs/", at=1000)
    repository = opened(registry, answer_timeout=0.2)
    with repository.fetch(image.layers[0], 0, len(BLOB)) as stream, pytest.raises(RegistryTimeout, match="stopped"):
        while stream.read(1 << 20):
            pass
    repository.close()


def test_a_body_that_drips_ends_at_the_deadline(registry: FakeRegistry, image: AddedImage) -> None:
    registry.fault(Fault.DRIP, path="/blobs/", rate=2000)  # 100 bytes every 50 ms: never a stall
    repository = opened(registry, answer_timeout=5.0)
    started = time.monotonic()
    with (
        repository.fetch(image.layers[0], 0, len(BLOB), deadline=started + 0.4) as stream,
        pytest.raises(RegistryTimeout),
    ):
        while stream.read(1 << 20):
            pass
    assert time.monotonic() - started < 5
    repository.close()


def test_a_registry_that_is_down_is_unreachable_and_comes_back(
    registry: FakeRegistry, repository: Repository, image: AddedImage
) -> None:
    registry.stop_listening()
    with pytest.raises(RegistryUnreachable, match="refused"):
        repository.manifest("v1")
    registry.listen_again()
    assert repository.manifest("v1")[1] == image.raw


def test_retry_after_is_honoured_up_to_the_deadline(registry: FakeRegistry, image: AddedImage) -> None:
    slept: list[float] = []
    repository = opened(registry, retry=RetryPolicy(attempts=3, first=0.001, sleep=slept.append))
    registry.fault(Fault.STATUS, status=429, retry_after="7", times=1)
    registry.fault(Fault.STATUS, status=503, retry_after="5", times=1)
    assert repository.manifest("v1")[1] == image.raw
    assert [round(seconds) for seconds in slept] == [7, 5]
    registry.fault(Fault.STATUS, status=429, retry_after="100", times=1)
    with pytest.raises(TooManyRequests) as caught:
        repository.manifest("v1", deadline=time.monotonic() + 50)
    assert caught.value.retry_after == 100
    assert len(slept) == 2
    repository.close()


def test_pauses_grow_and_are_random(registry: FakeRegistry, image: AddedImage) -> None:
    slept: list[float] = []
    repository = opened(registry, retry=RetryPolicy(attempts=6, first=1.0, longest=4.0, sleep=slept.append))
    registry.fault(Fault.STATUS, status=503)
    with pytest.raises(RegistryFault):
        repository.manifest("v1")
    assert len(slept) == 5
    assert all(top / 2 <= pause <= top for pause, top in zip(slept, (1, 2, 4, 4, 4), strict=True))
    repository.close()


def test_failed_requests_are_reported_too(
    registry: FakeRegistry, repository: Repository, image: AddedImage, hops: list[Hop]
) -> None:
    registry.fault(Fault.REFUSE, times=1)
    registry.fault(Fault.STATUS, status=500, times=1)
    repository.manifest("v1")
    assert [(hop.kind, hop.status) for hop in hops] == [("manifest", 0), ("manifest", 500), ("manifest", 200)]


def test_many_threads_share_one_repository(registry: FakeRegistry, repository: Repository, image: AddedImage) -> None:
    registry.fault(Fault.STATUS, status=503, path="/blobs/", after=10, times=3)

    def one(offset: int) -> bool:
        return read_all(repository.fetch(image.layers[0], offset, 3000)) == BLOB[offset : offset + 3000]

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(0, 600_000, 3000)))


def test_a_stream_that_is_given_up_breaks_its_connection_and_no_other(
    registry: FakeRegistry, repository: Repository, image: AddedImage
) -> None:
    registry.rate = 200_000
    stream = repository.fetch(image.layers[0], 0, len(BLOB))
    stream.read(10)
    stream.close()
    stream.close()
    registry.rate = 0
    assert read_all(repository.fetch(image.layers[0], 0, 1000)) == BLOB[:1000]


def test_another_thread_may_read_the_stream(repository: Repository, image: AddedImage) -> None:
    stream = repository.fetch(image.layers[0], 0, len(BLOB))
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(read_all(stream)))
    reader.start()
    reader.join(10)
    assert got == [BLOB]


def test_plain_http_can_be_forbidden_on_loopback(registry: FakeRegistry, image: AddedImage) -> None:
    repository = opened(registry, plain_http=False, retry=ONCE)
    with pytest.raises(RegistryUnreachable, match="TLS"):
        repository.manifest("v1")
    repository.close()


def test_docker_media_types_are_understood(registry: FakeRegistry, repository: Repository, hops: list[Hop]) -> None:
    image = registry.add_image("team/app", "old", [BLOB], manifest_type=oci.DOCKER_MANIFEST)
    registry.add_index("team/app", "list", {"linux/amd64": image}, docker=True)
    assert repository.manifest("old") == (oci.DOCKER_MANIFEST, image.raw)
    media_type, raw = repository.manifest("list")
    assert media_type == oci.DOCKER_INDEX
    assert oci.parse_index(raw).manifests[0].digest == image.digest
    assert [hop.kind for hop in hops] == ["manifest", "index"]


def test_every_fault_at_every_place_gives_right_bytes_or_an_error(registry: FakeRegistry, image: AddedImage) -> None:
    """Whatever goes wrong once, a reader that resumes gets the blob, and never a wrong length."""
    places = itertools.product(
        (Fault.REFUSE, Fault.STATUS, Fault.TRUNCATE, Fault.RESET, Fault.STALL, Fault.WRONG_RANGE), (1, 70_000, 299_999)
    )
    repository = opened(registry, retry=QUICK, answer_timeout=0.1)
    for kind, at in places:
        registry.fault(kind, path="/blobs/", times=1, at=at)
        got = b""
        for _ in range(5):
            try:
                with repository.fetch(image.layers[0], len(got), 300_000 - len(got)) as stream:
                    while piece := stream.read(50_000):
                        got += piece
                break
            except (BadAnswer, RegistryTimeout):
                continue
        assert got == BLOB[:300_000], (kind, at)
    repository.close()
