"""The HTTP side of the fake registry: a threaded server and the handler that routes, challenges and misbehaves."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.registry.referrers import described
from tests.helpers.registry_faults import Fault, Request

if TYPE_CHECKING:
    from tests.helpers.fake_registry import FakeRegistry

PIECE = 64 << 10  # bytes written at a time


class Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, registry: FakeRegistry, role: str, port: int = 0) -> None:
        self.registry = registry
        self.role = role
        self.live: set[socket.socket] = set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.live.add(request)
        super().process_request(request, client_address)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.registry.tls is not None and self.role == "registry":
            # The handshake is left to the first read, in the connection's own thread.
            connection = self.registry.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.live.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections broken by a fault or by the client end their thread quietly."""

    def hang_up(self) -> None:
        """Break every open connection."""
        with self.lock:
            for connection in self.live:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.hang_up()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 0
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the registry keeps its own log."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        registry = self.server.registry
        self.body = self._read_body()
        self.request_log = Request(
            self.command,
            self.path,
            self.headers.get("Range", ""),
            self.headers.get("Authorization", ""),
            self.server.role,
            {name.lower(): value for name, value in self.headers.items()},
            time.monotonic(),
            received=len(self.body),
        )
        self.rule = registry.arrived(self.request_log)
        kind = self.rule.kind if self.rule else None
        if registry.latency:
            registry.released.wait(registry.latency)
        if self.rule and kind in (Fault.REFUSE, Fault.BLACK_HOLE):
            if kind is Fault.BLACK_HOLE:
                registry.released.wait()
            self._reset()
        elif self.rule and kind is Fault.STATUS:
            session = urlsplit(self.path).path.rpartition("/")[2]
            if registry.resumable and session in registry.uploads:
                registry.uploads[session] += self.body[: len(self.body) // 2]
            extra = {"Retry-After": self.rule.retry_after} if self.rule.retry_after else {}
            self._error(self.rule.status, "FAULT", extra)
        elif self.rule and kind in (Fault.REDIRECT_LOOP, Fault.REDIRECT):
            where = self.rule.location if kind is Fault.REDIRECT else self.path
            self._answer(307, b"", {"Location": where})
        else:
            if self.rule and kind is Fault.DELAY:
                registry.released.wait(self.rule.seconds)
            self._route()

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(out)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- routes --------------------------------------------------------------------------------------------------

    def _route(self) -> None:
        registry = self.server.registry
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if self.server.role == "storage":
            expires, digest = registry.signatures.get(query.get("signature", ""), (0.0, ""))
            if expires < time.monotonic() or not parts.path.endswith(digest):
                self._error(403, "signature expired")
            else:
                self._blob(digest)
            return
        if parts.path == "/token":
            self._token(query)
            return
        match = re.fullmatch(r"/v2/(.+)/(manifests|blobs|uploads|tags|referrers)/([^/]*)", parts.path)
        upload = re.fullmatch(r"/v2/(.+)/blobs/uploads/([^/]*)", parts.path)
        name = upload[1] if upload else match[1] if match else ""
        if not self._allowed(name, "pull" if self.command in ("GET", "HEAD") else "push"):
            return
        if parts.path == "/v2/":
            self._answer(200, b"{}")
        elif upload:
            self._upload(upload[1], upload[2], query)
        elif match and match[2] == "blobs":
            self._blob_request(match[1], match[3])
        elif match and match[2] == "manifests":
            self._manifest(match[1], match[3])
        elif match and match[2] == "referrers" and registry.pages is not None:
            self._answer(200, registry.pages[0], {"Content-Type": oci.OCI_INDEX, "Link": registry.pages[1]})
        elif match and match[2] == "referrers" and registry.referrers:
            entries = [e.to_json() for e in _referring(registry.manifests_of(match[1]), match[3])]
            index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries}
            self._answer(200, json.dumps(index).encode(), {"Content-Type": oci.OCI_INDEX})
        elif match and match[2] == "tags":
            known = registry.manifests_of(match[1])
            self._answer(200, json.dumps({"name": match[1], "tags": [t for t in known if ":" not in t]}).encode())
        else:
            self._error(404, "UNSUPPORTED")

    def _blob_request(self, name: str, digest: str) -> None:
        registry = self.server.registry
        if digest not in registry.blobs or (registry.isolated and (name, digest) not in registry.holds):
            self._error(404, "BLOB_UNKNOWN")
        elif registry.redirect:
            self._answer(307, b"", {"Location": registry.sign(digest)})
        else:
            self._blob(digest)

    def _blob(self, digest: str) -> None:
        data = self.server.registry.blobs.get(digest)
        if data is None:
            self._error(404, "BLOB_UNKNOWN")
            return
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "Accept-Ranges": "bytes",
        }
        kind = self.rule.kind if self.rule else None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or kind is Fault.IGNORE_RANGE:
            self._answer(200, data, headers)
            return
        start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        if start >= len(data) or end < start:
            self._error(416, "RANGE_INVALID", {"Content-Range": f"bytes */{len(data)}"})
            return
        if kind is Fault.SHORT_RANGE:
            end = (start + end) // 2
        off = 1 if kind is Fault.WRONG_RANGE else 0
        headers["Content-Range"] = f"bytes {start + off}-{end + off}/{len(data)}"
        self._answer(206, memoryview(data)[start : end + 1], headers)

    def _manifest(self, name: str, target: str) -> None:
        registry = self.server.registry
        if self.command == "PUT":
            media_type = self.headers.get("Content-Type", "")
            digest = registry.add_manifest(name, "" if ":" in target else target, media_type, self.body)
            if ":" in target and target != digest:
                self._error(400, "DIGEST_INVALID")
                return
            headers = {"Location": f"/v2/{name}/manifests/{digest}", "Docker-Content-Digest": digest}
            about = described(media_type, self.body)
            if registry.referrers and about is not None:
                headers["OCI-Subject"] = about[0]
            self._answer(201, b"", headers)
            return
        found = registry.manifests_of(name).get(target)
        if found is None:
            self._error(404, "MANIFEST_UNKNOWN")
        else:
            self._answer(200, found[1], {"Content-Type": found[0], "Docker-Content-Digest": of(found[1])})

    def _upload(self, name: str, session: str, query: dict[str, str]) -> None:
        registry = self.server.registry
        if self.command == "POST" and (query.get("from", ""), query.get("mount", "")) in registry.holds:
            digest = query["mount"]
            registry.holds.add((name, digest))
            self._answer(201, b"", {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest})
        elif self.command == "POST":
            session = secrets.token_hex(8)
            registry.uploads[session] = bytearray()
            self._answer(202, b"", {"Location": f"/v2/{name}/blobs/uploads/{session}?state=1", "Range": "0-0"})
        elif session not in registry.uploads:
            self._error(404, "BLOB_UPLOAD_UNKNOWN")
        elif self.command == "GET" and registry.resumable:
            last = max(len(registry.uploads[session]) - 1, 0)
            self._answer(204, b"", {"Location": f"/v2/{name}/blobs/uploads/{session}?state=3", "Range": f"0-{last}"})
        elif self.command == "PATCH":
            registry.uploads[session] += self.body
            size = len(registry.uploads[session])
            self._answer(
                202, b"", {"Location": f"/v2/{name}/blobs/uploads/{session}?state=2", "Range": f"0-{size - 1}"}
            )
        elif self.command == "PUT":
            data = bytes(registry.uploads.pop(session)) + self.body
            if of(data) != query.get("digest"):
                self._error(400, "DIGEST_INVALID")
                return
            registry.add_blob(data, name)
            self._answer(201, b"", {"Location": f"/v2/{name}/blobs/{of(data)}", "Docker-Content-Digest": of(data)})
        elif self.command == "DELETE":
            del registry.uploads[session]
            self._answer(204, b"")
        else:
            self._error(405, "UNSUPPORTED")

    # -- authorisation -------------------------------------------------------------------------------------------

    def _basic_user(self) -> str | None:
        kind, _, encoded = self.headers.get("Authorization", "").partition(" ")
        if kind != "Basic":
            return None
        user, _, password = base64.b64decode(encoded).decode().partition(":")
        return user if self.server.registry.users.get(user) == password else None

    def _allowed(self, name: str, action: str) -> bool:
        registry = self.server.registry
        if not registry.auth:
            return True
        if registry.auth == "basic":
            if self._basic_user() is not None:
                return True
            self._error(401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="fake"'})
            return False
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        token = registry.tokens.get(value) if kind == "Bearer" else None
        if token and token.expires > time.monotonic():
            for scope in token.scope.split(" "):
                head, _, actions = scope.rpartition(":")
                if head == f"repository:{name}" and action in actions.split(","):
                    return True
        challenge = f'Bearer realm="{registry.scheme}://{registry.host}/token",service="fake",scope="repository:{name}:{action}"'
        self._error(401, "UNAUTHORIZED", {"WWW-Authenticate": registry.challenge or challenge})
        return False

    def _token(self, query: dict[str, str]) -> None:
        registry = self.server.registry
        if self.command == "POST":
            form = {key: values[0] for key, values in parse_qs(self.body.decode()).items()}
            if not registry.identity_token or form.get("refresh_token") != registry.identity_token:
                self._error(401, "UNAUTHORIZED")
                return
            scope = form.get("scope", "")
        else:
            user = self._basic_user()
            if user is None and (not registry.anonymous or self.headers.get("Authorization")):
                self._error(401, "UNAUTHORIZED")
                return
            scope = " ".join(parse_qs(urlsplit(self.path).query).get("scope", []))
            if user is None:
                scope = scope.replace(",push", "")
        answer = {"token": registry.issue(scope), "expires_in": int(registry.token_lifetime)}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    # -- answers -------------------------------------------------------------------------------------------------

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": f"fake registry: {code}"}]}).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes | memoryview, headers: dict[str, str] | None = None) -> None:
        rule, registry, size = self.rule, self.server.registry, len(body)
        kind = rule.kind if rule else None
        self.request_log.status = status
        head = [f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}", f"Content-Length: {size}"]
        head += [f"{name}: {value}" for name, value in {**registry.headers, **(headers or {})}.items()]
        raw_head = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")
        if rule and kind is Fault.DRIP_HEADERS:
            self._write(memoryview(raw_head), rule.rate)
        else:
            self.wfile.write(raw_head)
        if self.command == "HEAD":
            return
        end = size
        if rule and kind in (Fault.TRUNCATE, Fault.RESET, Fault.STALL):
            end = min(size, size // 2 if rule.at is None else rule.at)
        if rule and kind is Fault.FLIP and size:
            at = size // 2 if rule.at is None else min(rule.at, size - 1)
            changed = bytearray(body)
            changed[at] ^= 0xFF
            body = bytes(changed)
        self._write(memoryview(body)[:end], rule.rate if rule and kind is Fault.DRIP else registry.rate)
        if kind is Fault.STALL:
            registry.released.wait()
        if kind in (Fault.RESET, Fault.STALL):
            self._reset()
        elif kind is Fault.TRUNCATE:
            self.close_connection = True

    def _write(self, data: memoryview, rate: int) -> None:
        released = self.server.registry.released
        for piece in _pieces(data, max(1, min(PIECE, rate // 20)) if rate else PIECE):
            self.request_log.sent += len(piece)  # first: who has the last byte may look at once
            try:
                self.wfile.write(piece)
            except BaseException:
                self.request_log.sent -= len(piece)
                raise
            if rate and released.wait(len(piece) / rate):
                self.close_connection = True
                return

    def _reset(self) -> None:
        """Close so that the peer sees ECONNRESET."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _referring(manifests: dict[str, tuple[str, bytes]], digest: str) -> Iterator[oci.Descriptor]:
    for target, (media_type, raw) in manifests.items():
        about = described(media_type, raw) if ":" in target else None
        if about is not None and about[0] == digest:
            yield about[1]


def _pieces(data: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
