"""When the registry is asked what a tag is, how long its answer is waited for, and what does without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazyfs import config, reference
from lazyfs.chunks.catalog import Catalog
from lazyfs.errors import ManifestMissing, PlatformMissing, RegistryError, RegistryTimeout, Unauthorized
from lazyfs.mount.resolving import Pull, Resolver
from lazyfs.oci import Manifest
from lazyfs.reference import Reference
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.open import open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry, Fault

PLATFORM = "linux/amd64"


class Place:
    """A node's memory and a registry; `whole` is what the store would say."""

    def __init__(self, registry: FakeRegistry, root: Path) -> None:
        self.registry = registry
        self.whole = True
        self.catalog = Catalog(root / "catalog.db")
        self.pool = ThreadPoolExecutor(8)
        self.where = reference.parse(f"{registry.host}/app:v1")
        self.repository = open_repository(self.where)
        self.resolver = Resolver(self.catalog, config.load({"root": root}), self._is_whole, self.pool)

    def _is_whole(self, manifest: Manifest) -> bool:
        return self.whole

    def resolve(
        self, pull: Pull = Pull.NEWER, where: Reference | None = None, repository: Repository | None = None
    ) -> tuple[str, str]:
        """Return the manifest's digest and why memory had to do; wait for the config too."""
        found = self.resolver.resolve(repository or self.repository, where or self.where, PLATFORM, pull)
        found.config.result(10)
        return found.manifest.digest, found.stale


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with FakeRegistry() as registry:
        made = Place(registry, tmp_path)
        yield made
        registry.release()
        made.pool.shutdown()
        made.repository.close()
        made.catalog.close()


def test_policies_with_a_registry_that_answers(place: Place) -> None:
    old = place.registry.add_image("app", "v1", [b"old"])
    assert place.resolve() == (old.digest, "")
    new = place.registry.add_image("app", "v1", [b"new"])
    offline = OfflineRepository(place.where.host, "app")
    assert place.resolve(Pull.MISSING) == (old.digest, "")
    assert place.resolve(Pull.NEVER, repository=offline) == (old.digest, "")
    assert place.resolve(Pull.ALWAYS) == (new.digest, "")
    assert place.resolve(Pull.NEVER, repository=offline) == (new.digest, "")


def test_policies_without_one(place: Place) -> None:
    image = place.registry.add_image("app", "v1", [b"layer"])
    place.resolve()
    place.registry.stop_listening()
    digest, stale = place.resolve()
    assert digest == image.digest and "refused" in stale
    with pytest.raises(RegistryError):
        place.resolve(Pull.ALWAYS)
    for pull in (Pull.NEWER, Pull.MISSING):
        with pytest.raises(RegistryError):
            place.resolve(pull, reference.parse(f"{place.registry.host}/app:v2"))
    with pytest.raises(ManifestMissing, match="is not on this node"):
        place.resolve(Pull.NEVER, reference.parse(f"{place.registry.host}/app:v2"))


def test_what_is_whole_waits_two_seconds_and_the_late_answer_is_kept(place: Place) -> None:
    old = place.registry.add_image("app", "v1", [b"old"])
    place.resolve()
    new = place.registry.add_image("app", "v1", [b"new"])
    place.registry.fault(Fault.DELAY, path="/manifests/", seconds=4.0, times=1)
    began = time.monotonic()
    digest, stale = place.resolve()
    assert digest == old.digest and "no answer within 2 s" in stale
    assert 1.9 < time.monotonic() - began < 3.5
    place.pool.shutdown(wait=True)  # until the answer is there
    assert place.catalog.last_digest(str(place.where), PLATFORM).digest == new.digest  # type: ignore[union-attr]


def test_what_is_not_whole_waits_for_a_slow_answer(place: Place) -> None:
    place.registry.add_image("app", "v1", [b"old"])
    place.resolve()
    new = place.registry.add_image("app", "v1", [b"new"])
    place.whole = False
    place.registry.fault(Fault.DELAY, path="/manifests/", seconds=3.0, times=1)
    assert place.resolve() == (new.digest, "")


def test_a_name_server_that_is_gone_holds_nobody_up(place: Place) -> None:
    """A resolver's own timeouts know nothing of our deadlines: the call that asks is left behind."""
    image = place.registry.add_image("app", "v1", [b"layer"])
    place.resolve()
    stuck = threading.Event()

    class Stuck(OfflineRepository):
        def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
            stuck.wait(60)
            raise RegistryTimeout(self.host, "the name is not resolved")

    began = time.monotonic()
    digest, stale = place.resolve(repository=Stuck(place.where.host, "app"))
    stuck.set()
    assert (digest, "no answer" in stale) == (image.digest, True)
    assert time.monotonic() - began < 4


def test_an_image_known_by_tag_is_known_by_its_digests(place: Place) -> None:
    images = {
        f"linux/{arch}": place.registry.add_image("app", "", [arch.encode()], {"architecture": arch})
        for arch in ("amd64", "arm64")
    }
    index = place.registry.add_index("app", "v1", images)
    assert place.resolve()[0] == images[PLATFORM].digest
    place.registry.stop_listening()
    for digest in (images[PLATFORM].digest, index):
        assert place.resolve(where=place.where.with_digest(digest)) == (images[PLATFORM].digest, "")
    with pytest.raises(RegistryError):
        place.resolver.resolve(place.repository, place.where.with_digest(index), "linux/arm64")


def test_what_another_try_would_not_mend_is_not_papered_over(place: Place) -> None:
    place.registry.add_image("app", "v1", [b"layer"])
    place.resolve()
    place.registry.fault(Fault.STATUS, path="/manifests/", status=401)
    with pytest.raises(Unauthorized):
        place.resolve()
    place.registry.clear_faults()
    place.registry.fault(Fault.STATUS, path="/manifests/", status=404)
    with pytest.raises(ManifestMissing):
        place.resolve()


def test_a_config_for_another_platform_is_refused_from_memory_too(place: Place) -> None:
    image = place.registry.add_image("app", "v1", [b"layer"], {"architecture": "amd64"})
    place.resolve()
    place.registry.stop_listening()
    found = place.resolver.resolve(place.repository, place.where.with_digest(image.digest), "linux/s390x")
    with pytest.raises(PlatformMissing):
        found.config.result(10)
