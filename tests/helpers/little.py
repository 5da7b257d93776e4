"""Little images that run, in a registry that misbehaves on request: a shell and some tools, lazily or as plain gzip.

images = Little(registry, scratch)
image = images.add("one", images.lazy(images.system), images.lazy(data(1)))
node.cri.pull(image)
"""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from tests.helpers import small_image
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.fake_registry import FakeRegistry, Layer
from tests.helpers.pattern import pattern
from tests.helpers.service_images import pause_layer
from tests.helpers.tars import dir_, file, tar_of

_CONFIG = {"config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"]}}


def data(number: int, size: int = 1_500_000) -> bytes:
    """Return a layer's tar with /data/number and /data/bytes, which differ by `number`."""
    return tar_of(dir_("data"), file("data/number", b"%d\n" % number), file("data/bytes", pattern(size, number)))


class Little:
    """Images in `registry`, made below `place`. The pod's pause image is among them."""

    def __init__(self, registry: FakeRegistry, place: Path) -> None:
        self.registry = registry
        made = place / "made"
        made.mkdir()
        small_image.make_tree(made / "tree")
        for name in ("dev", "proc", "sys", "run"):
            (made / "tree" / name).mkdir()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(made / "tree", ".")
        self.system = out.getvalue()  # the tar of the layer that every image begins with
        for program in (made / "tree/usr/bin").iterdir():
            with program.open("ab") as end:  # runs as before
                end.write(b"another build")
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(made / "tree", ".")
        self.other_system = out.getvalue()  # programs that no other layer has
        self._lazy: dict[bytes, LayerBlob] = {}
        registry.add_image("pause", "1", [pause_layer(made)], {"config": {"Entrypoint": ["/pause"]}})

    @property
    def pause(self) -> str:
        return f"{self.registry.host}/pause:1"

    def lazy(self, tar: bytes) -> Layer:
        """Return the layer with a TOC."""
        if tar not in self._lazy:
            self._lazy[tar] = zstd_chunked_layer(tar, chunk_size=1 << 17, frame_size=1 << 17)
        made = self._lazy[tar]
        return made.blob, dict(made.annotations), made.media_type

    def plain(self, tar: bytes) -> Layer:
        """Return the layer as gzip."""
        return gzip.compress(tar, 1, mtime=0)

    def add(self, name: str, *layers: Layer, **config: str) -> str:
        """Store an image and return HOST/NAME:latest. `config`: more of its config, such as User."""
        whole = {"config": {**_CONFIG["config"], **config}}
        return self.registry.add_image(name, "latest", layers, whole).reference

    def numbered(self, number: int) -> str:
        """Store a lazy image of its own: the system, and `data(number)`."""
        return self.add(f"app{number}", self.lazy(self.system), self.lazy(data(number)))
