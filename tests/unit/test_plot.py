"""perf.plot: results become bars that say what was measured, and a start becomes the same bytes each time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from lazyfs.format.trace import encode
from perf import plot
from tests.unit.test_trace_show import START

LINE = {
    "what": "startup", "workload": "nginx", "link": "20ms/200Mbit", "rtt_s": 0.02, "mbit": 200.0,
    "modes": {
        mode: {
            "pull_s": factor, "create_s": 0.05, "start_s": 0.1, "ready_s": 0.25, "total_s": factor + 0.4,
            "total": {"median": factor + 0.4, "least": factor + 0.3, "greatest": factor + 0.6},
        }
        for mode, factor in (("overlayfs", 4.0), ("trace", 0.5))
    },
    "limit": {"seconds": 0.7}, "cpu": "$one of $two", "cores": 2, "memory": 8 * 10**9, "kernel": "6.1",
}  # fmt: skip


def lines(*changes: dict[str, Any]) -> list[str]:
    return ['{"what": "start", "pair": 0}\n', "\n", *(json.dumps({**LINE, **one}) for one in changes)]


def test_results_are_read_by_link_and_the_last_of_a_workload_counts() -> None:
    wan, near = plot.read_results(
        lines({"limit": {"seconds": 9}}, {"workload": "redis"}, {}, {"link": "loopback", "rtt_s": 0.0, "mbit": 0.0})
    )
    assert (wan.link, wan.words) == ("20ms/200Mbit", "20ms/200Mbit: 20 ms, 200 Mbit/s")
    assert [(panel.workload, panel.limit) for panel in wan.panels] == [("nginx", 0.7), ("redis", 0.7)]
    assert wan.panels[0].bars[1] == plot.Bar("trace", (0.5, 0.05, 0.1, 0.25), 0.8, 1.1)
    assert wan.machine == "$one of $two, 2 cores, 8 GB, Linux 6.1"
    assert near.words == "loopback"


@pytest.mark.parametrize(
    "bad", [["no json"], ["[1]"], lines({"modes": {"cold": {}}}), lines({"limit": None}), [], ["{}"]]
)
def test_what_perf_startup_does_not_write_is_refused(bad: list[str]) -> None:
    with pytest.raises(plot.ResultsInvalid):
        plot.read_results(bad)


def test_pictures_are_the_same_bytes_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").write_text("\n".join(lines({})))
    (tmp_path / "trace").write_bytes(encode(START))
    out = tmp_path / "out"
    words = ["plot", str(tmp_path / "results"), "--trace", str(tmp_path / "trace"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    assert plot.main() == 0
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(found) == ["start.png", "start.svg", "startup-20ms-200Mbit.png", "startup-20ms-200Mbit.svg"]
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in sorted(found)]
    for name, raw in found.items():
        assert raw.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    with matplotlib.rc_context(plot.STYLE):
        again = plot.save(plot.draw_start(START), tmp_path, "start")
    assert [path.read_bytes() for path in again] == [found["start.png"], found["start.svg"]]
