"""The command line in processes of its own, with the real daemon, on a store of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lazyfs.container import mounts
from tests.helpers import small_image
from tests.helpers.daemon import until

DEADLINE = 60.0  # seconds that anything may take on a busy machine


def converted_image(place: Path, config: dict[str, Any]) -> str:
    """Make the small image, convert it into an OCI layout below `place` and return its reference there."""
    small_image.make_tree(place / "tree")
    source = small_image.make_layout(place / "tree", place / "plain", config)
    target = f"oci:{place / 'small'}:small"
    subprocess.run([sys.executable, "-m", "lazyfs", "convert", source, target], check=True, timeout=DEADLINE)
    return target


class Command:
    """lazyfs with store and sockets below `place`, which must be a short path."""

    prefix: tuple[str, ...] = ()  # words before every command
    directory: Path | None = None  # in which it runs
    stdin = subprocess.PIPE

    def __init__(self, place: Path, **environment: str) -> None:
        self.place = place
        ours = {"ROOT": f"{place}/store", "RUN": f"{place}/run", "DAEMON_LINGER": "0.3"}
        self.environment = {**os.environ, **{f"LAZYFS_{name}": value for name, value in ours.items()}, **environment}

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        argv = [*self.prefix, sys.executable, "-m", "lazyfs", *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            argv, stdin=self.stdin, stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=self.directory
        )

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        """Return (exit code, stdout, stderr)."""
        process = self.start(*words)
        out, err = process.communicate(timeout=DEADLINE)
        if err:
            print(err)  # pytest shows it with a failure
        return process.returncode, out, err

    def until_idle(self) -> None:
        """Wait until no mount of ours is left, and so no daemon: one that a command started ends by itself."""
        socket = self.place / "run/lazyfsd.sock"
        until(lambda: not mounts.below(os.fsencode(self.place)) and not socket.exists(), "nothing is mounted", DEADLINE)

    def until_nothing_is_left(self) -> None:
        """Wait for that; no container may be left then."""
        self.until_idle()
        assert [path.name for path in self.place.glob("store/containers/*")] in ([], [".lock"])
