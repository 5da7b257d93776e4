"""What becomes of pulls and pods when layers can't be lazy, and when a registry, the daemon or containerd fails."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers import real
from tests.helpers.cri import CriFailed, Said
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry, Fault, Request, Rule
from tests.helpers.little import Little, data
from tests.helpers.pods import PodNode

SAY = ("cat", "/data/number")
WAIT = ("sleep", "1000")


@pytest.fixture
def images(registry: FakeRegistry, scratch: Path) -> Little:
    return Little(registry, scratch)


def run(node: PodNode, image: str, *command: str, name: str = "one") -> Said:
    """Run a command in a new container of a new pod; both are gone afterwards."""
    pod = node.cri.run_pod(name)
    container = node.cri.start(pod, name, image, WAIT)
    said = node.cri.run(container, *command)
    node.cri.remove_pod(pod.id)
    return said


def layers_of(node: PodNode, image: str) -> list[dict[str, Any]]:
    """Return what `lazyfs why` says of an image's layers."""
    done = node.lazyfs("why", "--json", image)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["images"]
    layers: list[dict[str, Any]] = found["layers"]
    return layers


def states(node: PodNode, image: str) -> list[tuple[str, str]]:
    return [(layer["state"], layer["reason_class"]) for layer in layers_of(node, image)]


def test_plain_and_mixed_images_run_and_it_is_told_why(scratch: Path, images: Little) -> None:
    lazy, plain, system = images.lazy, images.plain, images.system
    other = system + bytes(
        512
    )  # the same files in another layer: containerd prepares a chain that it has no second time
    every = {
        "plain": (plain(system), plain(data(1))),
        "below": (plain(other), lazy(data(2))),
        "above": (lazy(system + bytes(1024)), plain(data(3))),
        "lazy": (lazy(system + bytes(1536)), lazy(data(4))),
    }
    named = {name: images.add(name, *layers) for name, layers in every.items()}
    with PodNode(scratch, images.pause, SMALL_LAYER="1") as node:
        for number, (name, image) in enumerate(named.items(), 1):
            node.cri.pull(image)
            assert run(node, image, *SAY, name=name) == Said(0, f"{number}\n", "")
        assert states(node, named["plain"]) == [("fallback", "no_toc"), ("fallback", "below_not_lazy")]
        assert states(node, named["below"]) == [("fallback", "no_toc"), ("fallback", "below_not_lazy")]
        assert states(node, named["above"]) == [("lazy", ""), ("fallback", "no_toc")]
        assert states(node, named["lazy"]) == [("lazy", ""), ("lazy", "")]
        web = images.add("web", *every["lazy"], User="33:34")
        node.cri.pull(web)
        su = ("run", "--rm", "--allow-new-privs", "--snapshotter", "lazyfs", web, "su")
        assert node.ctr(*su, "sh", "-c", "id -u; id-as-root -u") == "33\n0\n"
        assert all(layer["reason"] for layer in layers_of(node, named["plain"]))
        log = node.log("snapshotter")
        assert log.count("outcome=no_toc") >= 2 and log.count("outcome=below_not_lazy") >= 2


def test_small_plain_layers_are_fetched_and_the_rest_stays_lazy(scratch: Path, images: Little) -> None:
    image = images.add("small", images.plain(images.system), images.lazy(data(1, 8_000_000)))
    with PodNode(scratch, images.pause, SMALL_LAYER="64MiB") as node:
        node.cri.pull(image)
        assert run(node, image, *SAY).out == "1\n"
        assert [state for state, _ in states(node, image)] == ["small", "lazy"]
        assert images.registry.bytes_sent("/blobs/") < 8_000_000


def test_stargz_aware_clients_pull_lazily_too(scratch: Path, images: Little) -> None:
    image = images.numbered(1)
    with PodNode(scratch, images.pause) as node:
        words = ["--address", node.address, "--namespace", "remote", "images", "rpull", "--plain-http"]
        real.call("ctr-remote", *words, "--snapshotter", "lazyfs", image)
        assert states(node, image) == [("lazy", ""), ("lazy", "")]
        sent = images.registry.bytes_sent("/blobs/")
        words = ["run", "--rm", "--snapshotter", "lazyfs", image, "one", *SAY]
        assert node.ctr(*words, namespace="remote") == "1\n"
        assert sent < 200_000 and images.registry.bytes_sent("/blobs/") < 4_000_000


def test_pulls_of_the_same_layers_at_once_share_the_work(scratch: Path, images: Little) -> None:
    """Four images of the same layers under four names, by CRI and by hand; every one runs."""
    lower, upper = images.lazy(images.system), images.lazy(data(1))
    named = [images.add(f"same{number}", lower, upper) for number in range(4)]
    with PodNode(scratch, images.pause) as node, ThreadPoolExecutor(8) as pool:
        pulls = [pool.submit(node.cri.pull, image) for image in named * 2]
        hands = [pool.submit(node.lazyfs, "pull", "--namespace", "by-hand", image) for image in named[:2]]
        for pull in pulls:
            pull.result()
        for hand in hands:
            assert hand.result().returncode == 0, hand.result().stderr
        tails = [request for request in images.registry.matching("GET", "/blobs/") if request.range]
        assert len({(request.path.rsplit("/", 1)[1], request.range) for request in tails}) == len(tails)
        assert [run(node, image, *SAY).out for image in named] == ["1\n"] * 4


