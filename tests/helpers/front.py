"""nginx before and behind a registry: a front with a login and signed redirects, and the storage that they lead to.

The front speaks TLS and asks for a login, hands blobs to a signer and everything else to docker-registry. The signer
answers 307 to https://localhost:PORT/…?md5=…&expires=…, the storage: another server of nginx with TLS, which holds the
signature against its own secret (ngx_http_secure_link_module) and serves the registry's own files.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers import real
from tests.helpers.certs import Pair

_SECRET = "signed by a test"
_CONFIG = """\
daemon off;
master_process off;
pid {place}/nginx.pid;
error_log {place}/error.log warn;
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/f;
  uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
  client_max_body_size 0;
  log_format ours '$server_port|$request_method|$uri|$args|$status|$http_authorization|$http_range|$ssl_protocol';
  access_log {place}/access.log ours;
  ssl_certificate {certificate}; ssl_certificate_key {key};
  server {{
    listen 127.0.0.1:{front} ssl;
    auth_basic "registry"; auth_basic_user_file {place}/users;
    location / {{ proxy_pass http://{registry}; proxy_set_header Authorization ""; proxy_set_header Host $http_host; }}
    location ~ ^/v2/.+/blobs/sha256:[0-9a-f]+$ {{ proxy_pass http://127.0.0.1:{signer}; proxy_redirect off; }}
  }}
  server {{
    listen 127.0.0.1:{storage} ssl;
    location /blobs/ {{
      secure_link $arg_md5,$arg_expires;
      secure_link_md5 "$secure_link_expires$uri {secret}";
      if ($secure_link = "") {{ return 403; }}
      if ($secure_link = "0") {{ return 410; }}
      alias {blobs}/;
    }}
  }}
}}
"""


_DEMANDING = """\
daemon off;
master_process off;
pid {place}/nginx.pid;
error_log {place}/error.log warn;
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/f;
  uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
  access_log off;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_verify_client on; ssl_client_certificate {clients};
    location / {{ return 404; }}
  }}
}}
"""


@dataclass(slots=True)
class Front:
    """A running front. `lifetime` is that of the next signatures, in whole seconds; `signed` are those given so far."""

    host: str
    storage: str
    place: Path
    lifetime: int = 3600
    signed: list[str] = field(default_factory=list)

    def sign(self, digest: str) -> str:
        """Return a signed address of a blob on the storage."""
        hexadecimal = digest.partition(":")[2]
        path = f"/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"
        expires = int(time.time()) + self.lifetime
        raw = hashlib.md5(f"{expires}{path} {_SECRET}".encode()).digest()
        signature = base64.urlsafe_b64encode(raw).decode().rstrip("=")
        url = f"https://{self.storage}{path}?md5={signature}&expires={expires}"
        self.signed.append(url)
        return url

    def log(self) -> list[list[str]]:
        """Return (port, method, path, query, status, Authorization, Range, TLS) of each request so far."""
        path = self.place / "access.log"
        return [line.split("|") for line in path.read_text().splitlines()] if path.exists() else []

    def at(self, host: str) -> list[list[str]]:
        """Return the requests that came to the front or the storage."""
        return [line for line in self.log() if line[0] == host.rpartition(":")[2]]


@contextlib.contextmanager
def front(place: Path, registry: real.DockerRegistry, pair: Pair, users: dict[str, str]) -> Iterator[Front]:
    """Run nginx and the signer before a docker-registry. `pair` is for 127.0.0.1 and localhost."""
    place.mkdir()
    stored = registry.log.parent / "blobs/docker/registry/v2/blobs"
    ports = [real.free_port(), real.free_port()]
    running = Front(f"127.0.0.1:{ports[0]}", f"localhost:{ports[1]}", place)
    words = [f"{user}:{real.call('openssl', 'passwd', '-apr1', password).strip()}" for user, password in users.items()]
    (place / "users").write_text("\n".join(words) + "\n")
    with _signer(running) as signer:
        config = place / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                place=place, front=ports[0], storage=ports[1], signer=signer, registry=registry.host, secret=_SECRET,
                certificate=pair.certificate, key=pair.key, blobs=stored,
            )
        )  # fmt: skip
        with _nginx(place, config, ports[1]):
            yield running


@contextlib.contextmanager
def demanding_nginx(place: Path, pair: Pair, clients: Path) -> Iterator[str]:
    """Run an nginx that wants a client certificate of the authority `clients`, and else has nothing. Yield its host."""
    place.mkdir()
    port = real.free_port()
    config = place / "nginx.conf"
    config.write_text(
        _DEMANDING.format(place=place, port=port, certificate=pair.certificate, key=pair.key, clients=clients)
    )
    with _nginx(place, config, port):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _nginx(place: Path, config: Path, port: int) -> Iterator[None]:
    command = [real.tool("nginx"), "-p", str(place), "-e", str(place / "error.log"), "-c", str(config)]
    process = subprocess.Popen([*command, "-g", "user root;"], stdin=subprocess.DEVNULL)
    try:
        _wait(process, port, place)
        yield
    finally:
        real.stop(process)


def _wait(process: subprocess.Popen[bytes], port: int, place: Path) -> None:
    deadline = time.monotonic() + real.START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise real.ToolFailed(f"nginx did not start: {(place / 'error.log').read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def _signer(running: Front) -> Iterator[int]:
    """Answer every GET of a blob with a fresh signed address; HEAD, too. Yield the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", running.sign(self.path.rpartition("/")[2]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """nginx has the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
