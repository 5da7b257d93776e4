"""The fault matrix as a document: `python -m tests.faults.matrix` writes docs/reliability.md from the tests.

Without options it writes the file; `tests/faults/test_matrix.py` compares it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tests.faults.cases import Area, Shown, shown

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
_MARK = "from tests.faults.cases import"

_HEAD = """\
# What goes wrong, and what is seen of it

Made by `python -m tests.faults.matrix` from the tests that show it: change those, not this. Each row is a test that
breaks a real daemon, its network, its disk or its input on purpose. What holds in every row, and is not said again:

- No reader gets a wrong byte. Nobody hangs: a read ends within `read_timeout` (300 s by default, 2 s in most of these
  tests), and whoever is killed in the middle of a read is gone soon.
- Nothing is left behind: no mount, process, socket or temporary file.
- Other images on the same daemon go on: in the tests of `test_*_matrix.py` that share a daemon somebody reads one all
  the while, right bytes to the end.

*Reader* is who reads a file of the image. *User* is what commands (`lazyfs …`) and the daemon's log say. *Metrics* are
those of [metrics.md](metrics.md), without `lazyfsd_`. Error classes and exit codes are those of
[exit-codes.md](exit-codes.md).
"""


def modules() -> list[str]:
    """Return the names of the test modules that have rows, in the order of the table."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _MARK in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def collect() -> list[Shown]:
    """Return the rows of all tests. Imports their modules."""
    for module in modules():
        importlib.import_module(module)
    return shown()


def params(row: Shown) -> set[str]:
    """Return the words of all parameters that a row's test has."""
    test: Any = getattr(sys.modules[row.module], row.test)
    found: set[str] = set()
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            for value, name in zip(mark.args[1], mark.kwargs.get("ids") or mark.args[1], strict=True):
                found.add(str(name if isinstance(name, str) else value))
    return found


def render(rows: list[Shown]) -> str:
    """Return the document."""
    areas = [area for area in Area if any(row.case.area is area for row in rows)]
    counts = ", ".join(f"{area.value.lower()} {sum(row.case.area is area for row in rows)}" for area in areas)
    parts = [_HEAD, f"{len(rows)} cases: {counts}.\n"]
    for area in areas:
        parts.append(f"## {area.value}\n")
        parts.append("| what goes wrong | reader | user | metrics | test |\n|---|---|---|---|---|")
        parts += [_line(row) for row in rows if row.case.area is area]
        parts.append("")
    return "\n".join(parts)


def _line(row: Shown) -> str:
    path = row.module.removeprefix("tests.").replace(".", "/")
    case = row.case
    param = f"[{case.param}]" if case.param else ""
    cells = (case.fault, case.reader, case.user, case.metrics, f"`{path}.py` {row.test}{param}")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    DOCUMENT.write_text(render(collect()))
