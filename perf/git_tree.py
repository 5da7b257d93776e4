"""A large source tree under git, as the layer of an image: many files, all committed, with an index that fits them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PLACE = "srv/project"
_DIRECTORY = 50  # files
_COMMITTER = b"committer perf <perf@localhost> 1577836800 +0000\n"
_GIT = ("git", "-c", "core.checkStat=minimal", "-c", "safe.directory=*")
STATUS_WORDS = [*_GIT, "--no-optional-locks", "-C"]  # the directory and `status` follow; nothing is written
_ENV = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def make(tar: Path, scratch: Path, count: int) -> None:
    """Write the tar of a repository with `count` files of 1 to 4 kB. `scratch` is a new directory; it can go then."""
    project = scratch / PLACE
    project.mkdir(parents=True)
    _git(project, "init", "--quiet")
    _git(project, "fast-import", "--quiet", given=_stream(count))
    _git(project, "reset", "--hard", "--quiet", "main")
    # A tar has whole seconds, and of a file as young as the index git would read the content.
    dated = "find . -path ./.git -prune -o -print0 | xargs -0 touch --no-dereference --date=@1577836800"
    subprocess.run(["/bin/sh", "-c", dated], cwd=project, check=True)
    _git(project, "update-index", "--refresh")
    subprocess.run(["tar", "-C", scratch, "--sort=name", "-cf", tar, "srv"], check=True)


def refresh(root: Path) -> None:
    """Let the index in a tree be of that tree's stat data."""
    _git(root / PLACE, "update-index", "--refresh")


def _git(project: Path, *words: str, given: bytes | None = None) -> None:
    subprocess.run([*_GIT, *words], cwd=project, input=given, check=True, timeout=300, env=os.environ | _ENV)


def _stream(count: int) -> bytes:
    """Return what git fast-import wants to have for one commit."""
    out = [b"commit refs/heads/main\n", _COMMITTER, b"data 4\nall\n\n"]
    for number in range(count):
        name = f"part-{number // (20 * _DIRECTORY):02}/module-{number // _DIRECTORY:04}/source_file_{number:06}.py"
        content = f"value_{number} = {number}\n".encode() * (60 + number % 140)
        out.append(b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(content), content))
    return b"".join(out)
