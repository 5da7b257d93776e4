"""The fault matrix's rows: what goes wrong, and what reader, user and metrics see of it.

    @shows(Case("two-daemons", Area.PROCESSES, "a second daemon on one store", reader=RIGHT, user="exit 9, …"))
    def test_store_of_another_daemon(…): …

A row stands at the test that shows it, and `tests.faults.matrix` makes docs/reliability.md of all of them. What a test
promises of every row, if it says nothing else: nobody hangs, no byte is wrong, no mount or process is left, and other
images are read on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])

# What readers see, in the words of the table.
RIGHT = "right bytes"
ERROR = "EIO in bounded time; right bytes once it is over"
LASTING = "EIO in bounded time"
NOTHING_SHOWN = "nothing is shown"
NO_METRIC = "–"


class Area(Enum):
    """The table's parts, in their order."""

    NETWORK = "Network"
    DISK = "Disk"
    PROCESSES = "Processes"
    INPUT = "Input"
    USERS = "Users"


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `id` is stable and unique; `param`: which of its test's parameters shows it, "": all of them."""

    id: str
    area: Area
    fault: str
    reader: str
    user: str
    metrics: str = NO_METRIC
    param: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """A row and the test that shows it."""

    case: Case
    module: str
    test: str


_shown: dict[str, Shown] = {}


def shows(*cases: Case) -> Callable[[Test], Test]:
    """Mark a test as the one that shows these rows. Raise ValueError where another test has a row of that id."""

    def mark(test: Test) -> Test:
        for case in cases:
            shown = Shown(case, test.__module__, test.__name__)
            if _shown.setdefault(case.id, shown) != shown:
                raise ValueError(f"two tests show {case.id}: {_shown[case.id]} and {shown}")
        return test

    return mark


def shown() -> list[Shown]:
    """Return the rows of all tests that were imported: by area, then by module, then as they stand there."""
    areas = list(Area)
    return sorted(_shown.values(), key=lambda each: (areas.index(each.case.area), each.module))
