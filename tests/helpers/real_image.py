"""A small real image made of this machine's own files: a few thousand of them, no network, the same bytes each time.

Layer one is a system that runs: a shell, the usual tools and Python with the libraries that they need, configuration
and documentation. Layer two changes it in the ways that layers do: a whiteout, an opaque directory, a replaced file, a
new one, a hard link, special files, extended attributes.
"""

from __future__ import annotations

import io
import os
import re
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.helpers.real import ToolFailed, tool

PROGRAMS = (
    "sh", "dash", "bash", "ls", "cat", "id", "env", "sleep", "true", "false", "mkdir", "rm", "cp", "mv", "ln", "stat",
    "find", "grep", "sha256sum", "head", "wc", "touch", "chmod", "chown", "test", "echo", "pwd", "readlink", "sort",
    "tty", "stty", "uname",
)  # fmt: skip
MTIME = 946684800  # 2000-01-01, for the names that we make up
MAX_FILES = 6000
MAX_BYTES = 90_000_000
_SECRET = re.compile(
    r"/etc/(shadow|gshadow|sudoers|ssh|ssl/private|security|mtab|resolv|hostname|hosts|machine-id|ld\.so\.cache)"
)


def python_name() -> str:
    """Return the name of the system's Python in the image, "python3.11" say."""
    return os.path.basename(os.path.realpath("/usr/bin/python3"))


def write_base(path: Path) -> None:
    """Write the first layer's tar. Blocking; about 60 MB."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in (
            "dev",
            "proc",
            "sys",
            "run",
            "tmp",
            "root",
            "usr",
            "usr/bin",
            "usr/sbin",
            "usr/lib",
            "usr/lib64",
            "var",
        ):
            archive.addfile(_made(name, tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755))
        for name in ("bin", "sbin", "lib", "lib64"):
            archive.addfile(_made(name, tarfile.SYMTYPE, link=f"usr/{name}"))
        made = {"usr/bin/python3": python_name()}
        for name, link in made.items():
            archive.addfile(_made(name, tarfile.SYMTYPE, link=link))
        files = bound = 0
        for source in _sources():
            name = _merged(source)
            if name in made:
                continue
            details = source.lstat()
            if files >= MAX_FILES or bound + details.st_size > MAX_BYTES:
                continue
            member = archive.gettarinfo(str(source), arcname=name)
            if member is None or (member.islnk() and member.linkname == name):
                continue
            files += 1
            bound += details.st_size
            if member.isreg():
                with source.open("rb") as content:
                    archive.addfile(member, content)
            else:
                archive.addfile(member)


def write_top(path: Path) -> None:
    """Write the second layer's tar, that changes the first."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(
            name: str,
            content: bytes,
            *,
            mode: int = 0o644,
            owner: tuple[int, int] = (0, 0),
            pax: dict[str, str] | None = None,
        ) -> None:
            member = _made(name, tarfile.REGTYPE, mode=mode, size=len(content), owner=owner, pax=pax)
            archive.addfile(member, io.BytesIO(content))

        archive.addfile(_made("etc", tarfile.DIRTYPE))
        add("etc/hostname", b"lazy\n")
        add("etc/.wh.debian_version", b"")
        archive.addfile(_made("usr", tarfile.DIRTYPE))
        archive.addfile(_made("usr/share", tarfile.DIRTYPE))
        archive.addfile(_made("usr/share/doc", tarfile.DIRTYPE))
        add("usr/share/doc/.wh..wh..opq", b"")
        add("usr/share/doc/only", b"the rest is hidden by the opaque directory\n")
        archive.addfile(_made("odd", tarfile.DIRTYPE, mode=0o2775, owner=(1000, 1000)))
        add("odd/plain", b"x" * 5000, owner=(1000, 1001))
        archive.addfile(_made("odd/linked", tarfile.LNKTYPE, link="odd/plain"))
        archive.addfile(_made("odd/dangling", tarfile.SYMTYPE, link="../nowhere/at all"))
        archive.addfile(_made("odd/fifo", tarfile.FIFOTYPE, mode=0o600))
        device = _made("odd/null", tarfile.CHRTYPE, mode=0o666)
        device.devmajor, device.devminor = 1, 3
        archive.addfile(device)
        add("odd/setuid", b"#!/bin/sh\nid -u\n", mode=0o4755)
        add(
            "odd/tagged",
            b"with attributes\n",
            pax={"SCHILY.xattr.user.colour": "green", "mtime": "1234567890.123456789"},
        )
        add("odd/" + "long" * 60, b"a name of 240 bytes\n")
        add("odd/ünï \N{SNOWMAN}", b"a name beyond ASCII\n")
        add("odd/empty", b"")
        add("odd/big", bytes(range(256)) * 12_500)  # 3.2 MB: more than one chunk


def _made(
    name: str,
    kind: bytes,
    *,
    mode: int = 0o755,
    size: int = 0,
    link: str = "",
    owner: tuple[int, int] = (0, 0),
    pax: dict[str, str] | None = None,
) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname, member.mtime = kind, mode, size, link, MTIME
    member.uid, member.gid = owner
    member.pax_headers = dict(pax or {})
    return member


def _merged(path: Path) -> str:
    """Return the name in the image: below usr/, as on a system whose /bin and /lib are links."""
    name = str(path).lstrip("/")
    return f"usr/{name}" if name.split("/")[0] in ("bin", "sbin", "lib", "lib64") else name


def _sources() -> Iterator[Path]:
    """Yield each file once, parents before children, what the image needs to run first."""
    seen: set[str] = set()

    def once(paths: Iterable[Path]) -> Iterator[Path]:
        for path in paths:
            if _merged(path) not in seen:
                seen.add(_merged(path))
                yield path

    programs = [Path(found) for found in map(_program, (*PROGRAMS, python_name())) if found]
    yield from once(programs)
    yield from once(_libraries(programs))
    yield from once(_walk(Path("/usr/lib") / python_name()))
    yield from once(_walk(Path("/etc")))
    yield from once(_walk(Path("/usr/share/doc")))


def _program(name: str) -> str | None:
    for directory in ("/usr/bin", "/usr/sbin", "/bin"):
        if os.path.exists(f"{directory}/{name}"):
            return f"{directory}/{name}"
    return None


def _libraries(programs: list[Path]) -> list[Path]:
    """Return the shared libraries of the programs and of Python's extension modules, links and their targets both."""
    extensions = sorted((Path("/usr/lib") / python_name() / "lib-dynload").glob("*.so"))
    found: set[Path] = set()
    for program in (*programs, *extensions):
        listing = subprocess.run([tool("ldd"), str(program)], check=False, capture_output=True, text=True, timeout=60)
        for match in re.finditer(r"(/\S+)(?= \(0x)", listing.stdout):
            found.add(Path(match[1]))
    out = []
    for path in sorted(found):
        if path.is_symlink():
            out.append(path.parent / os.readlink(path))
        out.append(path)
    return out


def _walk(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        raise ToolFailed(f"{top} is not a directory: this machine has no such files to make an image of")
    yield top
    for directory, names, files in os.walk(top):
        names[:] = sorted(name for name in names if name != "__pycache__")
        for name in sorted((*names, *files)):
            path = Path(directory, name)
            if _SECRET.match(str(path)) or stat.S_ISSOCK(path.lstat().st_mode):
                continue
            yield path
