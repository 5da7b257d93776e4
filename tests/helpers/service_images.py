"""Debian images of services: python3, nginx and PostgreSQL, of the packages that this machine has installed.

Each image is a base layer (Debian's essential packages and what they need) and a layer of the service's packages, as
dpkg knows them: real files, no network, the same bytes for the same packages. They are written as uncompressed layers;
`lazyfs convert` makes of them what is tested. Once for a session, about 25 s of processor time.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import real
from tests.helpers.fake_registry import FakeRegistry

# Images of the same layers: each alone, and two services one over the other.
OTHERS = {
    "minbase": ("base",),
    "python-alone": ("python",),
    "nginx-alone": ("nginx",),
    "together": ("base", "python", "nginx"),
}
PACKAGES = {"python": ("python3",), "nginx": ("nginx",), "postgres": ("postgresql-15",)}
PROGRAMS = "/usr/lib/postgresql/15/bin"
POSTGRES = (100, 101)  # user and group of PostgreSQL in the image
_MTIME = 946684800  # 2000-01-01, for names that we make up
_OURS = re.compile(r"/etc/(shadow|gshadow|sudoers|ssh|ssl/private|resolv|hostname|hosts|machine-id)|/usr/share/man/")
_KIND = "application/vnd.oci.image"

PYTHON_PROGRAM = "import json, sys; print(json.dumps({'answer': 42}), flush=True)"


def nginx_command(port: int) -> list[str]:
    """Return the command of an nginx that answers "served" on a loopback port."""
    text = (
        f"error_log stderr; pid /run/nginx-{port}.pid; daemon off; worker_processes 1; events {{}} http {{"
        f' access_log off; server {{ listen 127.0.0.1:{port}; location / {{ return 200 "served\\n"; }} }} }}'
    )
    return ["/bin/sh", "-c", f"printf '%s' '{text}' > /run/nginx.conf && exec nginx -c /run/nginx.conf"]


def postgres_command() -> list[str]:
    """Return the command of a PostgreSQL that makes its database and listens on a socket in /run/pg."""
    data = "/var/lib/postgresql/data"
    user = f"setpriv --reuid={POSTGRES[0]} --regid={POSTGRES[1]} --clear-groups"
    return [
        "/bin/sh",
        "-c",
        f"mkdir -p /run/pg && chown {POSTGRES[0]}:{POSTGRES[1]} /run/pg && cd / && "
        f"{user} {PROGRAMS}/initdb -D {data} -A trust --locale=C --encoding=UTF8 --no-sync >/dev/null && "
        f"exec {user} {PROGRAMS}/postgres -D {data} -k /run/pg -c listen_addresses= -c fsync=off",
    ]


def query(text: str) -> list[str]:
    """Return the command that asks that PostgreSQL."""
    return [f"{PROGRAMS}/psql", "-h", "/run/pg", "-U", "postgres", "-At", "-c", text]


# -- packages as layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Package:
    essential: bool
    needs: str
    provides: str


def _installed() -> dict[str, _Package]:
    form = "${Package}\\t${Essential}\\t${Depends}, ${Pre-Depends}\\t${Provides}\\n"
    found = {}
    for line in real.call("dpkg-query", "-W", "-f", form).splitlines():
        name, essential, needs, provides = line.split("\t")
        found[name] = _Package(essential == "yes", needs, provides)
    return found


def _with_needs(names: Iterable[str], known: dict[str, _Package]) -> list[str]:
    """Return the packages and all that they depend on, sorted."""
    providers = {
        re.sub(r"[ (:].*", "", given.strip()): name
        for name, package in sorted(known.items(), reverse=True)
        for given in package.provides.split(",")
    }
    todo, found = list(names), set[str]()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        if name not in known:
            raise real.ToolFailed(f"the package {name} is not installed: run `make debs`")
        found.add(name)
        for need in known[name].needs.split(","):
            choices = [re.sub(r"[ (:].*", "", choice.strip()) for choice in need.split("|")]
            choices = [choice if choice in known else providers.get(choice, "") for choice in choices]
            todo += [choice for choice in choices if choice][:1]
    return sorted(found)


def _paths(packages: Sequence[str]) -> list[Path]:
    listed = real.call("dpkg-query", "-L", *packages).splitlines()
    return [
        Path(line) for line in sorted(set(listed)) if line.startswith("/") and line != "/." and not _OURS.match(line)
    ]


def _merged(path: Path) -> str:
    name = str(path).lstrip("/")
    return f"usr/{name}" if name.split("/")[0] in ("bin", "sbin", "lib", "lib32", "lib64", "libx32") else name


def _write_packages(archive: tarfile.TarFile, packages: Sequence[str], done: set[str]) -> None:
    for path in _paths(packages):
        name = _merged(path)
        if name in done or not os.path.lexists(path) or (name == "usr" and path.name != "usr"):
            continue
        done.add(name)
        if str(path) in ("/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32"):
            continue
        member = archive.gettarinfo(str(path), arcname=name)
        if member is None:
            continue
        if member.islnk():  # to a name that may be in another layer: a file of its own
            member.type, member.linkname, member.size = tarfile.REGTYPE, "", path.lstat().st_size
        if member.isreg():
            with path.open("rb") as content:
                archive.addfile(member, content)
        elif not stat.S_ISSOCK(path.lstat().st_mode):
            archive.addfile(member)


def _made(name: str, *, mode: int = 0o755, link: str = "", owner: tuple[int, int] = (0, 0)) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE if link else tarfile.DIRTYPE
    member.mode, member.linkname, member.mtime = 0o777 if link else mode, link, _MTIME
    member.uid, member.gid = owner
    return member


def _write_base(path: Path, packages: Sequence[str]) -> set[str]:
    done: set[str] = set()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("dev", "proc", "sys", "run", "root", "usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
            archive.addfile(_made(name))
            done.add(name)
        archive.addfile(_made("tmp", mode=0o1777))
        done.add("tmp")
        for name in ("bin", "sbin", "lib", "lib64"):
            archive.addfile(_made(name, link=f"usr/{name}"))
            done.add(name)
        _write_packages(archive, packages, done)
        for name, text in {
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\n"
            f"postgres:x:{POSTGRES[0]}:{POSTGRES[1]}::/var/lib/postgresql:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
            "etc/group": f"root:x:0:\nwww-data:x:33:\npostgres:x:{POSTGRES[1]}:\nnogroup:x:65534:\n",
        }.items():
            member = _made(name, mode=0o644)
            member.type, member.size = tarfile.REGTYPE, len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
            done.add(name)
    return done


def _write_service(path: Path, packages: Sequence[str], base: set[str], name: str) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        _write_packages(archive, packages, set(base))
        if name == "postgres":
            archive.addfile(_made("var/lib/postgresql", owner=POSTGRES))


def _write_layout(layout: Path, images: dict[str, list[bytes | Path]], command: dict[str, list[str]]) -> None:
    """Write an OCI layout of images, a tag each. Layers are tars (files, which are moved in) or gzip blobs."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    known: dict[Path, tuple[dict[str, Any], str]] = {}

    def store(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def layer(source: bytes | Path) -> tuple[dict[str, Any], str]:
        if isinstance(source, bytes):
            inner = hashlib.sha256(gzip.decompress(source)).hexdigest()
            return store(source, f"{_KIND}.layer.v1.tar+gzip"), f"sha256:{inner}"
        if source not in known:
            size = source.stat().st_size
            with source.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            source.rename(blobs / digest)
            known[source] = (
                {"mediaType": f"{_KIND}.layer.v1.tar", "digest": f"sha256:{digest}", "size": size},
                f"sha256:{digest}",
            )
        return known[source]

    manifests = []
    for tag, sources in images.items():
        layers = [layer(source) for source in sources]
        config = {
            "os": "linux",
            "architecture": "amd64",
            "config": {"Cmd": command[tag], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_KIND}.manifest.v1+json",
            "config": store(json.dumps(config).encode(), f"{_KIND}.config.v1+json"),
            "layers": [descriptor for descriptor, _ in layers],
        }
        entry = store(json.dumps(manifest).encode(), f"{_KIND}.manifest.v1+json")
        manifests.append({**entry, "annotations": {"org.opencontainers.image.ref.name": tag}})
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))


