"""The images of perf.startup in a directory that is kept: made by mmdebstrap once, as NAME:source and NAME:lazy.

The directory holds a registry's blobs, and for each image NAME.json with its sizes and what it was made from: an image
whose recipe is another one by now is made again. Making one takes a minute or two, and Debian's archive.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf import lazy_image
from perf.start import scratch
from perf.workloads import SUITE, Workload
from tests.helpers import real, service_images

_RECIPE = 1  # raised when images are made in another way
_MTIME = 946684800  # 2000-01-01, of the files that are added
_BLOCK = 4096
_TEXT = (b"the same text again; " * 100)[: _BLOCK // 2]


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the registry, with the bytes of all layers of both forms, as they are fetched."""

    name: str
    source_bytes: int
    lazy_bytes: int
    blobs: tuple[str, ...]  # digests of all that belongs to either form

    def reference(self, host: str, lazy: bool) -> str:
        """Return HOST/NAME:TAG, as containerd writes it."""
        return f"{host}/{self.name}:{'lazy' if lazy else 'source'}"


def prepare(cache: Path, workload: Workload) -> tuple[Image, bool]:
    """Return a workload's image, and whether it had to be made. Blocking: minutes, the first time."""
    cache.mkdir(parents=True, exist_ok=True)
    record, recipe = cache / f"{workload.image}.json", _recipe(workload)
    if found := _known(record, recipe):
        return found, False
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _known(record, recipe):
            return found, False  # another run made it meanwhile
        made = {"recipe": recipe, "name": workload.image, **_make(cache, workload)}
        partial = record.with_suffix(".new")
        partial.write_text(json.dumps(made))
        partial.rename(record)
    found = _known(record, recipe)
    assert found is not None
    return found, True


def _known(record: Path, recipe: str) -> Image | None:
    """Return an image that was made by this recipe."""
    with contextlib.suppress(OSError):
        known = json.loads(record.read_text())
        if known.pop("recipe") == recipe:
            return Image(known["name"], known["source_bytes"], known["lazy_bytes"], tuple(known["blobs"]))
    return None


@contextlib.contextmanager
def registry(cache: Path, directory: Path) -> Iterator[real.DockerRegistry]:
    """Serve the images that were prepared, and `pause:1`, the program of pods' sandboxes."""
    with real.docker_registry(directory, cache / "blobs") as running:
        if not (cache / "blobs/docker/registry/v2/repositories/pause").exists():
            _make_pause(directory, running)
        yield running


def read_blobs(cache: Path, image: Image) -> None:
    """Read an image's blobs into memory, so that the registry is as fast as its link and not as this machine's disk."""
    for digest in image.blobs:
        with blob_path(cache, digest).open("rb", buffering=0) as blob:
            while blob.read(4 << 20):
                pass


def blob_path(cache: Path, digest: str) -> Path:
    """Return the file of a blob in the registry's directory."""
    name = digest.removeprefix("sha256:")
    return cache / "blobs/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


# -- making them -------------------------------------------------------------------------------------------------------


def _recipe(workload: Workload) -> str:
    parts = [_RECIPE, SUITE, workload.packages, workload.files, workload.java, workload.data]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _make(cache: Path, workload: Workload) -> dict[str, Any]:
    name = workload.image
    with scratch() as here, real.docker_registry(here / "r", cache / "blobs") as running:
        system, own = here / "system.tar", here / "own.tar"
        wish = [f"--include={workload.packages}"] if workload.packages else []
        real.call("mmdebstrap", "--variant=minbase", *wish, "--format=tar", SUITE, system, timeout=1800)
        tars = [system]
        if workload.files or workload.java or workload.data:
            _write_own(here, own, workload)
            tars.append(own)
        source = real.build_layout(here / "plain", "plain", tars)
        for tar in tars:
            tar.unlink()
        real.copy_image(source, running.image(name, "source"))
        shutil.rmtree(here / "plain")
        lazy_image.command(here, here / "c", {}, "convert", running.image(name, "source"), running.image(name, "lazy"))
        found = {tag: _manifest(running.image(name, tag)) for tag in ("source", "lazy")}
    sizes = {f"{tag}_bytes": sum(layer["size"] for layer in found[tag]["layers"]) for tag in found}
    blobs = {part["digest"] for one in found.values() for part in (one["config"], *one["layers"])}
    return {**sizes, "blobs": sorted(blobs)}


def _manifest(reference: str) -> dict[str, Any]:
    raw = real.call("skopeo", "inspect", "--raw", "--tls-verify=false", reference)
    found: dict[str, Any] = json.loads(raw)
    return found


def _write_own(here: Path, path: Path, workload: Workload) -> None:
    """Write the layer of a workload's own files."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, text in workload.files:
            archive.addfile(_member(name, len(text.encode())), io.BytesIO(text.encode()))
        if workload.java:
            jar = _jar(here, workload.java)
            archive.addfile(_member("srv/app.jar", len(jar)), io.BytesIO(jar))
        if workload.data:
            archive.addfile(_member("srv/data", workload.data), io.BufferedReader(_Data(workload.data)))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, _MTIME, 0o644
    return member


class _Data(io.RawIOBase):
    """A file that compresses to about half, no block of it like another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._left = size
        self._source = random.Random(1)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer of whole blocks; only the file's last one may be shorter."""
        size = min(len(buffer), self._left)
        self._left -= size
        blocks = -(-size // _BLOCK)
        buffer[:size] = b"".join(self._source.randbytes(_BLOCK // 2) + _TEXT for _ in range(blocks))[:size]
        return size


def _jar(here: Path, source: str) -> bytes:
    """Compile the class Main with this machine's JDK, for the Java of the image, and return its JAR."""
    place = here / "java"
    place.mkdir()
    (place / "Main.java").write_text(source)
    real.call("javac", "--release", "17", "-d", place / "classes", place / "Main.java")
    real.call("jar", "--create", "--file", place / "app.jar", "--main-class", "Main", "-C", place / "classes", ".")
    return (place / "app.jar").read_bytes()


def _make_pause(directory: Path, running: real.DockerRegistry) -> None:
    place = directory / "pause"
    place.mkdir()
    tar = place / "pause.tar"
    tar.write_bytes(gzip.decompress(service_images.pause_layer(place)))
    real.copy_image(real.build_layout(place / "layout", "1", [tar], ("/pause",)), running.image("pause", "1"))
