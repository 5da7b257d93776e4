"""docs/reliability.md is what the tests say, and says enough."""

from __future__ import annotations

import re

import pytest

from tests.faults.cases import Area
from tests.faults.matrix import DOCUMENT, collect, params, render

LEAST = 60  # rows
# What must be among the rows' ids, by area: the ways in which production breaks.
PROMISED = {
    Area.NETWORK: "refused lost-syn black-hole drip reset truncated wrong-bytes wrong-range redirect-loop expired-url "
    "401 403 404 416 429 500 tls-expired tls-silent no-dns tenth",
    Area.DISK: "full read-only eio-read eio-write truncated table-cut flipped holes slow lost-writes",
    Area.PROCESSES: "daemon-killed mount-killed-manifest mount-killed-config mount-killed-toc builder-killed "
    "unpacker-killed snapshotter-killed containerd-killed held-daemon-killed holder-killed stopped unpacker-stopped "
    "memory-limit open-files two-daemons",
    Area.INPUT: "toc-bomb frame-bomb plain-bomb overlaps cycles million-names odd-names",
    Area.USERS: "busy store-removed clock kill-reader",
}


def test_the_document_is_what_the_tests_say() -> None:
    assert DOCUMENT.read_text() == render(collect()), "run: python -m tests.faults.matrix"


def test_every_row_is_shown_by_a_parameter_that_its_test_has() -> None:
    rows = collect()
    assert len(rows) >= LEAST
    for row in rows:
        case = row.case
        assert re.fullmatch(rf"{case.area.value.lower()}-[a-z0-9-]+", case.id), case.id
        assert case.fault and case.reader and case.user and case.metrics, case.id
        assert not case.param or case.param in params(row), f"{row.module} {row.test} has no {case.param}"


@pytest.mark.parametrize("area", Area, ids=[area.value for area in Area])
def test_nothing_that_production_does_is_left_out(area: Area) -> None:
    ids = {row.case.id for row in collect()}
    assert {f"{area.value.lower()}-{name}" for name in PROMISED[area].split()} - ids == set()
