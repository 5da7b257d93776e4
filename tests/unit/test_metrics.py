"""Metrics: what is counted, what Prometheus reads of it, that docs and dashboard tell of all, and who may ask."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lazyfs.errors import StoreBroken, UsageError
from lazyfs.exposition import Metric, render
from lazyfs.limits import MAX_STAT_HOSTS
from lazyfs.mount import metrics as daemon_metrics
from lazyfs.scrape import Scrapes, parse_address
from lazyfs.stats import OTHER, Counts, Histogram, Histograms, Names
from snapshotter import metrics as snapshotter_metrics
from snapshotter.metrics import Held, Metrics
from snapshotter.reasons import Outcome

ROOT = Path(__file__).parents[2]
ALL = (*daemon_metrics.METRICS, *snapshotter_metrics.METRICS)


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples of an exposition by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


# -- counting


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_histogram_counts_each_once_and_up_to_its_bound(times: list[float]) -> None:
    histogram = Histogram((0.01, 1.0, 30.0))
    for seconds in times:
        histogram.note(seconds)
    buckets, total = histogram.buckets()
    assert buckets == [
        (bound, sum(seconds <= float(bound) for seconds in times)) for bound in ("0.01", "1.0", "30.0", "+Inf")
    ]
    assert total == pytest.approx(sum(times)) and histogram.count == len(times)


def test_labels_are_bounded() -> None:
    names = Names()
    told = {names.bounded(f"host{number}") for number in range(1000)}
    assert len(told) == MAX_STAT_HOSTS + 1 and OTHER in told
    assert names.bounded("host3") == "host3" and names.bounded("new") == OTHER
    counts, histograms = Counts(most=2), Histograms((1.0,), most=2)
    for label in "abcda":
        counts.add(1, label, "x")
        histograms.note(0.5, label)
    assert counts.read() == {("a", "x"): 2, ("b", "x"): 1, (OTHER, OTHER): 2}
    assert set(histograms.read()) == {("a",), ("b",), (OTHER,)}


def test_label_values_of_strangers_are_escaped() -> None:
    evil = 'r.test"} 1\nlazyfsd_errors_total{class="x\\'
    text = render([(Metric("a_total", "counter", "what\nis", ("host",)), {(evil,): 1.0})])
    assert read(text) == {("a_total", (("host", evil),)): 1.0}


def test_what_the_snapshotter_counts() -> None:
    metrics = Metrics(lambda: Held({"lazy": 7, "active": 1}, 3), lambda: 2)
    metrics.note_call("Prepare", "ALREADY_EXISTS", 0.02)
    metrics.note_call("Prepare", "OK", 0.3)
    metrics.note_chain(0.2, shown=True)
    metrics.note_layer(Outcome.LAZY, 0.1)
    metrics.note_layer(Outcome.SMALL, 0.1)
    metrics.note_layer(Outcome.NO_TOC, 0.1)
    metrics.note_layer(Outcome.NO_TOC, 0.1)
    metrics.note_collection(directories=2, chains=1, layers=3, freed=4096)
    metrics.note_collection(failed=True)
    metrics.note_pull("OK")
    found = read(metrics.text())
    name = "lazyfs_snapshotter_"
    for sample, labels, value in [
        ("call_duration_seconds_count", {"method": "Prepare", "code": "ALREADY_EXISTS"}, 1),
        ("call_duration_seconds_bucket", {"method": "Prepare", "code": "OK", "le": "0.25"}, 0),
        ("call_duration_seconds_bucket", {"method": "Prepare", "code": "OK", "le": "0.5"}, 1),
        ("chain_duration_seconds_sum", {"result": "shown"}, 0.2),
        ("layers_total", {"outcome": "lazy", "reason": ""}, 1),
        ("layers_total", {"outcome": "small", "reason": ""}, 1),
        ("layers_total", {"outcome": "fallback", "reason": "no_toc"}, 2),
        ("collections_total", {"result": "failed"}, 1),
        ("collected_total", {"what": "layers"}, 3),
        ("freed_bytes_total", {}, 4096),
        ("snapshots", {"kind": "lazy"}, 7),
        ("chains_in_use", {}, 3),
        ("daemon_restarts_total", {}, 2),
        ("image_service_pulls_total", {"code": "OK"}, 1),
    ]:
        assert found[name + sample, tuple(sorted(labels.items()))] == value, sample


def test_records_that_cannot_be_read_do_not_hide_the_counters() -> None:
    def broken() -> Held:
        raise StoreBroken("the disk")

    metrics = Metrics(broken)
    metrics.note_pull("OK")
    found = read(metrics.text())
    assert found["lazyfs_snapshotter_image_service_pulls_total", (("code", "OK"),)] == 1
    assert ("lazyfs_snapshotter_snapshots", (("kind", "lazy"),)) not in found


# -- what users read


def rows() -> dict[str, tuple[str, set[str]]]:
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    found = re.findall(r"^\| `(lazyfs\w+)` \| (\w+) \| (.+?) \| .+ \|$", text, re.M)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in found}


def test_the_docs_list_every_metric_and_nothing_else() -> None:
    assert rows() == {metric.name: (metric.kind, set(metric.labels)) for metric in ALL}


def test_the_docs_list_every_reason() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    for outcome in Outcome:
        assert f"`{outcome.value}`" in text, outcome


def test_no_metric_has_a_label_without_bound() -> None:
    allowed = {
        "version", "driver", "kind", "form", "complete", "checked", "priority", "source", "call", "class", "result",
        "host", "state", "method", "code", "outcome", "reason", "what",
    }  # fmt: skip
    for metric in ALL:
        assert set(metric.labels) <= allowed, metric.name
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name


def test_the_snapshotter_tells_every_metric_it_promises() -> None:
    families = {family.name for family in text_string_to_metric_families(Metrics().text().decode())}
    assert families == {metric.name.removesuffix("_total") for metric in snapshotter_metrics.METRICS}


def test_the_dashboard_queries_metrics_that_exist_and_all_of_them() -> None:
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text("utf-8"))
    assert board["title"] and board["schemaVersion"] and board["templating"]["list"][0]["type"] == "datasource"
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    samples = {metric.name: metric for metric in ALL if metric.kind != "histogram"}
    for metric in ALL:
        if metric.kind == "histogram":
            samples |= {f"{metric.name}_{part}": metric for part in ("bucket", "count", "sum")}
    used = set()
    for panel in panels:
        for target in panel["targets"]:
            for name, selector in re.findall(r"(lazyfs\w+)(\{[^}]*\})", target["expr"]):
                used.add(samples[name].name)
                labels = {*samples[name].labels, "instance", "le"}
                assert set(re.findall(r"(\w+)[!=]=?~?\"", selector)) <= labels, target["expr"]
            for by in re.findall(r"by \(([\w, ]+)\)", target["expr"]):
                assert set(by.split(", ")) <= labels, target["expr"]
    assert used == {metric.name for metric in ALL}


def test_prometheus_client_is_imported_by_nobody_who_is_not_asked() -> None:
    code = (
        "import sys, lazyfs.mount.daemon, snapshotter.metrics\n"
        "sys.exit(any(name.startswith(('prometheus_client', 'lazyfs.mount.metrics')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


# -- the listener


@contextmanager
def listening(text: bytes = b"a 1\n") -> Iterator[int]:
    scrapes = Scrapes("127.0.0.1:0", lambda: text)
    scrapes.start()
    try:
        yield scrapes.port
    finally:
        scrapes.close()


def ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(request)
        answer = b""
        while part := client.recv(65536):
            answer += part
    return answer


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_only_metrics_are_there() -> None:
    with listening() as port:
        answer = ask(port, get("/metrics"))
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\na 1\n")
        assert ask(port, get("/metrics?x=1")).startswith(b"HTTP/1.1 200 ")
        for request, status in [
            (get("/"), b"404"),
            (get("/metrics/../etc/passwd"), b"404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
            (b"nonsense\r\n\r\n", b"400"),
            (b"\x00\xff\r\n\r\n", b"400"),
        ]:
            assert ask(port, request).split()[1] == status, request


def test_a_request_without_end_is_cut_off() -> None:
    with listening() as port:
        try:
            answer = ask(port, b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
        except (ConnectionResetError, BrokenPipeError):
            answer = b"HTTP/1.1 431 "  # it closed while we were still talking
        assert answer.split()[1] == b"431"
        assert ask(port, get("/metrics")).startswith(b"HTTP/1.1 200 ")


def test_a_silent_client_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.scrape.SCRAPE_TIMEOUT", 0.2)
    with listening() as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /met")
        assert ask(port, get("/metrics")).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.scrape.SCRAPE_TIMEOUT", 0.2)
    with listening(b"x" * (16 << 20)) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(get("/metrics"))
        assert ask(port, get("/other")).split()[1] == b"404"


def test_numbers_that_cannot_be_had_are_a_503_and_a_bug_is_none_of_the_listeners_end() -> None:
    answers: list[BaseException] = [ValueError("a bug"), StoreBroken("the disk is gone")]

    def text() -> bytes:
        if answers:
            raise answers.pop()
        return b"a 1\n"

    scrapes = Scrapes("127.0.0.1:0", text)
    scrapes.start()
    try:
        answer = ask(scrapes.port, get("/metrics"))
        assert answer.split()[1] == b"503" and answer.endswith(b"the disk is gone\n")
        assert ask(scrapes.port, get("/metrics")) == b""
        assert ask(scrapes.port, get("/metrics")).split()[1] == b"200"
    finally:
        scrapes.close()


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    with listening() as port:
        ask(port, get("/metrics"))
        thread = next(each for each in threading.enumerate() if each.name == "metrics")
    thread.join(5)
    assert not thread.is_alive() and threading.active_count() <= before


def test_a_port_in_use_is_a_sentence() -> None:
    with listening() as port:
        with pytest.raises(UsageError, match=rf"can't be served on 127\.0\.0\.1:{port}: Address already in use"):
            Scrapes(f"127.0.0.1:{port}", bytes)
        assert Metrics().serve(f"127.0.0.1:{port}") is None  # and the process goes on
    assert Metrics().serve("") is None


@pytest.mark.parametrize("host", [f"{'x' * 70}.example", "a\0b", "a..b"])
def test_a_name_that_no_host_can_have_is_a_sentence(host: str) -> None:
    with pytest.raises(UsageError, match="can't be served on"):
        Scrapes(f"{host}:0", bytes)
    assert Metrics().serve(f"{host}:0") is None  # pods matter more


@pytest.mark.parametrize("text", ["9470", ":9470", "host:", "host:x", "host:70000", "host:-1", "host:²"])
def test_addresses_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="can't be served on"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:9470") == ("127.0.0.1", 9470)
    assert parse_address("[::1]:1") == ("::1", 1)
