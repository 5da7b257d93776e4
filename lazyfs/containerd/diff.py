"""containerd's diff service: a layer of the content store, unpacked into the mounts of a snapshot.

Source: containerd, api/services/diff/v1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lazyfs.containerd.calls import Calls, Method, Refused
from lazyfs.containerd.proto import diff_pb2 as messages
from lazyfs.containerd.snapshots import Mount
from lazyfs.errors import BlobMissing, DocumentInvalid
from lazyfs.limits import SLOWEST_UNPACK
from lazyfs.oci import Descriptor

_APPLY = Method("/containerd.services.diff.v1.Diff/Apply", messages.ApplyRequest, messages.ApplyResponse)
_UNREADABLE = ("unsupported diff media type", "no processor for media-type", "currently unsupported")


class Diff:
    """Unpacking in one namespace. Thread-safe; every call blocks and raises RegistryErrors, or StoreFull."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def apply(self, layer: Descriptor, mounts: Sequence[Mount], *, lease: str = "") -> str:
        """Unpack a layer's blob, which containerd has, into `mounts`; return the diff ID of what it unpacked.

        Raise BlobMissing, DocumentInvalid for a layer of a kind that containerd can't read.
        """
        question = messages.ApplyRequest()
        question.diff.media_type = layer.media_type
        question.diff.digest = layer.digest
        question.diff.size = layer.size
        for mount in mounts:
            question.mounts.add(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        deadline = time.monotonic() + self._calls.timeout + layer.size / SLOWEST_UNPACK
        try:
            return self._calls.one(_APPLY, question, lease=lease, deadline=deadline).applied.digest
        except Refused as error:
            if error.code == "NOT_FOUND":
                raise BlobMissing(
                    self._calls.address, f"containerd has lost layer {layer.digest} meanwhile: {error.detail[:300]}"
                ) from None
            if any(words in error.detail for words in _UNREADABLE):
                raise DocumentInvalid(
                    f"containerd at {self._calls.address} can't unpack layer {layer.digest} of type "
                    f"{layer.media_type[:100]!r}: {error.detail[:200]}"
                ) from None
            raise self._calls.fault(f"unpacking layer {layer.digest}", error) from None
