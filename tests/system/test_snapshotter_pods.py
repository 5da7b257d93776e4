"""Pods and containers of images that were never pulled, beside those of containerd's own overlayfs snapshotter."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import real
from tests.helpers.cri import Pod
from tests.helpers.daemon import until
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.pods import PodNode, answer
from tests.helpers.service_images import (
    PACKAGES,
    PYTHON_PROGRAM,
    ServiceImages,
    nginx_command,
    postgres_command,
    query,
)
from tests.helpers.trees import TOC_FILES, Node, compare, snapshot

PATIENCE = 90.0  # seconds for a service on a machine that does much else


def start_python(node: PodNode, pod: Pod, image: str, name: str = "python") -> Callable[[], bool]:
    """Start it and return what tells whether it has answered."""
    node.cri.start(pod, name, image, ["python3", "-c", PYTHON_PROGRAM])
    return lambda: node.cri.log(name) == '{"answer": 42}\n'


def start_nginx(node: PodNode, pod: Pod, image: str, name: str = "nginx") -> Callable[[], bool]:
    port = real.free_port()
    node.cri.start(pod, name, image, nginx_command(port))

    def answers() -> bool:
        try:
            return answer(port) == "served\n"
        except real.ToolFailed:
            return False

    return answers


def start_postgres(node: PodNode, pod: Pod, image: str, name: str = "postgres") -> Callable[[], bool]:
    container = node.cri.start(pod, name, image, postgres_command())

    def answers() -> bool:
        if "ready to accept connections" not in node.cri.log(name):  # a look at a file; a query is a process in there
            assert node.cri.state(container).name in ("CREATED", "RUNNING"), node.cri.log(name)
            time.sleep(0.3)
            return False
        return node.cri.run(container, *query("select 6*7")).out == "42\n"

    return answers


START = {"python": start_python, "nginx": start_nginx, "postgres": start_postgres}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_service_answers_before_a_third_of_its_image_came(scratch: Path, services: ServiceImages, name: str) -> None:
    """By CRI, as a kubelet does it; then the same image by ctr, in another namespace."""
    image = services.reference(name)
    with PodNode(scratch, services.pause) as node:
        reference = node.cri.pull(image)
        before = node.fetched()
        pod = node.cri.run_pod("one")
        until(START[name](node, pod, image), f"{name} answers", PATIENCE)
        assert before < node.fetched() < services.sizes[name] / 3
        status = node.status()
        assert (status["daemon"]["driver"], status["daemon"]["reason"]) == (
            "erofs",
            "its self-test passed",
        )  # by default
        assert {mount["driver"] for mount in status["mounts"]} == {"erofs"}
        known = node.cri.image(image)
        assert known is not None and known.id == reference
        until(lambda: 0 < node.cri.image_bytes() < services.sizes[name], "kubelet is told what lies on this disk")

        assert node.lazyfs("pull", "--namespace", "by-hand", image).returncode == 0
        words = [
            "run",
            "--rm",
            "--snapshotter",
            "lazyfs",
            image,
            "hand",
            "sh",
            "-c",
            "echo $(cat /etc/debian_version) $(id -u)",
        ]
        assert re.fullmatch(r"\d+\.\d+ 0\n", node.ctr(*words, namespace="by-hand"))
        assert node.fetched() < services.sizes[name] / 3


# -- the same tree, the same behaviour

# All that containers do to their root filesystem; what it leaves behind is compared.
CHANGES = r"""
set -e
cd /
echo changed >> etc/debian_version                     # copy up
rm etc/passwd && echo again > etc/passwd               # delete and make again
rm usr/bin/find                                        # a whiteout
mv usr/share/doc/dash usr/share/doc/moved              # a directory of the image, under another name
mv etc/group etc/renamed
chown 33:34 etc/issue etc/renamed
chmod 4711 usr/bin/env
rm -r usr/share/doc/coreutils && mkdir usr/share/doc/coreutils && echo only > usr/share/doc/coreutils/file  # opaque
ln usr/bin/sort usr/bin/sort-again && echo '#' >> usr/bin/sort-again && cmp usr/bin/sort usr/bin/sort-again
ln -s nowhere etc/link && mkfifo etc/fifo && mkdir -m 2770 etc/new && touch etc/new/empty
truncate -s 5 usr/bin/head && truncate -s 1M usr/bin/wc
rm -r usr/share/bug && mv usr/share/doc/sed usr/share/bug
dd if=/dev/zero of=usr/bin/tail bs=100 seek=3 count=1 conv=notrunc 2>/dev/null
find_gone=$(ls usr/bin | grep -c '^find$' || true); test "$find_gone" = 0
"""


@contextmanager
def mounted(node: PodNode, snapshotter: str, key: str, place: Path) -> Iterator[Path]:
    """Show a container's root filesystem."""
    place.mkdir()
    command = node.ctr("snapshots", "--snapshotter", snapshotter, "mounts", place, key, namespace="trees")
    real.call(*shlex.split(command))
    try:
        yield place
    finally:
        real.call("umount", place)
        place.rmdir()


