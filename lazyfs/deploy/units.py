"""The systemd units, with the paths of this node's programs in them."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from lazyfs.deploy.node import Node
from lazyfs.errors import UsageError

NAMES = ("lazyfsd.service", "lazyfs-snapshotter.service")  # in the order in which they start
DIRECTORY = Path("/etc/systemd/system")
_PROGRAMS = ("lazyfsd", "lazyfs-snapshotter")
_PLACEHOLDER = "/usr/local/bin/"
_PLAIN = re.compile(r"[A-Za-z0-9/._+@-]+")  # what systemd takes literally


def text(name: str, programs: Path) -> str:
    """Return a unit whose program lies in the directory `programs`. Blocking (reads a file of this package)."""
    template = resources.files("lazyfs.deploy").joinpath(name).read_text("utf-8")
    return template.replace(_PLACEHOLDER, f"{programs}/")


def check_programs(node: Node, programs: Path) -> list[str]:
    """Return what is dubious about the directory of the node's programs. Raise UsageError where it can't do."""
    if not _PLAIN.fullmatch(str(programs)):
        raise UsageError(f"a systemd unit can't start programs from {str(programs)!r}", hint="choose a plain --prefix")
    warnings = []
    for name in _PROGRAMS:
        path = programs / name
        real = node.real(path)
        if not real.is_file():
            raise UsageError(
                f"{path} does not exist on the node",
                hint="pip install 'lazyfs[all]' there, and name the environment with --prefix",
            )
        if any(above.stat().st_uid != 0 or (above.stat().st_mode & 0o022 and not above.stat().st_mode & 0o1000)
               for above in (real, *real.parents)):  # fmt: skip
            warnings.append(f"{path} can be changed by others than root, and will be executed as root")
    return warnings
