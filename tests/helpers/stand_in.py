"""lazyfs with a stand-in for the daemon: images are plain directories. For tests of what happens on the client's side.

    python -m tests.helpers.stand_in run [options] IMAGE …

IMAGE is the path of a root file system; $STAND_IN_CONFIG is the "config" part of its image config, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs.config import Settings
from lazyfs.errors import DaemonUnreachable, ManifestMissing


class StandIn:
    """Answers the calls that `run`, `mount` and `umount` make, and writes them down in $STAND_IN_LOG."""

    def call(self, name: str, *, on_event: Any = None, **args: Any) -> dict[str, Any]:
        log = os.environ.get("STAND_IN_LOG")
        if log:
            with open(log, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"call": name, **args}) + "\n")
        if name == os.environ.get("STAND_IN_FAILS"):
            raise ManifestMissing("stand-in", f"the stand-in refuses {name}")
        if name != "mount_image":
            return {}
        if not os.path.isdir(args["image"]):
            raise ManifestMissing("stand-in", f"{args['image']} is not in the registry")
        on_event("resolving")
        return {
            "mount": "7",
            "path": args["image"],
            "manifest_digest": "sha256:" + "0" * 64,
            "config": {"config": json.loads(os.environ.get("STAND_IN_CONFIG", "{}"))},
            "driver": "fuse",
            "reason": "stand-in",
            "layers": [{"digest": "sha256:" + "1" * 64, "size": 10, "lazy": True, "reason": ""}],
            "notes": ["layer sha256:1 can't be lazy (stand-in): fetched in full"],
            "size": 10,
            "requests": 0,
        }


@contextlib.contextmanager
def open_daemon(settings: Settings, solo: Path | None = None, *, start: bool = True) -> Iterator[StandIn]:
    """Yield a stand-in, or with $STAND_IN_DEAD say that there is no daemon."""
    if "STAND_IN_DEAD" in os.environ:
        raise DaemonUnreachable("the stand-in is dead")
    yield StandIn()


def main() -> int:
    module = types.ModuleType("lazyfs.control_client")
    module.open_daemon = open_daemon  # type: ignore[attr-defined]
    sys.modules["lazyfs.control_client"] = module
    import lazyfs
    from lazyfs.cli import main as command_line

    lazyfs.control_client = module  # type: ignore[attr-defined]
    command_line.entry()
    return 0


if __name__ == "__main__":
    sys.exit(main())
