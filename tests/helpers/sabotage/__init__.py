"""What the directory's `sitecustomize` does, from the test's side.

node = Node(scratch, prefix=sabotage.prefix(scratch / "sabotage", store))
with sabotage.on(scratch / "sabotage", "read-fails", "EIO"): …
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.snapshotter import ROOT


def prefix(place: Path, store: Path) -> tuple[str, ...]:
    """Return the words before a command that put it, and the daemon that it starts, into our hands."""
    place.mkdir()
    (place / "store").symlink_to(store)
    python_path = f"{Path(__file__).parent}:{ROOT}"
    return ("env", f"PYTHONPATH={python_path}", f"LAZYFS_TEST_SABOTAGE={place}")


@contextlib.contextmanager
def on(place: Path, fault: str, says: str = "") -> Iterator[None]:
    """Have a fault while the `with` lasts."""
    new = place / f"{fault}.coming"
    new.write_text(says)
    new.rename(place / fault)
    try:
        yield
    finally:
        (place / fault).unlink()
