"""A registry on 127.0.0.1 that holds everything in memory and misbehaves on request.

    with FakeRegistry() as registry:
        image = registry.add_image("debian", "base", layers=[layer_bytes])
        registry.fault(Fault.TRUNCATE, path="/blobs/", times=1)
        mount(f"{registry.host}/debian:base")               # plain HTTP on a random port
        assert registry.count("GET", image.layers[0]) == 2  # the log says what was asked for

A layer is its raw blob, or (blob, annotations, media_type). Diff IDs are worked out by decompressing the blob (gzip,
zstd, plain), unless `config` brings a rootfs of its own. With `redirect=True` blobs are answered by a 307 to a "signed"
URL on a second port (the storage), whose signatures `expire_signatures()` makes invalid. With `auth="basic"` or
`"bearer"` the usual challenges come first; `users` are the accounts, anonymous pulls work with "bearer" and
`anonymous=True`. With `tls` the registry (not the storage) speaks HTTPS. With `referrers` it has the referrers API;
with `isolated` a blob is only in the repositories that it was pushed or mounted to.

Faults are rules, looked at in order for each request that has been parsed; the first that matches decides and uses up
one of its `times`. A rule may also be any callable `Request -> Rule | None` appended to `registry.faults`.
A listener can't refuse one request only: `Fault.REFUSE` resets the connection without an answer, while
`stop_listening()` makes every new connection fail with ECONNREFUSED until `listen_again()`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import zstandard

from lazyfs import oci
from lazyfs.digest import of
from tests.helpers.fake_registry_http import PIECE, Server
from tests.helpers.registry_faults import Fault, Request, Rule

__all__ = ["AddedImage", "FakeRegistry", "Fault", "Request", "Rule", "diff_id"]

Layer = bytes | tuple[bytes, dict[str, str], str]


@dataclass(frozen=True, slots=True)
class AddedImage:
    """What add_image stored. `layers`, `config` and `digest` are digests; `raw` is the manifest."""

    reference: str
    digest: str
    config: str
    layers: tuple[str, ...]
    raw: bytes


@dataclass(slots=True)
class StoredRepository:
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # digest or tag -> (media type, raw)


@dataclass(frozen=True, slots=True)
class Token:
    expires: float
    scope: str


class FakeRegistry:
    """A registry, perhaps with a separate storage host. Start it with `with`; any thread may use what is public.

    `latency` (seconds before each answer) and `rate` (bytes a second of a body, 0: unlimited) may change at any time.
    """

    def __init__(
        self,
        *,
        auth: str = "",
        users: dict[str, str] | None = None,
        identity_token: str = "",
        anonymous: bool = False,
        token_lifetime: float = 300.0,
        redirect: bool = False,
        signature_lifetime: float = 3600.0,
        latency: float = 0.0,
        rate: int = 0,
        tls: ssl.SSLContext | None = None,
        referrers: bool = False,
        isolated: bool = False,
    ) -> None:
        self.auth = auth
        self.users = users or {}
        self.identity_token = identity_token
        self.anonymous = anonymous
        self.token_lifetime = token_lifetime
        self.redirect = redirect
        self.signature_lifetime = signature_lifetime
        self.latency = latency
        self.rate = rate
        self.tls = tls
        self.referrers = referrers
        self.isolated = isolated
        self.resumable = False  # an upload that broke off can be asked for, and goes on
        self.pages: tuple[bytes, str] | None = None  # each page of referrers: its index and its Link header
        self.holds: set[tuple[str, str]] = set()  # (repository, digest), where isolated
        self.scheme = "https" if tls else "http"
        self.challenge = ""  # a WWW-Authenticate header to send instead of the right one
        self.headers: dict[str, str] = {}  # sent with each answer
        self.faults: list[Rule | Callable[[Request], Rule | None]] = []
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, StoredRepository] = {}
        self.uploads: dict[str, bytearray] = {}
        self.tokens: dict[str, Token] = {}
        self.signatures: dict[str, tuple[float, str]] = {}  # signature -> (expires, digest)
        self.released = threading.Event()  # wakes black holes
        self._changed = threading.Condition()  # guards requests, faults and the stores
        self._registry: Server | None = None
        self._storage: Server | None = None
        self._port = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> FakeRegistry:
        self._registry = Server(self, "registry")
        self._port = self._registry.server_address[1]
        self._storage = Server(self, "storage")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        for server in (self._registry, self._storage):
            if server is not None:
                server.stop()

    def stop_listening(self) -> None:
        """Refuse every new connection and break the open ones, as a registry that is down."""
        if self._registry is not None:
            self.release()
            self._registry.stop()
            self._registry = None

    def listen_again(self) -> None:
        """Undo stop_listening, on the same port."""
        if self._registry is None:
            self._registry = Server(self, "registry", self._port)

    def hang_up(self) -> None:
        """Break every open connection now, in whatever it is doing."""
        for server in (self._registry, self._storage):
            if server is not None:
                server.hang_up()

    def release(self) -> None:
        """Let go of the requests that black holes and stalls hold; their connections are closed."""
        self.released.set()
        self.released = threading.Event()

    @property
    def host(self) -> str:
        """The registry's "127.0.0.1:PORT"."""
        return f"127.0.0.1:{self._port}"

    @property
    def storage_host(self) -> str:
        """Where redirects lead."""
        assert self._storage is not None
        return f"127.0.0.1:{self._storage.server_address[1]}"

    # -- content -------------------------------------------------------------------------------------------------

    def add_blob(self, data: bytes, repository: str = "") -> str:
        """Store a blob, for all repositories or, where isolated, for one. Return its digest."""
        digest = of(data)
        with self._changed:
            self.blobs[digest] = data
            self.holds.add((repository, digest))
        return digest

    def add_manifest(self, repository: str, tag: str, media_type: str, raw: bytes) -> str:
        """Store a manifest or index under its digest and, unless `tag` is empty, its tag. Return the digest."""
        digest = of(raw)
        with self._changed:
            manifests = self.repositories.setdefault(repository, StoredRepository()).manifests
            manifests[digest] = (media_type, raw)
            if tag:
                manifests[tag] = (media_type, raw)
        return digest

    def add_image(
        self,
        repository: str,
        tag: str,
        layers: Sequence[Layer],
        config: dict[str, Any] | None = None,
        *,
        manifest_type: str = oci.OCI_MANIFEST,
    ) -> AddedImage:
        """Store an image. `config` is merged over a default: linux/amd64, the diff IDs that the blobs unpack to."""
        descriptors = []
        diff_ids = []
        for layer in layers:
            data, annotations, media_type = layer if isinstance(layer, tuple) else (layer, {}, _guess_type(layer))
            self.add_blob(data, repository)
            descriptors.append(oci.Descriptor(media_type, of(data), len(data), annotations).to_json())
            diff_ids.append(diff_id(data) if not config or "rootfs" not in config else "")
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            **(config or {}),
        }
        raw_config = oci.canonical_json(document)
        self.add_blob(raw_config, repository)
        docker = manifest_type == oci.DOCKER_MANIFEST
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": {
                "mediaType": oci.DOCKER_CONFIG if docker else oci.OCI_CONFIG,
                "digest": of(raw_config),
                "size": len(raw_config),
            },
            "layers": descriptors,
        }
        raw = oci.canonical_json(manifest)
        digest = self.add_manifest(repository, tag, manifest_type, raw)
        reference = f"{self.host}/{repository}" + (f":{tag}" if tag else f"@{digest}")
        return AddedImage(reference, digest, of(raw_config), tuple(d["digest"] for d in descriptors), raw)

    def add_index(self, repository: str, tag: str, images: dict[str, AddedImage], *, docker: bool = False) -> str:
        """Store an index of images by platform ("linux/arm64"). Return its digest."""
        entries = []
        for platform, image in images.items():
            media_type, raw = self.repositories[repository].manifests[image.digest]
            words = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
            entries.append(oci.Descriptor(media_type, image.digest, len(raw), {}, words).to_json())
        media_type = oci.DOCKER_INDEX if docker else oci.OCI_INDEX
        raw = oci.canonical_json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})
        return self.add_manifest(repository, tag, media_type, raw)

    # -- faults --------------------------------------------------------------------------------------------------

    def fault(
        self,
        kind: Fault,
        *,
        path: str = "",
        method: str = "",
        times: int | None = None,
        after: int = 0,
        status: int = 503,
        retry_after: str = "",
        rate: int = 1000,
        seconds: float = 0.0,
        at: int | None = None,
        location: str = "",
    ) -> Rule:
        """Add a rule (see Fault and Rule). The rule is returned: its `hits` tell how often it was applied."""
        rule = Rule(kind, path, method, times, after, status, retry_after, rate, seconds, at, location)
        with self._changed:
            self.faults.append(rule)
        return rule

    def clear_faults(self) -> None:
        """Drop all rules and release what they hold."""
        with self._changed:
            self.faults.clear()
        self.release()

    def expire_signatures(self) -> None:
        """Make the storage answer 403 to every signed URL handed out so far."""
        with self._changed:
            self.signatures.clear()

    def revoke_tokens(self) -> None:
        """Make every bearer token handed out so far worthless."""
        with self._changed:
            self.tokens.clear()

    # -- the log -------------------------------------------------------------------------------------------------

    def count(self, method: str = "", path: str = "", server: str = "") -> int:
        """How many requests came whose path and query contain `path`."""
        return len(self.matching(method, path, server))

    def matching(self, method: str = "", path: str = "", server: str = "") -> list[Request]:
        """The requests so far, oldest first, that fit all arguments given."""
        with self._changed:
            return [
                r
                for r in self.requests
                if path in r.path and (not method or r.method == method) and (not server or r.server == server)
            ]

    def bytes_sent(self, path: str = "") -> int:
        """Body bytes written so far in answers to requests whose path contains `path`."""
        return sum(request.sent for request in self.matching(path=path))

    def clear_log(self) -> None:
        with self._changed:
            self.requests.clear()

    def wait_for(self, count: int, *, method: str = "", path: str = "", timeout: float = 10.0) -> None:
        """Block until `count` requests of that kind have arrived (not: were answered). Raise TimeoutError."""

        def enough() -> bool:
            return sum(path in r.path and (not method or r.method == method) for r in self.requests) >= count

        with self._changed:
            if not self._changed.wait_for(enough, timeout):
                raise TimeoutError(f"fewer than {count} requests for {method} {path!r} within {timeout} s")

    def manifests_of(self, repository: str) -> dict[str, tuple[str, bytes]]:
        """A repository's (media type, raw) by digest and by tag; empty for one that doesn't exist."""
        return self.repositories.get(repository, StoredRepository()).manifests

    # -- for the handler -----------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> Rule | None:
        """Note a request and choose its fault."""
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            for rule in self.faults:
                if isinstance(rule, Rule):
                    if rule.matches(request):
                        return rule
                elif (chosen := rule(request)) is not None:
                    chosen.hits += 1
                    return chosen
        return None

    def sign(self, digest: str) -> str:
        signature = secrets.token_hex(8)
        with self._changed:
            self.signatures[signature] = (time.monotonic() + self.signature_lifetime, digest)
        return f"http://{self.storage_host}/signed/{digest}?signature={signature}"

    def issue(self, scope: str) -> str:
        token = secrets.token_hex(16)
        with self._changed:
            self.tokens[token] = Token(time.monotonic() + self.token_lifetime, scope)
        return token


def _guess_type(blob: bytes) -> str:
    if blob[:2] == b"\x1f\x8b":
        return oci.OCI_LAYER_GZIP
    return oci.OCI_LAYER_ZSTD if blob[:4] == b"\x28\xb5\x2f\xfd" else oci.OCI_LAYER


def diff_id(blob: bytes) -> str:
    """Return the digest of a layer blob's tar stream: of the decompressed bytes if it is gzip or zstd, else its own."""
    media_type = _guess_type(blob)
    if media_type == oci.OCI_LAYER:
        return of(blob)
    raw = io.BytesIO(blob)
    stream: Any = gzip.GzipFile(fileobj=raw)
    if media_type == oci.OCI_LAYER_ZSTD:
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    digest = hashlib.sha256()
    with stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return "sha256:" + digest.hexdigest()
