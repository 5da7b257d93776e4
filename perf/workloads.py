"""What perf.startup starts: Debian packages, files beside them, a command, and what tells that it is ready.

{port} in a command is a free port of loopback, another one for each start: the containers have the host's network.
"""

from __future__ import annotations

from dataclasses import dataclass

SUITE = "bookworm"


@dataclass(frozen=True, slots=True)
class Line:
    """Ready when a line of the container's output is this one."""

    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Ready when a server on the port answers `question` with bytes that begin with `expected`."""

    question: bytes
    expected: bytes


@dataclass(frozen=True, slots=True)
class Exit:
    """Ready when the command has ended with status 0."""


HTTP = Answer(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", b"HTTP/1.")


@dataclass(frozen=True, slots=True)
class Workload:
    """One image and its start. `service` is an image whose server is waited for; `files` are paths and contents."""

    name: str
    packages: str  # of Debian, with commas; "" is a minimal system
    command: tuple[str, ...]
    ready: Line | Answer | Exit
    files: tuple[tuple[str, str], ...] = ()
    service: bool = False
    java: str = ""  # the source of the class Main in /srv/app.jar
    data: int = 0  # bytes of the file /srv/data
    whole: str = ""  # the path in the image below which it reads each byte

    @property
    def image(self) -> str:
        """Workloads of the same content have the same image."""
        return {"everything": "python", "hello": "jar"}.get(self.name, self.name)


_FLASK = """\
from flask import Flask
app = Flask(__name__)
@app.route("/")
def index():
    return "served"
if __name__ == "__main__":
    import sys
    app.run(host="127.0.0.1", port=int(sys.argv[1]))
"""
_NGINX = (
    "error_log stderr; pid /run/nginx.pid; daemon off; worker_processes 1; events {} http { access_log off;"
    ' server { listen 127.0.0.1:{port}; location / { return 200 "served"; } } }'
)
_POSTGRES = """\
set -e
bin=/usr/lib/postgresql/15/bin
as="setpriv --reuid=postgres --regid=postgres --clear-groups"
mkdir -p /run/pg /srv/pg && chown postgres /run/pg /srv/pg && cd /
$as $bin/initdb -D /srv/pg -A trust --locale=C --encoding=UTF8 --no-sync >/dev/null
$as $bin/pg_ctl -D /srv/pg -s -w -o "-k /run/pg -c listen_addresses= -c fsync=off" -l /run/pg/log start
$as $bin/psql -h /run/pg -At -d postgres -c "select 6*7"
exec sleep 1000000
"""
_JAVA = """\
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
public class Main {
    public static void main(String[] words) throws Exception {
        if (words.length == 0) {
            System.out.println("hello");
            return;
        }
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(words[0])), 0);
        server.createContext("/", exchange -> {
            byte[] text = "served".getBytes();
            exchange.sendResponseHeaders(200, text.length);
            exchange.getResponseBody().write(text);
            exchange.close();
        });
        server.start();
    }
}
"""
_C = """\
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(void) { char text[32]; snprintf(text, sizeof text, "%.0f", sqrt(1764.0)); return puts(text) < 0; }
"""
_NODE = """\
const http = require("http");
http.createServer((asked, answer) => answer.end("served")).listen(Number(process.argv[2]), "127.0.0.1");
"""

ALL = (
    Workload(
        "python",
        "python3",
        ("python3", "-c", "import json; print(json.dumps({'answer': 42}), flush=True)"),
        Line('{"answer": 42}'),
    ),
    Workload(
        "flask",
        "python3,python3-flask",
        ("python3", "/srv/app.py", "{port}"),
        HTTP,
        files=(("srv/app.py", _FLASK),),
        service=True,
    ),
    Workload(
        "nginx",
        "nginx",
        ("/bin/sh", "-c", f"printf '%s' '{_NGINX}' >/run/nginx.conf && exec nginx -c /run/nginx.conf"),
        HTTP,
        service=True,
    ),
    Workload(
        "redis",
        "redis-server",
        ("redis-server", "--port", "{port}", "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp"),
        Answer(b"PING\r\n", b"+PONG"),
        service=True,
    ),
    Workload("postgres", "postgresql-15", ("/bin/sh", "-c", _POSTGRES), Line("42"), service=True),
    Workload("hello", "openjdk-17-jre-headless", ("java", "-jar", "/srv/app.jar"), Line("hello"), java=_JAVA),
    Workload(
        "jar", "openjdk-17-jre-headless", ("java", "-jar", "/srv/app.jar", "{port}"), HTTP, service=True, java=_JAVA
    ),
    Workload(
        "gcc",
        "gcc,libc6-dev",
        ("/bin/sh", "-c", "gcc -O2 -o /tmp/a /srv/a.c -lm && exec /tmp/a"),
        Line("42"),
        files=(("srv/a.c", _C),),
    ),
    Workload("node", "nodejs", ("node", "/srv/app.js", "{port}"), HTTP, files=(("srv/app.js", _NODE),), service=True),
    # GNU tar reads nothing when it writes to /dev/null itself.
    Workload(
        "everything", "python3", ("/bin/sh", "-c", "tar --one-file-system -cf - / | cat >/dev/null"), Exit(), whole="."
    ),
    Workload(
        "file", "", ("/bin/sh", "-c", "exec cat /srv/data >/dev/null"), Exit(), data=2_000_000_000, whole="srv/data"
    ),
)
BY_NAME = {one.name: one for one in ALL}
