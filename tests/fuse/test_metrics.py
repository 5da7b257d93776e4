"""A real daemon's metrics: they move with what its readers do, over the control socket and over HTTP."""

from __future__ import annotations

import socket
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from lazyfs.control_client import connect
from lazyfs.mount.metrics import METRICS
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.daemon import Node, add
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

CONTENT = pattern(300_000)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: Samples, name: str, **labels: str) -> float:
    """Add up the samples of that name with at least these labels."""
    return sum(value for (each, told), value in found.items() if each == name and labels.items() <= dict(told).items())


def ask(node: Node) -> Samples:
    with connect(node.run_dir / "lazyfsd.sock") as daemon:
        return samples(daemon.call("metrics")["text"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        found: int = sock.getsockname()[1]
        return found


def test_counters_move_with_what_readers_do(node: Node, registry: FakeRegistry) -> None:
    port = free_port()
    node.settings["METRICS_ADDRESS"] = f"127.0.0.1:{port}"
    image = add(registry, "one", zstd_chunked_layer(tar_of(file("f", CONTENT))))
    tree = node.mount(image)
    before = ask(node)
    assert {name.removesuffix("_total") for name in _families(before)} <= {
        metric.name.removesuffix("_total") for metric in METRICS
    }
    assert total(before, "lazyfsd_mounts", kind="ro") == 1
    assert total(before, "lazyfsd_served_layers", form="lazy", complete="no", checked="no") == 1
    assert total(before, "lazyfsd_fetched_bytes_total", priority="demand") < len(CONTENT)
    assert node.read(tree / "f") == CONTENT
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    after = samples(text)
    assert total(after, "lazyfsd_fetched_bytes_total", priority="demand") >= len(CONTENT)
    assert total(after, "lazyfsd_read_bytes_total", source="registry") == len(CONTENT)
    assert total(after, "lazyfsd_read_duration_seconds_count") > total(before, "lazyfsd_read_duration_seconds_count")
    assert total(after, "lazyfsd_read_duration_seconds_bucket", le="+Inf") == total(
        after, "lazyfsd_read_duration_seconds_count"
    )
    assert total(after, "lazyfsd_fuse_requests_total", call="read") >= 1
    assert total(after, "lazyfsd_registry_request_duration_seconds_count", host=registry.host, kind="blob") >= 1
    assert total(after, "lazyfsd_registry_received_bytes_total", host=registry.host) >= len(CONTENT)
    assert total(after, "lazyfsd_store_bytes") > 0 and total(after, "lazyfsd_anonymous_memory_bytes") > 1 << 20
    assert (total(after, "lazyfsd_known_layers"), total(after, "lazyfsd_quarantined_layers")) == (1, 0)
    assert image.layers[0].removeprefix("sha256:")[:12] not in text and "/one" not in text


def test_an_address_in_use_keeps_no_image_from_its_users(node: Node, registry: FakeRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        node.settings["METRICS_ADDRESS"] = f"127.0.0.1:{taken.getsockname()[1]}"
        tree = node.mount(add(registry, "one", zstd_chunked_layer(tar_of(file("f", b"content")))))
        assert node.read(tree / "f") == b"content"
        assert "Address already in use" in node.log()
        assert total(ask(node), "lazyfsd_info") == 1


def test_an_address_without_sense_is_refused_at_the_start(node: Node, registry: FakeRegistry) -> None:
    node.settings["METRICS_ADDRESS"] = "here"
    image = add(registry, "one", zstd_chunked_layer(tar_of(file("f", b"content"))))
    words = node.refused(2, "mount", image.reference, node.new_dir())
    assert "metrics can't be served on 'here'" in words and "HOST:PORT" in words


def _families(found: Samples) -> set[str]:
    names = {name for name, _ in found}
    return {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in names}
