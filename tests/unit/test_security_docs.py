"""docs/security.md names code and tests that are there, and the units are exposed no more than it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lazyfs.deploy import units
from tests.helpers import real

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()


def test_every_module_that_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:lazyfs|snapshotter)/[\w/{},.-]+\.py)`", TEXT))
    assert len(named) > 30
    for name in named:
        found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        alternatives = [f"{found[1]}{word}{found[3]}" for word in found[2].split(",")] if found else [name]
        assert all((ROOT / path).is_file() for path in alternatives), name


def test_every_test_that_it_names_is_there() -> None:
    path, count = "", 0
    for file, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", TEXT):
        path = file or path
        if not file and not test:
            continue
        source = (ROOT / path).read_text()
        assert not test or re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{path}::{test}"
        count += 1
    assert count > 40


@pytest.mark.parametrize("name", units.NAMES)
def test_units_are_exposed_no_more_than_it_says(name: str, tmp_path: Path) -> None:
    stated = re.search(rf"^\| `{re.escape(name)}` \| (\d+)\.(\d) \|", TEXT, re.MULTILINE)
    assert stated is not None
    unit = tmp_path / name
    unit.write_text(units.text(name, tmp_path))
    words = [real.tool("systemd-analyze"), "security", "--offline=true", "--no-pager"]
    words += [f"--threshold={stated[1]}{stated[2]}", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()[-3:]
