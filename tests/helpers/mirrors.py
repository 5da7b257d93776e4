"""A registry with mirrors, all fake, and the hosts.toml that says so.

with Mirrors(place, 2) as all:
    image = all.add_image("image", "latest", [blob])
    all.mirrors[0].fault(Fault.DRIP, path="/blobs/")
    repository = all.open("image")
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lazyfs.reference import parse
from lazyfs.registry.config.access import Access
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.transport import Transport
from lazyfs.registry.mirrored import MirroredRepository
from lazyfs.registry.open import OpenOptions, open_repository
from tests.helpers.blobs import LayerBlob
from tests.helpers.fake_registry import AddedImage, FakeRegistry

QUICK = RetryPolicy(attempts=2, first=0.01, longest=0.02)


class Mirrors:
    """An origin and `count` mirrors of it with the same content. `place` takes the configuration."""

    def __init__(self, place: Path, count: int = 2, **options: Any) -> None:
        self.place = place
        self.origin = FakeRegistry(**options)
        self.mirrors = [FakeRegistry(**options) for _ in range(count)]
        self._stack = contextlib.ExitStack()
        self._transports: list[Transport] = []

    def __enter__(self) -> Mirrors:
        for each in self.all:
            self._stack.enter_context(each)
        self.configure()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for transport in self._transports:
            transport.close()
        self._stack.close()

    @property
    def all(self) -> list[FakeRegistry]:
        """Mirrors in order of preference, then the origin."""
        return [*self.mirrors, self.origin]

    @property
    def certs_dir(self) -> Path:
        return self.place / "certs.d"

    def configure(self, capabilities: Sequence[str] = ("pull", "resolve")) -> None:
        """Write hosts.toml anew."""
        directory = self.certs_dir / self.origin.host
        directory.mkdir(parents=True, exist_ok=True)
        text = f'server = "{self.origin.scheme}://{self.origin.host}"\n'
        for mirror in self.mirrors:
            words = ", ".join(f'"{word}"' for word in capabilities)
            text += f'[host."{mirror.scheme}://{mirror.host}"]\ncapabilities = [{words}]\n'
        (directory / "hosts.toml").write_text(text)

    def add_image(self, name: str, tag: str, layers: Sequence[Any]) -> AddedImage:
        """Store an image everywhere."""
        parts = [
            (layer.blob, dict(layer.annotations), layer.media_type) if isinstance(layer, LayerBlob) else layer
            for layer in layers
        ]
        return [each.add_image(name, tag, parts) for each in self.all][-1]

    def add_blob(self, data: bytes) -> str:
        """Store a blob everywhere."""
        return [each.add_blob(data) for each in self.all][-1]

    def open(self, name: str = "image", *, retry: RetryPolicy = QUICK, **options: Any) -> MirroredRepository:
        """Open the repository with its mirrors."""
        transport = Transport()
        self._transports.append(transport)
        given = {"connect_timeout": 1.0, "answer_timeout": 5.0, "total_timeout": 20.0, **options}
        repository = open_repository(
            parse(f"{self.origin.host}/{name}"),
            OpenOptions(retry=retry, transport=transport, access=Access(certs_dirs=(self.certs_dir,)), **given),
        )
        assert isinstance(repository, MirroredRepository)
        return repository

    def clear_faults(self) -> None:
        for each in self.all:
            each.clear_faults()