@shows(
    Case(
        "network-pull-black-hole",
        Area.NETWORK,
        "a registry never answers ranges while an image is pulled",
        RIGHT,
        "the pull goes on in the ordinary way after `prepare_timeout`",
    ),
)
def test_a_registry_that_never_answers_ranges_delays_a_pull_and_nobody_else(scratch: Path, images: Little) -> None:
    """The pull is an ordinary one after prepare_timeout; an image of another registry is lazy meanwhile."""
    hung = images.numbered(1)
    hits: list[str] = []

    def black_hole(request: Request) -> Rule | None:
        if request.range and "/app1/" in request.path:
            hits.append(request.path)
            return Rule(Fault.BLACK_HOLE)
        return None

    with FakeRegistry() as other, ThreadPoolExecutor(1) as pool:
        place = scratch / "other"
        place.mkdir()
        fine = Little(other, place).numbered(2)
        with PodNode(scratch, images.pause, PREPARE_TIMEOUT="6", ANSWER_TIMEOUT="30") as node:
            node.trust(other.host)
            images.registry.faults.append(black_hole)
            began = time.monotonic()
            slow = pool.submit(node.cri.pull, hung)
            until(lambda: hits, "the registry is asked for a range")
            node.cri.pull(fine)
            assert not slow.done()
            assert states(node, fine) == [("lazy", ""), ("lazy", "")]
            slow.result()
            assert time.monotonic() - began < 60
            assert {state for state, _ in states(node, hung)} == {"fallback"}
            assert states(node, hung)[0][1] == "timeout"
            assert run(node, hung, *SAY).out == "1\n"
            images.registry.clear_faults()


@shows(
    Case(
        "processes-daemon-gone",
        Area.PROCESSES,
        "lazyfsd is gone when a pod starts",
        RIGHT,
        "nothing: another one is started",
    ),
)
def test_a_daemon_that_is_gone_is_started_again(scratch: Path, images: Little) -> None:
    first, second = images.numbered(1), images.numbered(2)
    with PodNode(scratch, images.pause) as node:
        node.cri.pull(first)
        assert run(node, first, *SAY).out == "1\n"
        node.kill_daemon()
        assert run(node, first, *SAY).out == "1\n"
        (pid,) = node.daemons()
        node.kill_daemon()
        node.cri.pull(second)
        assert run(node, second, *SAY).out == "2\n"
        assert states(node, second) == [("lazy", ""), ("lazy", "")]
        (again,) = node.daemons()
        assert pid != again


@shows(
    Case(
        "processes-daemon-silent",
        Area.PROCESSES,
        "lazyfsd is stopped (SIGSTOP) when a pod is pulled and started",
        "–",
        "bounded time, and it is told",
    ),
)
def test_a_daemon_that_does_not_answer_delays_and_is_told(scratch: Path, images: Little) -> None:
    first = images.numbered(1)
    second = images.add("second", images.lazy(images.other_system), images.lazy(data(2)))
    with PodNode(scratch, images.pause, PREPARE_TIMEOUT="2", CHAIN_TIMEOUT="2", SMALL_LAYER="1") as node:
        node.cri.pull(first)
        pod = node.cri.run_pod("one")
        with node.daemon_stopped():
            began = time.monotonic()
            with pytest.raises(CriFailed) as failed:
                node.cri.create(pod, "stuck", first, WAIT)
            assert (
                failed.value.code == "UNAVAILABLE" or "daemon" in failed.value.words or "lazyfsd" in failed.value.words
            )
            assert "\n" not in failed.value.words
            node.cri.pull(second)
            assert time.monotonic() - began < 60
        assert {state for state, _ in states(node, second)} == {"fallback"}
        assert run(node, first, *SAY, name="two").out == "1\n"
        assert run(node, second, *SAY, name="three").out == "2\n"


def test_a_snapshot_that_is_mounted_can_be_removed(scratch: Path, images: Little) -> None:
    """As with overlayfs: what has children stays and says so; what a container uses goes, and it reads on."""
    image = images.numbered(1)
    with PodNode(scratch, images.pause) as node:
        node.cri.pull(image)
        pod = node.cri.run_pod("one")
        container = node.cri.start(pod, "one", image, WAIT)
        committed = [key.partition("/")[2] for key in node.snapshots() if "sha256:" in key]
        for key in committed:
            with pytest.raises(real.ToolFailed, match="cannot remove snapshot with child"):
                node.ctr("snapshots", "--snapshotter", "lazyfs", "rm", key)
                node.ctr("snapshots", "--snapshotter", "lazyfs", "rm", key)
        before = node.held()["directories"]
        node.ctr("snapshots", "--snapshotter", "lazyfs", "rm", container)
        until(lambda: len(node.held()["directories"]) < len(before), "its directory is collected", 30)
        time.sleep(3)  # a chain that was asked for a moment ago is let go a little later
        assert node.cri.run(container, "cat", "/data/bytes").code == 0
        assert node.cri.run(container, *SAY).out == "1\n"


@shows(
    Case(
        "processes-containerd-killed",
        Area.PROCESSES,
        "containerd is killed (-9) in the middle of a pull",
        RIGHT,
        "the pull goes on where it was",
    ),
)
def test_containerd_killed_in_mid_pull_goes_on_where_it_was(scratch: Path, images: Little) -> None:
    """An image with a lazy layer below and plain ones above, slowly; afterwards the same pull ends well."""
    image = images.add("app", images.lazy(images.system), images.plain(data(1)), images.plain(data(2)))
    with PodNode(scratch, images.pause, SMALL_LAYER="1") as node, ThreadPoolExecutor(1) as pool:
        images.registry.rate = 400_000
        pull = pool.submit(node.cri.pull, image)
        until(lambda: "outcome=no_toc" in node.log("snapshotter"), "a layer has fallen back", 60)
        node.kill_containerd()
        with pytest.raises(CriFailed):
            pull.result()
        images.registry.rate = 0
        node.start_containerd()
        node.cri.pull(image)
        assert run(node, image, *SAY).out == "2\n"
        assert [state for state, _ in states(node, image)] == ["lazy", "fallback", "fallback"]
