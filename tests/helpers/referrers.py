"""Where referrers are kept: a registry with the API for them, one without it (they have a tag there), and a layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyfs import oci, reference
from lazyfs.digest import of
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.local.layout import LayoutRepository
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.repository import Repository
from tests.helpers.fake_registry import FakeRegistry

QUICK = RetryPolicy(attempts=2, first=0.0, longest=0.0)
SUBJECT = oci.Descriptor(oci.OCI_MANIFEST, of(b"an image"), 8)  # what they refer to
KEEPERS = ("api", "no api", "layout")


@contextmanager
def kept_by(keeper: str, directory: Path) -> Iterator[Repository]:
    """Yield a repository of one of KEEPERS; `directory` takes the layout."""
    if keeper == "layout":
        yield LayoutRepository(directory / "layout")
        return
    with FakeRegistry(referrers=keeper == "api") as registry:
        opened = opened_at(registry)
        yield opened
        opened.close()


def opened_at(registry: FakeRegistry) -> Repository:
    """Open the registry's repository `app`."""
    return open_repository(reference.parse(f"{registry.host}/app:1"), OpenOptions(retry=QUICK))
