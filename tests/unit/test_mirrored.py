"""Mirrors: whom is asked, when the next one is, how long that takes, and that no byte is ever wrong."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.digest import of
from lazyfs.errors import (
    BlobMissing,
    DigestMismatch,
    LazyfsError,
    ManifestMissing,
    RegistryError,
    RegistryTimeout,
    TooManyRequests,
    Unauthorized,
)
from lazyfs.oci import OCI_MANIFEST, Descriptor
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.health import Health
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.mirrored import DELAY, PATIENCE, MirroredRepository, read_again
from lazyfs.registry.repository import ByteStream
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import Fault
from tests.helpers.mirrors import Mirrors

BLOB = noise("mirrored", 600_000)
SLACK = 1.5  # seconds that a loaded machine may add to a bound


@pytest.fixture
def mirrors(tmp_path: Path) -> Iterator[Mirrors]:
    with Mirrors(tmp_path) as running:
        yield running


def taken(stream: ByteStream) -> bytes:
    with stream:
        parts = []
        while data := stream.read(1 << 16):
            parts.append(data)
        return b"".join(parts)


def asked(mirrors: Mirrors, path: str = "/blobs/") -> list[int]:
    return [each.count("GET", path) for each in mirrors.all]


# -- who is asked


def test_the_first_mirror_serves_and_nobody_else_is_asked(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    repository = mirrors.open()
    assert taken(repository.fetch(digest, 1000, 5000)) == BLOB[1000:6000]
    assert taken(repository.fetch(digest, 0, 0)) == b""
    assert asked(mirrors) == [1, 0, 0]
    assert repository.link == mirrors.mirrors[0].host
    assert repository.host == mirrors.origin.host


def test_names_are_sent_to_mirrors_only(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.STATUS, status=404)
    mirrors.mirrors[1].fault(Fault.STATUS, status=404)
    assert taken(mirrors.open().fetch(digest, 0, 10)) == BLOB[:10]
    assert all("ns=" in each.requests[0].path for each in mirrors.mirrors)
    assert "ns=" not in mirrors.origin.requests[0].path


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_one_that_refuses_is_passed_by_at_once(mirrors: Mirrors, status: int) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.STATUS, status=status)
    repository = mirrors.open()
    began = time.monotonic()
    for _ in range(5):
        assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert time.monotonic() - began < 1
    assert asked(mirrors)[1] == 5
    assert asked(mirrors)[0] <= 4  # it is remembered, after three 5xx or one 4xx


def test_errors_of_all_are_told_in_the_origins(mirrors: Mirrors) -> None:
    digest = of(b"nobody has this")
    mirrors.mirrors[0].fault(Fault.STATUS, status=401)
    with pytest.raises(BlobMissing) as caught:
        mirrors.open().fetch(digest, 0, 10)
    assert caught.value.message.startswith(mirrors.origin.host)
    assert all(each.host in caught.value.message for each in mirrors.mirrors)


def test_a_mirror_that_is_down_is_worth_another_try_for_a_blob(mirrors: Mirrors) -> None:
    digest = mirrors.mirrors[0].add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.STATUS, status=503, times=1)
    assert taken(mirrors.open().fetch(digest, 0, 10)) == BLOB[:10]


def test_all_unauthorised(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    for each in mirrors.all:
        each.fault(Fault.STATUS, status=401)
    with pytest.raises(Unauthorized):
        mirrors.open().fetch(digest, 0, 10)


# -- tags


def test_tags_are_asked_of_those_that_may_resolve(mirrors: Mirrors) -> None:
    image = mirrors.add_image("image", "v1", [BLOB])
    mirrors.mirrors[0].add_manifest("image", "v1", OCI_MANIFEST, b"{}")
    assert mirrors.open().manifest("v1")[1] == b"{}"
    mirrors.configure(["pull"])
    repository = mirrors.open()
    assert repository.manifest("v1")[1] == image.raw
    assert repository.manifest(image.digest)[1] == image.raw
    assert mirrors.mirrors[0].count(path=image.digest) == 1


def test_a_stale_tag_is_asked_of_the_next_one(mirrors: Mirrors) -> None:
    image = mirrors.add_image("image", "v1", [BLOB])
    mirrors.mirrors[0].add_manifest("image", "v1", OCI_MANIFEST, b"stale")
    mirrors.mirrors[1].add_manifest("image", "v1", OCI_MANIFEST, b"stale too")
    repository = mirrors.open()
    assert repository.manifest("v1")[1] == b"stale"
    assert repository.doubt("v1")
    assert repository.manifest("v1")[1] == b"stale too"
    assert repository.doubt("v1")
    assert repository.manifest("v1")[1] == image.raw
    assert not repository.doubt("v1")  # the origin's word is the last
    assert not repository.doubt("never asked")


def test_an_unknown_tag_is_told_once_all_said_so(mirrors: Mirrors) -> None:
    with pytest.raises(ManifestMissing):
        mirrors.open().manifest("v1")
    assert asked(mirrors, "/manifests/") == [1, 1, 1]


def test_documents_that_are_wrong_or_too_large_are_taken_elsewhere(mirrors: Mirrors) -> None:
    image = mirrors.add_image("image", "v1", [BLOB])
    mirrors.mirrors[0].fault(Fault.FLIP)
    mirrors.mirrors[1].add_manifest("image", "v1", OCI_MANIFEST, bytes(100 << 20))
    repository = mirrors.open()
    assert repository.manifest(image.digest)[1] == image.raw
    config = Descriptor("application/json", image.config, len(mirrors.origin.blobs[image.config]), {})
    assert repository.blob(config) == mirrors.origin.blobs[image.config]
    health = repository.health.snapshot()[mirrors.mirrors[0].host]
    assert health["lies"] == 2


def test_a_manifest_of_100_megabytes_under_a_tag(mirrors: Mirrors) -> None:
    image = mirrors.add_image("image", "v1", [BLOB])
    mirrors.mirrors[0].add_manifest("image", "v1", OCI_MANIFEST, bytes(100 << 20))
    assert mirrors.open().manifest("v1")[1] == image.raw
    assert mirrors.mirrors[0].bytes_sent("/manifests/") < 20 << 20


# -- in mid-read


@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.RESET, Fault.STALL])
def test_a_body_that_breaks_off_is_resumed_elsewhere_from_there(mirrors: Mirrors, fault: Fault) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(fault, at=300_000)
    began = time.monotonic()
    assert taken(mirrors.open().fetch(digest, 0, len(BLOB))) == BLOB
    assert time.monotonic() - began < DELAY + SLACK
    start = int(mirrors.mirrors[1].matching("GET", "/blobs/")[0].range.removeprefix("bytes=").split("-")[0])
    assert 0 < start <= 300_000
    assert mirrors.origin.count() == 0


def test_a_drip_is_given_up_and_not_asked_again(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.DRIP, rate=2000)
    repository = mirrors.open()
    began = time.monotonic()
    assert taken(repository.fetch(digest, 0, len(BLOB))) == BLOB
    assert time.monotonic() - began < DELAY + SLACK
    began = time.monotonic()
    assert taken(repository.fetch(digest, 0, len(BLOB))) == BLOB
    assert time.monotonic() - began < 1
    assert repository.health.snapshot()[mirrors.mirrors[0].host]["slow"] == 1


@pytest.mark.parametrize("fault", [Fault.BLACK_HOLE, Fault.DRIP_HEADERS])
def test_one_that_does_not_answer_costs_a_bounded_time_once(mirrors: Mirrors, fault: Fault) -> None:
    digest = mirrors.add_blob(BLOB)
    for mirror in mirrors.mirrors:
        mirror.fault(fault, rate=10)
    repository = mirrors.open()
    began = time.monotonic()
    assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert time.monotonic() - began < 2 * PATIENCE + SLACK
    began = time.monotonic()
    assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert time.monotonic() - began < 1


def test_where_nobody_else_is_well_slow_is_good_enough(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    for mirror in mirrors.mirrors:
        mirror.stop_listening()
    mirrors.origin.fault(Fault.DRIP, rate=10_000)
    assert taken(mirrors.open().fetch(digest, 0, 40_000)) == BLOB[:40_000]


def test_a_liar_is_no_reason_to_give_up_a_slow_source(mirrors: Mirrors) -> None:
    """One mirror is down, one answers wrong bytes as fast as can be; what the origin drips is all that is right."""
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].stop_listening()
    mirrors.mirrors[1].fault(Fault.FLIP)
    mirrors.origin.fault(Fault.DRIP, rate=400_000)
    repository = mirrors.open()
    repository.health.note_body(mirrors.mirrors[1].host, digest, len(BLOB), 0.001)
    with repository.fetch(digest, 0, len(BLOB)) as stream:
        stream.read(1000)
        stream.reject("not what was promised")
        assert len(taken(stream)) > 0
    assert taken(repository.fetch(digest, 0, len(BLOB))) == BLOB


def test_a_mirror_that_is_well_again_is_found_without_a_readers_help(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.BLACK_HOLE)
    repository = mirrors.open()
    first = mirrors.mirrors[0].host
    assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert not repository.health.is_well(first)
    mirrors.mirrors[0].clear_faults()
    deadline = time.monotonic() + 10
    while not repository.health.is_well(first):
        assert time.monotonic() < deadline
        began = time.monotonic()
        assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
        assert time.monotonic() - began < 1
        time.sleep(0.05)
    before = mirrors.mirrors[0].count()
    assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert mirrors.mirrors[0].count() == before + 1


# -- limits


def test_429_is_heeded_and_the_others_go_on(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    mirrors.mirrors[0].fault(Fault.STATUS, status=429, retry_after="300")
    repository = mirrors.open()
    for _ in range(3):
        assert taken(repository.fetch(digest, 0, 1000)) == BLOB[:1000]
    assert asked(mirrors) == [1, 3, 0]
    shown = repository.health.snapshot()[mirrors.mirrors[0].host]
    assert shown["state"] == "rate limited" and 290 < shown["for"] <= 300


def test_429_of_all_says_how_long(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    for number, each in enumerate(mirrors.all):
        each.fault(Fault.STATUS, status=429, retry_after=str(100 + number))
    repository = mirrors.open()
    for _ in range(2):
        with pytest.raises(TooManyRequests) as caught:
            repository.fetch(digest, 0, 1000)
        assert caught.value.retry_after > 90
        assert "login" in caught.value.hint
    assert asked(mirrors) == [1, 1, 1]  # nobody was asked while they said not to


# -- wrong bytes


def test_a_liar_is_avoided_for_the_blob_and_then_altogether(mirrors: Mirrors) -> None:
    blobs = [noise(("blob", i), 5000) for i in range(5)]
    digests = [mirrors.add_blob(blob) for blob in blobs]
    repository = mirrors.open()
    for number, (digest, blob) in enumerate(zip(digests, blobs, strict=True)):
        with repository.fetch(digest, 0, 5000) as stream:
            data = stream.read(1000)
            if number < 3:
                stream.reject("not what was promised")
            while more := stream.read(1000):
                data += more
        assert data == blob
    counts = [[each.count(path=digest) for each in mirrors.all] for digest in digests]
    assert [count[:2] for count in counts[:3]] == [[1, 1]] * 3
    assert counts[3:] == [[0, 1, 0]] * 2
    assert repository.health.snapshot()[mirrors.mirrors[0].host]["state"] == "distrusted"


def test_reading_again_takes_each_source_once(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    for mirror in mirrors.mirrors:
        mirror.fault(Fault.FLIP)
    repository = mirrors.open()

    def read() -> bytes:
        data = taken(repository.fetch(digest, 0, len(BLOB)))
        if of(data) != digest:
            raise DigestMismatch("it", digest, of(data))
        return data

    assert read_again(repository, digest, read, (DigestMismatch,)) == BLOB
    assert asked(mirrors) == [1, 1, 1]


def test_what_all_sources_agree_on_is_not_held_against_them(mirrors: Mirrors) -> None:
    digest = mirrors.add_blob(BLOB)
    repository = mirrors.open()

    def read() -> bytes:
        taken(repository.fetch(digest, 0, 1000))
        raise DigestMismatch("the TOC", digest, of(b""))

    with pytest.raises(DigestMismatch):
        read_again(repository, digest, read, (DigestMismatch,))
    assert asked(mirrors) == [1, 1, 1]
    assert [host["lies"] for host in repository.health.snapshot().values()] == [0, 0, 0]


# -- pushing


def test_pushes_go_to_the_origin(mirrors: Mirrors) -> None:
    repository = mirrors.open()
    digest = of(b"new")
    assert not repository.has_blob(digest)
    assert repository.push_blob(digest, 3, io.BytesIO(b"new"))
    assert repository.has_blob(digest)
    repository.push_manifest("v2", OCI_MANIFEST, b'{"schemaVersion":2}')
    assert digest in mirrors.origin.blobs
    assert all(not each.requests for each in mirrors.mirrors)


# -- any schedule of failures


class _Body:
    """Bytes that come piece by piece, and perhaps break off."""

    def __init__(self, data: bytes, error: RegistryError | None) -> None:
        self._data, self._error = data, error

    def read(self, size: int) -> bytes:
        if not self._data and self._error is not None:
            raise self._error
        out, self._data = self._data[: min(size, 7)], self._data[min(size, 7) :]
        return out

    def reject(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class _Scripted:
    """A member that does what its script says, one word a request; after its end it works."""

    def __init__(self, host: str, data: bytes, script: list[tuple[str, int]]) -> None:
        self.endpoint = Endpoint(f"https://{host}/v2", host, "image", host)
        self._data = data
        self._script = list(script)
        self._host = host

    def fetch(
        self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None, pace: Pace | None = None
    ) -> _Body:
        word, at = self._script.pop(0) if self._script else ("works", 0)
        data = self._data[blob_offset : blob_offset + size]
        errors: dict[str, RegistryError] = {
            "timeout": RegistryTimeout(self._host, "slow"),
            "missing": BlobMissing(self._host, "no"),
            "unauthorized": Unauthorized(self._host, "no"),
            "limited": TooManyRequests(self._host, "no", retry_after=1.0),
        }
        if word in errors:
            raise errors[word]
        if word == "breaks":
            return _Body(data[:at], RegistryTimeout(self._host, "broke off"))
        if word == "short":
            return _Body(data[:at], None)
        return _Body(data, None)


WORDS = st.tuples(
    st.sampled_from(["works", "timeout", "missing", "unauthorized", "limited", "breaks", "short"]), st.integers(0, 60)
)


@settings(max_examples=300, deadline=None)
@given(scripts=st.lists(st.lists(WORDS, max_size=8), min_size=2, max_size=4), offset=st.integers(0, 50))
def test_any_schedule_of_failures_gives_the_right_bytes_or_a_typed_error(
    scripts: list[list[tuple[str, int]]], offset: int
) -> None:
    data = noise("scripted", 100)
    now = [0.0]
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    members = [_Scripted(f"m{i}", data, script) for i, script in enumerate(scripts)]
    retry = RetryPolicy(attempts=3, first=0.01, longest=0.02, sleep=nap)
    health = Health(clock=lambda: now[0])
    repository = MirroredRepository("m", "image", members, health, retry)  # type: ignore[arg-type]
    began = time.monotonic()
    got = b""
    try:
        with repository.fetch(of(data), offset, 50, deadline=began + 20) as stream:
            while piece := stream.read(10):
                got += piece
        assert got == data[offset : offset + 50]
    except LazyfsError:
        assert data[offset:].startswith(got)
        assert any(scripts)
    assert time.monotonic() - began < 5
    assert len(naps) <= 2 * (len(members) + 2) * 8
