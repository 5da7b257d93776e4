"""containerd's images: names that stand for a manifest or an index, and keep it from being collected.

Source: containerd, api/services/images/v1, and docs/garbage-collection.md for the labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lazyfs.containerd.calls import Calls, Method, Refused
from lazyfs.containerd.proto import images_pb2 as messages
from lazyfs.containerd.proto import namespaces_pb2
from lazyfs.oci import Descriptor

_SERVICE = "/containerd.services.images.v1.Images/"
_GET = Method(_SERVICE + "Get", messages.GetImageRequest, messages.GetImageResponse)
_LIST = Method(_SERVICE + "List", messages.ListImagesRequest, messages.ListImagesResponse)
_CREATE = Method(_SERVICE + "Create", messages.CreateImageRequest, messages.CreateImageResponse)
_UPDATE = Method(_SERVICE + "Update", messages.UpdateImageRequest, messages.UpdateImageResponse)
_NAMESPACES = Method(
    "/containerd.services.namespaces.v1.Namespaces/List",
    namespaces_pb2.ListNamespacesRequest,
    namespaces_pb2.ListNamespacesResponse,
)
_TRIES = 3  # of create and update, while others create and delete the same name


@dataclass(frozen=True, slots=True)
class Image:
    """A name and what it stands for."""

    name: str
    target: Descriptor
    labels: dict[str, str] = field(default_factory=dict)


class Images:
    """The images of one namespace. Thread-safe; every call blocks and raises RegistryErrors."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def get(self, name: str, *, deadline: float | None = None) -> Image | None:
        """Return the image of exactly this name, None where there is none."""
        try:
            answer = self._calls.one(_GET, messages.GetImageRequest(name=name), deadline=deadline)
        except Refused as error:
            if error.code == "NOT_FOUND":
                return None
            raise self._calls.fault(f"looking for image {name}", error) from None
        return _from_message(answer.image)

    def find(self, *filters: str, deadline: float | None = None) -> list[Image]:
        """Return the images that any of containerd's `filters` ('name==…') fits; all without one."""
        try:
            answer = self._calls.one(_LIST, messages.ListImagesRequest(filters=filters), deadline=deadline)
        except Refused as error:
            raise self._calls.fault("listing images", error) from None
        return [_from_message(image) for image in answer.images]

    def put(self, image: Image, *, lease: str = "") -> None:
        """Make the name stand for this target, whether or not it exists; its other labels stay."""
        message = _to_message(image)
        update = messages.UpdateImageRequest(image=message)
        update.update_mask.paths.extend(["target", *(f"labels.{key}" for key in sorted(image.labels))])
        for last in (*[False] * (_TRIES - 1), True):
            try:
                self._calls.one(_CREATE, messages.CreateImageRequest(image=message), lease=lease)
                return
            except Refused as error:
                if error.code != "ALREADY_EXISTS":
                    raise self._calls.fault(f"naming image {image.name}", error) from None
            try:
                self._calls.one(_UPDATE, update, lease=lease)
                return
            except Refused as error:
                if last or error.code != "NOT_FOUND":
                    raise self._calls.fault(f"naming image {image.name}", error) from None

    def namespaces(self, *, deadline: float | None = None) -> list[str]:
        """Return the names of all namespaces of this containerd."""
        try:
            answer = self._calls.one(_NAMESPACES, namespaces_pb2.ListNamespacesRequest(), deadline=deadline)
        except Refused as error:
            raise self._calls.fault("listing namespaces", error) from None
        return [namespace.name for namespace in answer.namespaces]


def _from_message(image: messages.Image) -> Image:
    target = image.target
    descriptor = Descriptor(target.media_type, target.digest, target.size, dict(target.annotations))
    return Image(image.name, descriptor, dict(image.labels))


def _to_message(image: Image) -> messages.Image:
    message = messages.Image(name=image.name, labels=image.labels)
    message.target.media_type = image.target.media_type
    message.target.digest = image.target.digest
    message.target.size = image.target.size
    message.target.annotations.update(image.target.annotations)
    return message
