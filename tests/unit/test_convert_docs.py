"""docs/ci.md and docs/convert-report.md say what the converter does."""

from __future__ import annotations

import gzip
import re
import shlex
from pathlib import Path

import pytest

from indexer.options import ConvertOptions
from indexer.report import KeptReport, ReferrerReport
from lazyfs.cli.main import build_parser
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.tars import file, tar_of
from tests.unit.test_indexer_index import convert

DOCS = Path(__file__).parents[2] / "docs"


def commands() -> list[str]:
    """Every `lazyfs convert` of the pipelines, folded lines joined."""
    found = []
    for block in re.findall(r"```yaml\n(.*?)```", (DOCS / "ci.md").read_text("utf-8"), re.S):
        for start in re.finditer(r"^( *)lazyfs convert\b", block, re.M):
            lines = []
            for line in block[start.start() :].splitlines():
                if not line.startswith(start[1]) or line.lstrip().startswith("- "):
                    break
                lines.append(line.strip())
            found.append(" ".join(lines))
    return found


def test_there_are_two_pipelines() -> None:
    assert len(commands()) == 2


@pytest.mark.parametrize("command", commands())
def test_their_commands_parse(command: str) -> None:
    words = shlex.split(re.sub(r"\$\{\{.*?\}\}|\$\w+", "x", command))
    args, unknown = build_parser("convert").parse_known_args(words[1:])
    assert not unknown and args.report == "report.json" and args.cache_repo


def fields_of(heading: str) -> set[str]:
    """The names in the first column of the table that follows `heading`."""
    text = (DOCS / "convert-report.md").read_text("utf-8").partition(heading)[2]
    table = re.search(r"\| field \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    assert table is not None
    return {name for row in table[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_field_of_the_report_is_documented_and_nothing_else() -> None:
    with FakeRegistry(referrers=True) as registry:
        image = registry.add_image("app", "1", [gzip.compress(tar_of(file("a", b"b")), mtime=0)])
        report = convert(image.reference, f"{registry.host}/lazy:1", ConvertOptions()).to_json()
    assert fields_of("# The report of a conversion") == set(report) | {"started", "error"}
    assert fields_of("A layer:") == set(report["layers"][0])
    assert fields_of("A referrer:") == set(ReferrerReport("", "", "", 0, "", "").to_json())
    text = (DOCS / "convert-report.md").read_text("utf-8")
    for part in (*report["images"][0], *KeptReport("", "").to_json()):
        assert f"`{part}`" in text
