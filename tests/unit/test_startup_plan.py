"""perf.startup's rounds, what it is asked for, and what it says at the end: no container starts in here."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from perf import plot, startup, startup_modes
from perf.limit import Hops
from perf.runs import Results
from perf.start import StartFailed
from perf.startup_modes import COLD, CONVERTED, FULL, FULL_WARM, TRACE, WARM, WARM_STORE, Found
from perf.startup_node import Scene, Start
from perf.workloads import BY_NAME
from tests.helpers import real
from tests.unit.test_startup_limit import LIMIT, WAN, start

SCENE = cast(Scene, SimpleNamespace(workload=BY_NAME["nginx"]))
NOWHERE = Path("/nowhere")
MODES = [FULL, CONVERTED, COLD, WARM_STORE, WARM]
GIVEN = {
    FULL: (FULL, FULL_WARM),
    CONVERTED: (CONVERTED,),
    COLD: (COLD,),
    WARM_STORE: (WARM_STORE, WARM),
}


def rounds(monkeypatch: pytest.MonkeyPatch, failing: str) -> tuple[dict[str, list[Start]], list[dict[str, Any]]]:
    """Return what three rounds found where a visit fails in the second one, and the lines that were written."""
    visited: list[str] = []

    def visit(name: str) -> Callable[[Scene, Path], Found]:
        def one(scene: Scene, traces: Path) -> Found:
            visited.append(name)
            if name == failing and visited.count(name) == 2:
                raise StartFailed("no")
            return {mode: start(1.0) for mode in GIVEN[name]}

        return one

    monkeypatch.setattr(startup_modes, "visits", lambda modes: {name: visit(name) for name in GIVEN})
    out = io.StringIO()
    results = Results(out)
    found = startup._rounds(3, MODES, results, SCENE, WAN, NOWHERE)
    assert results.bad and visited.count(failing) == 2
    return found, [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("failing", GIVEN)
def test_a_visit_that_fails_takes_all_its_modes_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    found, lines = rounds(monkeypatch, failing)
    left = {mode for visit, modes in GIVEN.items() if visit != failing for mode in modes}
    assert {mode: len(starts) for mode, starts in found.items()} == dict.fromkeys(left, 3)
    assert [line["mode"] for line in lines if line["what"] == "failed"] == [failing]
    if failing != FULL:  # without it there is no limit, and no summary
        modes = startup.summarise(found, LIMIT)["modes"]
        assert set(modes) == left


def test_the_modes_of_a_visit_are_those_that_it_gives() -> None:
    visits = startup_modes.visits([*MODES, TRACE])
    assert set(visits) == {*GIVEN, TRACE}
    assert {visit: startup_modes.PAIRS.get(visit, (visit,)) for visit in GIVEN} == GIVEN


def test_each_line_has_its_machine_and_its_date() -> None:
    out = io.StringIO()
    Results(out).add("start", pair=1)
    line = json.loads(out.getvalue())
    assert line["what"] == "start" and line["pair"] == 1 and line["cores"] >= 1
    offset = datetime.fromisoformat(line["date"]).utcoffset()
    assert offset is not None and not offset


def test_a_summary_is_drawn_with_all_that_it_has() -> None:
    found = {FULL: [start(3.0)], FULL_WARM: [start(0.1)], COLD: [start(0.76)]}
    out = io.StringIO()
    where = {"workload": "nginx", "link": WAN.name, "rtt_s": WAN.rtt, "mbit": WAN.mbit}
    Results(out).add("startup", **where, **startup.summarise(found, LIMIT), missed=[])
    (drawn,) = plot.read_results(out.getvalue().splitlines())
    assert drawn.link == "wan" and [bar.mode for bar in drawn.panels[0].bars] == list(found)


# -- what it is asked for

PLUGINS = """\
TYPE                            ID                       PLATFORMS      STATUS
io.containerd.content.v1        content                  -              ok
io.containerd.snapshotter.v1    btrfs                    linux/amd64    skip
io.containerd.snapshotter.v1    native                   linux/amd64    ok
io.containerd.snapshotter.v1    overlayfs                linux/amd64    ok
io.containerd.snapshotter.v1    zfs                      linux/amd64    error
io.containerd.grpc.v1           snapshots                -              ok
"""


@pytest.fixture
def containerd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Have a containerd whose plugins are PLUGINS. Return what it is asked."""
    asked: list[tuple[str, ...]] = []

    def ctr(*words: str) -> str:
        asked.append(words)
        return PLUGINS

    @contextlib.contextmanager
    def running(place: Path) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(ctr=ctr)

    @contextlib.contextmanager
    def scratch() -> Iterator[Path]:
        yield tmp_path

    monkeypatch.setattr(real, "containerd", running)
    monkeypatch.setattr(startup, "scratch", scratch)
    return asked


