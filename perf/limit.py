"""The physical limit of a cold start: no lazy snapshotter can be ready before it.

Round trips that the protocol needs one after another × the link's round trip
+ what the 4 KiB pages that the start touched take compressed ÷ bandwidth + a warm start by overlayfs.

No index of the layers is counted among the bytes, and nobody can send pages alone: the limit is a bound, not a goal.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import zstandard

from perf.resident import PAGE, regular_files, resident_pages
from perf.start import StartFailed
from perf.startup_node import Scene, fresh
from tests.helpers import real

_BDI = Path("/sys/class/bdi")
_LOOK = 1.0  # seconds between two looks at what is in memory
_LEVEL = 3  # of zstd, as converted layers have it
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_NAMED = {"loopback": (0.0, 0.0), "lan": (20.0, 1000.0), "wan": (20.0, 200.0), "far": (100.0, 50.0)}
_LINK = re.compile(r"(\d+(?:\.\d+)?)ms/(\d+(?:\.\d+)?)(M|G)bit")


@dataclass(frozen=True, slots=True)
class Link:
    """A way to the registry. `rtt` is seconds, `mbit` 10**6 bits a second; both 0: plain loopback."""

    name: str
    rtt: float
    mbit: float


def parse_link(text: str) -> Link:
    """Return the link of a name (lan, wan, far, loopback) or of "20ms/200Mbit". Raise ValueError."""
    if text in _NAMED:
        rtt, mbit = _NAMED[text]
        return Link(text, rtt / 1000, mbit)
    found = _LINK.fullmatch(text)
    if found is None or not float(found[2]):
        raise ValueError(f"{text!r} is no link: say {', '.join(_NAMED)} or something like 20ms/200Mbit")
    return Link(text, float(found[1]) / 1000, float(found[2]) * (1000 if found[3] == "G" else 1))


@dataclass(frozen=True, slots=True)
class Hops:
    """The round trips of a start that wait for each other, by what they are for.

    `tcp` and `tls` open a connection (to whatever host must be asked); `auth` is a challenge and its token; `index`
    leads to the manifest of one platform; `toc` tells where in the layers the pages are, with the image's config
    beside it; `redirect` leads from the registry to its storage; `data` is the pages themselves.
    """

    tcp: int = 1
    tls: int = 0
    auth: int = 0
    index: int = 0
    manifest: int = 1
    redirect: int = 0
    toc: int = 1
    data: int = 1

    @property
    def count(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class Touched:
    """The pages of an image that a start reads: their bytes, and what one zstd stream of them takes."""

    pages: int
    compressed: int


@dataclass(frozen=True, slots=True)
class Limit:
    """A start's limit on a link. `warm`: seconds of overlayfs' warm start (create, start, ready)."""

    link: Link
    hops: Hops
    touched: Touched
    warm: float

    @property
    def round_trips(self) -> float:
        """Seconds of the round trips."""
        return self.hops.count * self.link.rtt

    @property
    def transfer(self) -> float:
        """Seconds that the touched pages take on the link; none on loopback."""
        return self.touched.compressed * 8 / (self.link.mbit * 1e6) if self.link.mbit else 0.0

    @property
    def seconds(self) -> float:
        return self.round_trips + self.transfer + self.warm

    def facts(self) -> dict[str, Any]:
        """Return the limit and all that it is made of, for a line of results."""
        return {
            "seconds": round(self.seconds, 3),
            "round_trips": self.hops.count,
            "hops": asdict(self.hops),
            "round_trips_s": round(self.round_trips, 3),
            "pages_bytes": self.touched.pages,
            "pages_compressed": self.touched.compressed,
            "transfer_s": round(self.transfer, 3),
            "overlayfs_warm_s": round(self.warm, 3),
        }


# -- what a registry asks of its clients -------------------------------------------------------------------------------


def probe(reference: str) -> Hops:
    """Ask a registry over plain HTTP which hops a pull of HOST/NAME:TAG has. Blocking. Raise OSError, StartFailed."""
    host, _, rest = reference.partition("/")
    name, _, tag = rest.rpartition(":")
    link = http.client.HTTPConnection(host, timeout=30)
    known: dict[str, str] = {}
    tcp, auth = 1, 0
    try:
        manifest, asked = f"/v2/{name}/manifests/{tag}", {"Accept": ", ".join(_INDEXES + _MANIFESTS)}
        status, headers, body = _get(link, manifest, asked)
        if status == 401:
            auth = 2
            realm, token = _token(headers.get("www-authenticate", ""))
            if not token:
                return Hops(auth=auth)  # it wants a password, and what is behind it is not looked at
            tcp += int(realm != host)
            known = {"Authorization": f"Bearer {token}"}
            status, headers, body = _get(link, manifest, asked | known)
        if status != 200:
            raise StartFailed(f"the registry answered {status} for the manifest of {reference}")
        index = int(headers.get("content-type", "") in _INDEXES)
        if index:
            first = json.loads(body)["manifests"][0]["digest"]
            body = _get(link, f"/v2/{name}/manifests/{first}", {"Accept": ", ".join(_MANIFESTS)} | known)[2]
        layer = json.loads(body)["layers"][0]["digest"]
        status, headers, _ = _get(link, f"/v2/{name}/blobs/{layer}", {"Range": "bytes=0-0"} | known)
    finally:
        link.close()
    if status in (200, 206):
        return Hops(tcp=tcp, auth=auth, index=index)
    there = urlsplit(headers.get("location", ""))
    other = int(bool(there.netloc) and there.netloc != host)  # its connection waits for the redirect's answer
    return Hops(tcp=tcp + other, tls=int(there.scheme == "https"), auth=auth, index=index, redirect=1)


def _token(challenge: str) -> tuple[str, str]:
    """Return who gives tokens to anybody, HOST:PORT, and one of them; "" for both where nobody does. Blocking."""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = urlsplit(asked.pop("realm", ""))
    if not challenge.lower().startswith("bearer ") or not realm.hostname:
        return "", ""
    kind = http.client.HTTPSConnection if realm.scheme == "https" else http.client.HTTPConnection
    link = kind(realm.netloc, timeout=30)
    try:
        status, _, body = _get(link, f"{realm.path}?{urlencode(asked)}", {})
    finally:
        link.close()
    if status != 200:
        return "", ""
    found = json.loads(body)
    return realm.netloc, str(found.get("token") or found.get("access_token") or "")


def _get(link: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    link.request("GET", path, headers=headers)
    answer = link.getresponse()
    return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()


# -- what a start reads ------------------------------------------------------------------------------------------------


def touched(scene: Scene) -> Touched:
    """Start the workload with the kernel's read-ahead off, nothing fetched but what is read, and look at its pages.

    One that reads whole files is believed: page by page 2 GB would take minutes. Blocking. Raise StartFailed where the
    erofs driver doesn't work: its mounts alone have a read-ahead of their own.
    """
    image, whole = scene.reference(lazy=True), scene.workload.whole
    known = _devices()
    with fresh(scene, "lazyfs", BACKGROUND="0", PREFETCH="0") as node, _Watch() as watch:

        def shown() -> list[Path]:
            if not _devices() - known:
                raise StartFailed("pages are counted with the erofs driver, which does not work here: `lazyfs doctor`")
            return [Path(tree) for tree in real.mounts_below(node.run_dir / "erofs")]

        def no_read_ahead() -> None:
            trees = shown()
            for name in _devices() - known:
                (_BDI / name / "read_ahead_kb").write_text("0")
            watch.begin(trees)

        if not whole:
            node.run(image, created=no_read_ahead)
            return _measure(watch.end())
        node.show(image)
        files = [path for tree in shown() for path in regular_files(tree) if _below(path, tree / whole)]
        return _measure({path: b"\x01" * -(-path.stat().st_size // PAGE) for path in files})


def _below(path: Path, top: Path) -> bool:
    return path == top or top in path.parents


class _Watch:
    """Looks again and again at which pages are in memory: the kernel may take away what nobody read for seconds."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._seen: dict[Path, int] = {}  # a byte a page, as one number
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pages", daemon=True)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, trees: list[Path]) -> None:
        """Watch all files of these trees from now on."""
        self._files = [path for tree in trees for path in regular_files(tree)]
        self._thread.start()

    def end(self) -> dict[Path, bytes]:
        """Return the files of which pages were in memory, a byte for each page."""
        self._over.set()
        self._thread.join()
        self._look()
        return {path: found.to_bytes(-(-path.stat().st_size // PAGE), "little") for path, found in self._seen.items()}

    def _work(self) -> None:
        while not self._over.wait(_LOOK):
            self._look()

    def _look(self) -> None:
        for path in self._files:
            found = int.from_bytes(resident_pages(path), "little")
            if found:
                self._seen[path] = self._seen.get(path, 0) | found


def _measure(files: dict[Path, bytes]) -> Touched:
    stream = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    pages = compressed = 0
    for path, found in files.items():
        pages += sum(found)
        with path.open("rb", buffering=0) as content:
            for run in re.finditer(b"\x01+", found):
                for at in range(run.start(), run.end(), 256):  # 1 MiB at a time
                    size = (min(at + 256, run.end()) - at) * PAGE
                    compressed += len(stream.compress(os.pread(content.fileno(), size, at * PAGE)))
    compressed += len(stream.flush())
    return Touched(pages * PAGE, compressed)


def _devices() -> frozenset[str]:
    return frozenset(path.name for path in _BDI.glob("erofs-*"))