# -- the program of pods' sandboxes ------------------------------------------------------------------------------------

_PAUSE = "#include <signal.h>\n#include <unistd.h>\nstatic void end(int n) { _exit(0); }\n" \
    "int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }\n"  # fmt: skip


def pause_layer(place: Path) -> bytes:
    """Return the gzip layer of an image with one static program, which waits for a signal."""
    source, program = place / "pause.c", place / "pause"
    source.write_text(_PAUSE)
    real.call("gcc", "-Os", "-static", "-s", "-o", program, source)
    content = program.read_bytes()
    member = tarfile.TarInfo("pause")
    member.size, member.mode, member.mtime = len(content), 0o755, _MTIME
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(member, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0)


# -- all of them in a registry -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServiceImages:
    """The images in a registry of this process: `host`/NAME:lazy for NAME in PACKAGES, and `host`/pause:1."""

    registry: real.DockerRegistry
    sizes: dict[str, int]  # bytes of all layer blobs, by name
    layout: Path  # an OCI layout of what they were converted from: a tag for each name, and for OTHERS

    def reference(self, name: str) -> str:
        """Return HOST/NAME:lazy, as containerd writes it."""
        return f"{self.registry.host}/{name}:lazy"

    def fill(self, other: FakeRegistry) -> None:
        """Put all images into a registry that records what it is asked for, under the same names."""
        for name, tag in (*((name, "lazy") for name in PACKAGES), ("pause", "1")):
            media_type, raw = self._get(f"{name}/manifests/{tag}")
            other.add_manifest(name, tag, media_type, raw)
            manifest = json.loads(raw)
            for descriptor in (manifest["config"], *manifest["layers"]):
                if descriptor["digest"] not in other.blobs:
                    other.add_blob(self._get(f"{name}/blobs/{descriptor['digest']}")[1])

    def fill_others(self, other: FakeRegistry) -> None:
        """Add NAME:lazy for NAME in OTHERS to a registry that was filled."""
        images = {name: json.loads(self._get(f"{name}/manifests/lazy")[1])["layers"] for name in PACKAGES}
        layers = {"base": images["python"][0], **{name: found[1] for name, found in images.items()}}
        kind = f"{_KIND}.manifest.v1+json"
        for name, parts in OTHERS.items():
            raw = real.call("skopeo", "inspect", "--config", "--raw", f"oci:{self.layout}:{name}").encode()
            about = {"mediaType": f"{_KIND}.config.v1+json", "digest": other.add_blob(raw), "size": len(raw)}
            own = [layers[part] for part in parts]
            whole = {"schemaVersion": 2, "mediaType": kind, "config": about, "layers": own}
            other.add_manifest(name, "lazy", kind, json.dumps(whole).encode())

    def _get(self, path: str) -> tuple[str, bytes]:
        asked = urllib.request.Request(
            f"http://{self.registry.host}/v2/{path}", headers={"Accept": f"{_KIND}.manifest.v1+json"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(asked, timeout=60) as answer:
            return answer.headers["Content-Type"], answer.read()

    @property
    def pause(self) -> str:
        return f"{self.registry.host}/pause:1"


def build(shared: Path) -> Path:
    """Return the directory of a registry's blobs with all images, made by the first process that asks. Blocking."""
    place = shared / "services"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "sizes.json").exists():
            _build(place)
    return place / "blobs"


def sizes(shared: Path) -> dict[str, int]:
    """Return the bytes of each built image's layers."""
    found: dict[str, int] = json.loads((shared / "services/sizes.json").read_text())
    return found


def _build(place: Path) -> None:
    known = _installed()
    base = _with_needs([name for name, package in known.items() if package.essential], known)
    tars = {name: place / f"{name}.tar" for name in ("base", *PACKAGES)}
    done = _write_base(tars["base"], base)
    for name, packages in PACKAGES.items():
        own = [package for package in _with_needs(packages, known) if package not in base]
        _write_service(tars[name], own, done, name)
    images: dict[str, list[bytes | Path]] = {name: [tars["base"], tars[name]] for name in PACKAGES}
    images["pause"] = [pause_layer(place)]
    images |= {name: [tars[part] for part in parts] for name, parts in OTHERS.items()}
    commands = {name: ["/bin/sh"] for name in (*PACKAGES, *OTHERS)} | {"pause": ["/pause"]}
    layout = place / "layout"
    _write_layout(layout, images, commands)
    found = {}
    with real.docker_registry(place / "build", place / "blobs") as registry:
        real.copy_image(f"oci:{layout}:pause", registry.image("pause", "1"))
        for name in PACKAGES:
            words = ["--json", f"oci:{layout}:{name}", registry.image(name, "lazy")]
            command = [sys.executable, "-m", "lazyfs", "convert", "--work-dir", str(place / "work"), *words]
            report = subprocess.run(command, check=True, capture_output=True, text=True, timeout=real.RUN)
            found[name] = sum(layer["result"]["size"] for layer in json.loads(report.stdout)["layers"])
    real.call("rm", "-rf", place / "work")
    (place / "sizes.new").write_text(json.dumps(found))
    (place / "sizes.new").rename(place / "sizes.json")
