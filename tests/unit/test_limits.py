"""The bounds stand in one place, each is used, and docs/limits.md lists them all."""

from __future__ import annotations

import re
from pathlib import Path

from lazyfs import limits
from tests.helpers import limits_doc

ROOT = Path(__file__).parents[2]


def test_the_page_lists_every_bound_as_it_is() -> None:
    page = (ROOT / "docs/limits.md").read_text("utf-8")
    assert page == limits_doc.document(), "python -m tests.helpers.limits_doc > docs/limits.md"
    told = [name for section in limits_doc.sections() for name, _ in section.bounds]
    defined = [name for name in vars(limits) if name.isupper()]
    assert told == defined and len(set(told)) == len(told)


def test_each_bound_is_used() -> None:
    used = set()
    for top in ("lazyfs", "indexer", "snapshotter"):
        for path in (ROOT / top).rglob("*.py"):
            for names in re.findall(
                r"^ *from lazyfs\.limits import (\([^)]*\)|.*)$", path.read_text("utf-8"), re.MULTILINE
            ):
                used |= set(re.findall(r"\w+", names))
    assert used == {name for name in vars(limits) if name.isupper()}