def test_trees_and_changes_are_those_of_overlayfs(scratch: Path, services: ServiceImages) -> None:
    """One containerd, both snapshotters: the image's tree, and what is left of it after a container changed much."""
    image = services.reference("python")
    trees: dict[str, list[dict[bytes, Node]]] = {}
    began = time.time_ns()
    with PodNode(scratch, services.pause, BACKGROUND="1") as node:
        for snapshotter in ("overlayfs", "lazyfs"):
            pull = node.lazyfs("pull", "--namespace", "trees", "--snapshotter", snapshotter, image)
            assert pull.returncode == 0, pull.stderr
            found = trees[snapshotter] = []
            for key, command in (("untouched", "true"), ("changed", CHANGES)):
                words = ["run", "--snapshotter", snapshotter, image, f"{snapshotter}-{key}", "sh", "-c", command]
                node.ctr(*words, namespace="trees")
                with mounted(node, snapshotter, f"{snapshotter}-{key}", scratch / "tree") as tree:
                    found.append(snapshot(tree))
                node.ctr("containers", "rm", f"{snapshotter}-{key}", namespace="trees")
        for before, after in zip(trees["overlayfs"], trees["lazyfs"], strict=True):
            assert len(before) > 3000
            # What was changed now, and directories that a layer's tar doesn't name: the time is that of the unpacking.
            dated = {name for name, one in before.items() if one.mtime_ns > began}
            assert compare(before, after, ignore=TOC_FILES, undated=dated | {b""}) == []
        assert trees["lazyfs"][0] != trees["lazyfs"][1]


# -- many at once


def served_twice(registry: FakeRegistry) -> list[str]:
    """Return the ranges of layers that a registry sent more than once; documents are read by containerd as well."""
    sent: dict[str, list[tuple[int, int]]] = {}
    for request in registry.matching("GET", "/blobs/"):
        found_range = re.match(r"bytes=(\d+)-", request.range)
        begin = int(found_range[1]) if found_range else 0
        if found_range or request.sent > 100_000:
            sent.setdefault(request.path, []).append((begin, begin + request.sent))
    found = []
    for path, ranges in sent.items():
        ranges.sort()
        for (_, end), (begin, _) in pairwise(ranges):
            if begin < end:
                found.append(f"{path}: {end - begin} bytes at {begin}")
    return found


def test_thirty_containers_of_three_images_at_once(
    scratch: Path, services: ServiceImages, registry: FakeRegistry
) -> None:
    """Every one answers, and no byte of a blob crosses the network twice."""
    services.fill(registry)
    images = {name: f"{registry.host}/{name}:lazy" for name in PACKAGES}
    with PodNode(scratch, services.pause) as node, ThreadPoolExecutor(30) as pool:
        node.trust(registry.host)
        pods = {name: node.cri.run_pod(name) for name in PACKAGES}

        def one(name: str, number: int) -> None:
            if node.cri.image(images[name]) is None:  # as kubelets do it, and here ten at once
                node.cri.pull(images[name])
            answers = START[name](node, pods[name], images[name], f"{name}-{number}")
            until(answers, f"{name} {number} answers", 3 * PATIENCE)

        for done in [pool.submit(one, name, number) for number in range(10) for name in PACKAGES]:
            done.result()
        assert len(node.cri.containers()) == 30
        told = node.status()
        assert served_twice(registry) == [], (told["errors"], told["cache"]["store"])
