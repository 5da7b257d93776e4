"""perf.startup's arithmetic: what the limit is made of, how sure a ratio is, which links and promises there are."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf.limit import Hops, Limit, Link, Touched, parse_link, probe
from perf.pairs import shuffled, spread, upper_bound
from perf.start import StartFailed
from perf.startup import broken, summarise
from perf.startup_images import Image
from perf.startup_node import Node, Start, check_cold, check_empty
from perf.workloads import ALL, BY_NAME
from tests.helpers.fake_registry import FakeRegistry

WAN = Link("wan", 0.020, 200.0)
LIMIT = Limit(WAN, Hops(), Touched(pages=10_000_000, compressed=5_000_000), warm=0.1)


def start(total: float, moved: int = 1000) -> Start:
    return Start(total, 0.0, 0.0, 0.0, moved, 1)


def test_the_limit_is_round_trips_and_compressed_pages_and_a_warm_start() -> None:
    assert LIMIT.hops.count == 4  # TCP, manifest, index of the layers, data
    assert LIMIT.seconds == pytest.approx(4 * 0.020 + 5e6 * 8 / 200e6 + 0.1)
    facts = LIMIT.facts()
    assert facts["seconds"] == 0.38
    assert facts["hops"] == {
        "tcp": 1,
        "tls": 0,
        "auth": 0,
        "index": 0,
        "manifest": 1,
        "redirect": 0,
        "toc": 1,
        "data": 1,
    }


def test_each_hop_costs_a_round_trip_and_loopback_none() -> None:
    more = replace(LIMIT, hops=Hops(tcp=2, tls=1, auth=2, index=1, redirect=1))
    assert more.seconds == pytest.approx(LIMIT.seconds + 6 * 0.020)
    assert replace(more, link=parse_link("loopback")).seconds == LIMIT.warm


@pytest.mark.parametrize(
    ("text", "rtt", "mbit"),
    [
        ("lan", 0.020, 1000.0),
        ("wan", 0.020, 200.0),
        ("far", 0.100, 50.0),
        ("loopback", 0.0, 0.0),
        ("5ms/1Gbit", 0.005, 1000.0),
        ("0.5ms/2.5Mbit", 0.0005, 2.5),
    ],
)
def test_links_have_names_or_are_spelled_out(text: str, rtt: float, mbit: float) -> None:
    assert parse_link(text) == Link(text, rtt, mbit)


@pytest.mark.parametrize("text", ["", "fast", "20ms", "20ms/0Mbit", "-1ms/5Mbit", "20ms/200Mbit ", "20/200"])
def test_other_words_are_no_link(text: str) -> None:
    with pytest.raises(ValueError, match="is no link: say"):
        parse_link(text)


def test_the_registrys_hops_are_seen() -> None:
    with FakeRegistry() as plain:
        plain.add_image("app", "lazy", [b"a layer"])
        assert probe(f"{plain.host}/app:lazy") == Hops()
    with FakeRegistry(auth="bearer", anonymous=True) as strict:
        strict.add_image("app", "lazy", [b"a layer"])
        assert probe(f"{strict.host}/app:lazy") == Hops(auth=2)
    with FakeRegistry(auth="basic", users={"a": "b"}) as closed:
        closed.add_image("app", "lazy", [b"a layer"])
        assert probe(f"{closed.host}/app:lazy") == Hops(auth=2)


@pytest.mark.parametrize("auth", ["", "bearer"])
def test_an_index_and_a_storage_of_its_own_are_hops(auth: str) -> None:
    with FakeRegistry(auth=auth, anonymous=bool(auth), redirect=True) as registry:
        image = registry.add_image("app", "", [b"a layer"])
        registry.add_index("app", "lazy", {"linux/amd64": image})
        found = probe(f"{registry.host}/app:lazy")
        assert found == Hops(tcp=2, auth=2 if auth else 0, index=1, redirect=1)
        registry.redirect = False
        assert probe(f"{registry.host}/app:lazy") == replace(found, tcp=1, redirect=0)


def test_a_registry_without_the_image_has_no_hops() -> None:
    with FakeRegistry() as registry, pytest.raises(StartFailed, match="answered 404"):
        probe(f"{registry.host}/app:lazy")


@settings(max_examples=20)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12))
def test_the_bound_is_not_below_the_median_nor_above_the_worst(ratios: list[float]) -> None:
    bound = upper_bound(ratios)
    assert statistics.median(ratios) <= bound <= max(ratios)
    assert bound == upper_bound(ratios)  # the same pairs say the same


def test_more_pairs_are_surer_and_none_say_nothing() -> None:
    few, many = [0.9, 1.0, 1.1], [0.9, 1.0, 1.1] * 20
    assert upper_bound(many) < upper_bound(few) == 1.1
    with pytest.raises(ValueError, match="no ratio"):
        upper_bound([])


def test_each_round_has_all_modes_in_an_order_of_its_own() -> None:
    orders = shuffled(["a", "b", "c", "d"], 8)
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_ratios_are_those_of_a_round_and_missed_promises_are_named() -> None:
    found = {
        "overlayfs": [start(10.0), start(20.0)],
        "overlayfs-warm": [start(0.1), start(0.1)],
        "cold": [start(1.0), start(22.0)],
        "trace": [start(0.5), start(0.5)],
    }
    summary = summarise(found, LIMIT)
    assert summary["modes"]["cold"]["by_full_pull"] == 0.6  # 0.1 and 1.1
    assert summary["modes"]["cold"]["by_full_pull_95"] == 1.1
    assert summary["modes"]["trace"]["by_limit"] == 1.32
    missed = broken(BY_NAME["nginx"], WAN, summary)
    assert [words.split(":")[0] for words in missed] == ["cold", "cold"]
    assert broken(BY_NAME["nginx"], parse_link("loopback"), summary) == ["cold: up to 1.1 of the full pull, not 1.03"]


def test_the_faster_full_pull_of_a_round_is_the_reference() -> None:
    found = {
        "overlayfs": [start(10.0), start(6.0)],
        "overlayfs-warm": [start(0.1), start(0.1)],
        "overlayfs-converted": [start(4.0), start(8.0)],
        "cold": [start(2.0), start(3.0)],
    }
    modes = summarise(found, LIMIT)["modes"]
    assert modes["cold"]["by_full_pull"] == modes["cold"]["by_full_pull_95"] == 0.5  # of 4.0 and of 6.0
    assert "by_full_pull" not in modes["overlayfs-converted"]


def test_a_start_that_found_something_warm_is_no_cold_start(tmp_path: Path) -> None:
    assert check_cold(start(1.0, moved=500), 500, "overlayfs").moved == 500
    with pytest.raises(StartFailed, match="overlayfs: 499 bytes came over the link, not the 500 of a cold start"):
        check_cold(start(1.0, moved=499), 500, "overlayfs")

    image = Image("app", 10, 10, (f"sha256:{'a' * 64}",))
    node = cast(Node, SimpleNamespace(place=tmp_path, root=tmp_path / "l", snapshotter="lazyfs"))
    check_empty(node, image)
    (tmp_path / "l/layers/sha256" / ("b" * 64)).mkdir(parents=True)  # the sandbox's
    check_empty(node, image)
    (tmp_path / "l/layers/sha256" / ("a" * 64)).mkdir()
    with pytest.raises(StartFailed, match="already: this is no cold start"):
        check_empty(node, image)


def test_workloads_of_one_image_have_the_same_content() -> None:
    for one in ALL:
        twin = BY_NAME[one.image]
        assert (one.packages, one.files, one.java, one.data) == (twin.packages, twin.files, twin.java, twin.data)