def asked_for(**changes: Any) -> argparse.Namespace:
    args = {
        "quick": False, "workloads": ["nginx"], "links": ["wan", "5ms/1Gbit"], "modes": [COLD, TRACE],
        "snapshotter": [], "proxy": [], "pairs": 0, "cache": NOWHERE,
    }  # fmt: skip
    return argparse.Namespace(**{**args, **changes})


def test_the_snapshotters_that_work_are_offered(containerd: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert startup.offered(tmp_path) == ["native", "overlayfs"]
    assert containerd == [("plugins", "ls")]


def test_a_full_pull_is_always_among_the_modes(containerd: list[tuple[str, ...]]) -> None:
    plan = startup.plan_of(asked_for())
    assert (plan.modes, plan.pairs, plan.proxies) == ([FULL, COLD, TRACE], 5, {})
    assert [link.name for link in plan.links] == ["wan", "5ms/1Gbit"]
    assert [workload.name for workload in plan.workloads] == ["nginx"]
    assert not containerd, "nobody asks containerd for what is ours"
    assert startup.plan_of(asked_for(modes=[CONVERTED, WARM], pairs=2)).modes == [FULL, CONVERTED, WARM]


def test_quick_is_one_workload_on_one_link_once(containerd: list[tuple[str, ...]]) -> None:
    plan = startup.plan_of(asked_for(quick=True, modes=[WARM]))
    assert (len(plan.workloads), [link.name for link in plan.links], plan.pairs) == (1, ["wan"], 1)
    assert plan.modes == [FULL, COLD, TRACE]


def test_another_snapshotter_is_one_of_containerds_or_has_a_socket(containerd: list[tuple[str, ...]]) -> None:
    assert startup.plan_of(asked_for(snapshotter=["native"])).modes == [FULL, COLD, TRACE, "native"]
    assert startup.plan_of(asked_for(modes=["native", COLD])).modes == [FULL, COLD, "native"]
    with pytest.raises(ValueError, match="offers no snapshotter zfs, nydus, but native, overlayfs; tell a proxy's"):
        startup.plan_of(asked_for(snapshotter=["zfs", "native", "nydus"]))
    containerd.clear()
    plan = startup.plan_of(asked_for(snapshotter=["nydus"], proxy=["nydus=/run/n.sock"]))
    assert plan.proxies == {"nydus": Path("/run/n.sock")} and plan.modes == [FULL, COLD, TRACE, "nydus"]
    assert not containerd


def test_what_is_no_workload_or_link_is_told() -> None:
    with pytest.raises(ValueError, match="httpd is no workload: say some of"):
        startup.plan_of(asked_for(workloads=["nginx", "httpd"]))
    with pytest.raises(ValueError, match="'slow' is no link"):
        startup.plan_of(asked_for(links=["slow"]))


# -- what it says


def test_the_last_line_of_a_quick_run() -> None:
    found = {FULL: [start(3.0)], FULL_WARM: [start(0.1)], COLD: [start(0.76)], TRACE: [start(0.38)]}
    words = startup.quick_words(startup.summarise(found, LIMIT), 41.6)
    assert words == (
        "full pull 3.00 s; limit 0.38 s (4 round trips (tcp, manifest, toc, data) 0.08 s, pages 0.20 s, "
        "overlayfs warm 0.10 s); measured ÷ limit: cold 0.76 s = 2.00, trace 0.38 s = 1.00; it took 42 s"
    )
    far = replace(LIMIT, hops=Hops(tcp=2, auth=2, redirect=1))
    words = startup.quick_words(startup.summarise(found, far), 9.0)
    assert "8 round trips (2 tcp, 2 auth, manifest, redirect, toc, data) 0.16 s" in words
