"""A quick pass over the fuzz targets: their valid documents, and some changed ones. The long runs are `tests.fuzz`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lazyfs.errors import FormatError
from tests.fuzz.engines import TARGETS, Run, by_chance
from tests.fuzz.mutate import mutate
from tests.fuzz.target import Target, run_one

FEW = {
    "footer": 50,
    "labels": 50,
    "trace": 50,
    "frames": 50,
    "tail": 50,
    "control": 80,
}  # hypothesis has these, or slow


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_valid_documents_are_taken_and_changed_ones_raise_what_is_documented(target: Target) -> None:
    seeds = list(target.seeds())
    for seed in seeds:
        assert len(seed) <= target.most
        if b'"error"' not in seed:  # which an answer may tell of
            target.parse(seed)
    source = random.Random(7)
    for _ in range(FEW.get(target.name, 200)):
        run_one(target, mutate(target, source.choice(seeds), seeds, source))


def test_a_bug_is_found_kept_once_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parse(data: bytes) -> None:
        if b"x" not in data:
            raise FormatError("has no x")
        data.index(b"b")

    target = Target("planted", parse, lambda: [b"abx"], (FormatError,))
    run = Run(target, 0, tmp_path / "findings")
    by_chance(run, 1)  # with no time the valid documents alone
    for data in (b"", b"ab", b"ax", b"xx"):
        run.attack(data)
    assert run.summary() == 1
    (kept,) = run.findings.values()
    assert kept.read_bytes() == b"ax"
    assert "planted: 5 executions" in capsys.readouterr().out
