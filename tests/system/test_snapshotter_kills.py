"""The snapshotter killed at any moment, and a node that starts again while its registry is away."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import RIGHT, Area, Case, shows
from tests.helpers.cri import CriFailed, Pod
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.little import Little
from tests.helpers.pods import PodNode

KILLS = 20
SAY = ("cat", "/data/number")
WAIT = ("sleep", "1000")
# Reads its image's files over and over, and says so when one can't be read or is another one.
WATCH = (
    "sh",
    "-c",
    'want=$(cat /data/number); while :; do [ "$(cat /data/number)" = "$want" ] && cat /data/bytes >/dev/null '
    "&& cat /etc/plain >/dev/null && echo well || echo BROKEN; sleep 0.2; done",
)


@pytest.fixture
def images(registry: FakeRegistry, scratch: Path) -> Little:
    return Little(registry, scratch)


@shows(
    Case(
        "processes-snapshotter-killed",
        Area.PROCESSES,
        "the snapshotter is killed (-9) twenty times, anywhere in pulls, starts and removals",
        "running containers: right bytes",
        "a step that was hit works when it is done again",
    ),
)
def test_twenty_kills_disturb_no_container_and_no_pull_more_than_once(scratch: Path, images: Little) -> None:
    """Each round pulls an image, runs it and removes both, and the snapshotter is killed somewhere in it."""
    chance = random.Random(4)
    steady, apps = images.numbered(100), [images.numbered(number) for number in range(4)]
    with PodNode(scratch, images.pause) as node, ThreadPoolExecutor(1) as pool:
        node.cri.pull(steady)
        pod = node.cri.run_pod("steady")
        watcher = node.cri.start(pod, "watcher", steady, WATCH)
        until(lambda: node.cri.log("watcher").count("well") >= 2, "the watcher reads", 60)

        hurt = threading.Event()  # a step that a kill hit is not done again yet

        def take(step: Callable[[], Any]) -> Any:
            """Take a step, and once more when it failed and the snapshotter is back, as kubelet would."""
            try:
                return step()
            except CriFailed:
                hurt.set()
                try:
                    until(node.connected, "containerd has found the snapshotter again", 30)
                    return step()
                finally:
                    hurt.clear()

        def round_of(number: int) -> None:
            image = apps[number % len(apps)]
            take(lambda: node.cri.pull(image))
            # One that failed to start stays as it is, and kubelet makes another one.
            container = take(lambda: node.cri.start(pod, f"round{number}-{time.monotonic_ns()}", image, WAIT))
            assert node.cri.run(container, *SAY).out == f"{number % len(apps)}\n"
            take(lambda: node.cri.remove(container))
            take(lambda: node.cri.remove_image(image))

        work = None
        number = 0
        for _ in range(KILLS):
            if work is None or work.done():
                if work is not None:
                    work.result()
                work = pool.submit(round_of, number)
                number += 1
            time.sleep(chance.uniform(0, 0.4))
            node.kill_snapshotter()
            node.start_snapshotter()
            until(node.connected, "containerd has found the snapshotter again", 30)
            until(lambda: not hurt.is_set(), "what the kill hit is done again", 60)
        assert work is not None
        work.result()
        seen = node.cri.log("watcher").count("well")
        until(lambda: node.cri.log("watcher").count("well") > seen + 1, "the watcher still reads", 30)
        assert "BROKEN" not in node.cri.log("watcher")
        assert node.cri.state(watcher).name == "RUNNING"
        assert len(node.daemons()) == 1 and number >= 4


@shows(
    Case(
        "processes-all-killed",
        Area.PROCESSES,
        "containerd, snapshotter and lazyfsd are killed, and the registry is down",
        RIGHT,
        "whole images start; of others it is told what is missing",
    ),
)
def test_complete_images_start_again_without_their_registry(scratch: Path, images: Little) -> None:
    """All three processes start again; of what is not complete it is told in bounded time what is missing."""
    whole, part = images.numbered(1), images.add("part", images.lazy(images.other_system))
    with PodNode(scratch, images.pause, READ_TIMEOUT="5", CHAIN_TIMEOUT="10") as node:
        for image in (whole, part):
            node.cri.pull(image)
        assert node.lazyfs("fetch", whole).returncode == 0
        old = node.cri.run_pod("old")
        node.cri.start(old, "old", whole, WAIT)
        node.cri.remove_pod(old.id)

        images.registry.stop_listening()
        node.kill_containerd()
        node.kill_snapshotter()
        node.kill_daemon()
        node.start_snapshotter()
        node.start_containerd()

        pod = node.cri.run_pod("new")
        container = node.cri.start(pod, "whole", whole, WAIT)
        assert node.cri.run(container, *SAY).out == "1\n"
        with pytest.raises(CriFailed) as refused:
            node.cri.start(pod, "part", part, WAIT)
        assert refused.value.code == "UNAVAILABLE"
        silent = f"is not whole on this node and its registry does not answer .*{images.registry.host}"
        assert re.search(silent + ".* of 1 layer is not here", refused.value.words), refused.value.words
        images.registry.listen_again()
        until(lambda: starts(node, pod, f"later{time.monotonic_ns()}", part), "the registry is asked again", 60)
        assert node.cri.state(container).name == "RUNNING"


def starts(node: PodNode, pod: Pod, name: str, image: str) -> bool:
    try:
        return bool(node.cri.start(pod, name, image, WAIT))
    except CriFailed:
        return False
