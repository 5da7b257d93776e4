"""What a resolved chain says where its time is over."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import trio

from lazyfs import oci
from lazyfs import reference as references
from lazyfs.digest import of
from lazyfs.mount.apart import Apart
from lazyfs.mount.chain_documents import ChainDocuments, ChainImage
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.chain_resolving import ChainResolver
from lazyfs.mount.early import Early
from lazyfs.mount.keeping import Keeping
from lazyfs.oci import Descriptor, ImageConfig, Manifest
from lazyfs.registry.offline import OfflineRepository

LAYER = Descriptor("application/vnd.oci.image.layer.v1.tar+zstd", of(b"layer"), 5)


class Late:
    """Documents that come when the call's deadline has just passed, within the grace of their requests."""

    async def image(self, *_: object) -> ChainImage:
        await trio.sleep(0)
        config = Descriptor(oci.OCI_CONFIG, of(b"config"), 6)
        document = {
            "schemaVersion": 2, "mediaType": oci.OCI_MANIFEST,
            "config": {"mediaType": config.media_type, "digest": config.digest, "size": config.size},
            "layers": [{"mediaType": LAYER.media_type, "digest": LAYER.digest, "size": LAYER.size}],
        }  # fmt: skip
        return ChainImage("host/app", "linux/amd64", _manifest(document), None, True)

    async def config(self, *_: object) -> ImageConfig:
        await trio.sleep(0)
        raw = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [of(b"tar")]}}
        return oci.parse_config(_json(raw))


class Nobody:
    """Fetches nothing ahead of a container."""

    def expect(self, *_: object) -> None:
        """Ask nobody."""


class Slow:
    async def promise(self, *_: object) -> Any:
        await trio.sleep_forever()


def _json(document: object) -> bytes:
    return json.dumps(document).encode()


def _manifest(document: object) -> Manifest:
    return oci.parse_manifest(_json(document), oci.OCI_MANIFEST)


def test_documents_that_come_with_the_deadline_leave_layers_that_are_not_ready() -> None:
    reference = references.parse("registry.invalid/app")
    repository = OfflineRepository("registry.invalid", "app")
    source = ChainSource(reference, repository, time.monotonic() - 0.1, 0)

    async def resolve() -> dict[str, Any]:
        async with trio.open_nursery() as nursery:
            documents, layers = cast(ChainDocuments, Late()), cast(ChainLayers, Slow())
            resolver = ChainResolver(documents, layers, cast(Keeping, None), Apart(nursery), cast(Early, Nobody()))
            return await resolver.resolve(source)

    answer = trio.run(resolve)
    (layer,) = answer["layers"]
    assert (layer["ready"], layer["lazy"], layer["diff_id"]) == (False, False, of(b"tar"))
    assert "in time" in layer["reason"]
