"""containerd's leases: they hold content until something else refers to it. Source: api/services/leases/v1."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from lazyfs.containerd.calls import Calls, Method, Refused
from lazyfs.containerd.proto import leases_pb2 as messages

_SERVICE = "/containerd.services.leases.v1.Leases/"
_CREATE = Method(_SERVICE + "Create", messages.CreateRequest, messages.CreateResponse)
_DELETE = Method(_SERVICE + "Delete", messages.DeleteRequest, messages.CreateResponse)
_ADD = Method(_SERVICE + "AddResource", messages.AddResourceRequest, messages.CreateResponse)
_LIST = Method(_SERVICE + "List", messages.ListRequest, messages.ListResponse)

LIFETIME = 24 * 3600.0  # seconds after which containerd itself drops a lease that we could not


CONTENT = "content"  # the kind of resource that blobs are; snapshots are "snapshots/SNAPSHOTTER"


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease and what was written on it."""

    id: str
    labels: dict[str, str]


class Leases:
    """The leases of one namespace. Thread-safe; every call blocks and raises RegistryErrors."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def create(self, *, lifetime: float = LIFETIME, labels: dict[str, str] | None = None) -> str:
        """Make a lease that ends by itself after `lifetime` seconds; return its id."""
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime))
        question = messages.CreateRequest(
            id=f"lazyfs-{secrets.token_hex(8)}", labels={**(labels or {}), "containerd.io/gc.expire": expires}
        )
        try:
            return self._calls.one(_CREATE, question).lease.id
        except Refused as error:
            raise self._calls.fault("making a lease", error) from None

    def hold(self, lease: str, name: str, kind: str = CONTENT) -> None:
        """Put a blob, or what else `kind` says, under a lease, whoever made it and whether or not it is there."""
        question = messages.AddResourceRequest(id=lease, resource=messages.Resource(id=name, type=kind))
        try:
            self._calls.one(_ADD, question)
        except Refused as error:
            if error.code != "ALREADY_EXISTS":
                raise self._calls.fault(f"holding {name}", error) from None

    def delete(self, lease: str, *, collect: bool = False, deadline: float | None = None) -> None:
        """End a lease, if it is still there: what nothing else refers to goes; with `collect` before this returns."""
        try:
            self._calls.one(_DELETE, messages.DeleteRequest(id=lease, sync=collect), deadline=deadline)
        except Refused as error:
            if error.code != "NOT_FOUND":
                raise self._calls.fault("ending a lease", error) from None

    def ids(self) -> list[str]:
        """Return the ids of all leases."""
        return [lease.id for lease in self.all()]

    def all(self) -> list[Lease]:
        """Return all leases."""
        try:
            answer = self._calls.one(_LIST, messages.ListRequest())
            return [Lease(lease.id, dict(lease.labels)) for lease in answer.leases]
        except Refused as error:
            raise self._calls.fault("listing leases", error) from None
