"""Real images for the demo and the measurements, made once and kept in .demo (nothing in it is needed by lazyfs)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.helpers import real

KEPT = Path(__file__).parents[1] / ".demo"
SUITE = "bookworm"
PACKAGES = "python3-minimal"


def rootfs_tar() -> Path:
    """Return the tar of a Debian system with Python, made by mmdebstrap the first time (half a minute, network)."""
    return system_tar(f"{SUITE}-{PACKAGES}", PACKAGES)


def system_tar(name: str, packages: str) -> Path:
    """Return the tar of a minimal Debian system with `packages`, kept as `name`. Blocks, the first time on network."""
    path = KEPT / f"{name}.tar"
    if not path.exists():
        KEPT.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tar")
        wish = [f"--include={packages}"] if packages else []
        try:
            real.call("mmdebstrap", "--variant=minbase", *wish, "--format=tar", SUITE, partial, timeout=1800)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def layout() -> str:
    """Return the reference oci:DIR:debian of that system as an ordinary image of one gzip layer."""
    directory = KEPT / f"{SUITE}-{PACKAGES}"
    if not directory.exists():
        partial = directory.with_name(f"{directory.name}.{os.getpid()}")
        try:
            real.build_layout(partial, "debian", [rootfs_tar()], command=("python3",))
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return f"oci:{directory}:debian"
