"""What a start reads first is recorded, learned by the node, and fetched ahead by the next cold start."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from lazyfs import control_client
from lazyfs.errors import UsageError
from lazyfs.format.entry import LANDMARK, LANDMARK_CONTENT
from lazyfs.format.trace import Read, Trace, decode, encode, paths
from lazyfs.oci import OCI_MANIFEST, Descriptor
from lazyfs.reference import parse
from lazyfs.registry import traces
from lazyfs.registry.open import OpenOptions, open_repository
from lazyfs.registry.referrers import fallback_tag
from tests.helpers.blobs import LayerBlob, zstd_chunked_layer
from tests.helpers.chains import running
from tests.helpers.daemon import Node, add, tmpfs, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

FILES = {f"f{number:02}": pattern(100_000, number) for number in range(20)}


def layer(seed: str = "") -> LayerBlob:
    tar = tar_of(*(file(name + seed, data) for name, data in FILES.items()))
    return zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16)


def test_a_start_is_recorded_to_a_file(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "one", layer())
    node.mount(add(registry, "other", layer("x")))  # a daemon
    with control_client.connect(node.run_dir / "lazyfsd.sock") as daemon:
        args: dict[str, Any] = {"image": image.reference, "lease": True, "command": ["a", "b"]}
        with pytest.raises(UsageError, match="true or false"):
            daemon.call("mount_image", trace="yes", **args)
        mount = daemon.call("mount_image", trace=True, **args)
        assert node.read(Path(mount["path"]) / "f07") == FILES["f07"]
        assert node.read(Path(mount["path"]) / "f03") == FILES["f03"]
        for nonsense in (-1, 1e9, "soon", True):
            with pytest.raises(UsageError, match="seconds"):
                daemon.call("trace_end", mount=mount["mount"], ready=nonsense)
        ended = daemon.call("trace_end", mount=mount["mount"], ready=1.25)
        path = Path(ended["path"])
        trace = decode(path.read_bytes())
        with pytest.raises(UsageError, match="nothing is recorded"):
            daemon.call("trace_end", mount=mount["mount"], ready=None)
    assert path.parent == node.root / "traces" / "records"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert (ended["reads"], ended["requests"], ended["ready"]) == (len(trace.reads), len(trace.requests), 1.25)
    assert (trace.manifest, trace.layers, trace.ready) == (image.digest, image.layers, 1.25)
    assert trace.command == ("a", "b")
    found = {read.path: read for read in reversed(trace.reads)}
    assert found[b"f07"].at < found[b"f03"].at
    assert found[b"f07"].waited > 0 and trace.requests
    offsets = {read.offset for read in trace.reads if read.path == b"f07"}
    assert offsets == {0, 1 << 16}


# -- learned, and fetched ahead the next time


def ranges(registry: FakeRegistry, digest: str) -> int:
    return registry.count("GET", f"/blobs/{digest}")


def traced(node: Node) -> dict[str, Any]:
    """Return what the status says of the trace of the one mount."""
    found: dict[str, Any] = node.status()["mounts"][0]["trace"]
    return found


def learn(node: Node, image: AddedImage, *names: str) -> Path:
    """Start an image that reads these files; return the file of the trace that the node has learned."""
    tree = node.mount(image)
    for name in names:
        assert node.read(tree / name) == FILES[name]
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends with what it has learned")
    return node.root / "traces" / image.digest.removeprefix("sha256:")


def empty_store(node: Node) -> None:
    """Forget everything of the images but their traces."""
    for name in os.listdir(node.root):
        if name != "traces":
            path = node.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


WANTED = [f"f{number:02}" for number in (3, 17, 4, 5, 6, 12)]


def fetched_ahead(node: Node, registry: FakeRegistry, image: AddedImage, source: str) -> None:
    """Mount an image from an empty store: what is in its trace comes in few ranges, unasked for."""
    registry.clear_log()
    tree = node.mount(image)
    until(lambda: traced(node)["bytes"] >= len(WANTED) * 100_000, "all that the trace tells of was asked for")
    until(lambda: node.layer()["present"] >= len(WANTED) * 100_000, "it is here")
    assert traced(node)["source"] == source
    before = ranges(registry, image.layers[0])
    assert before <= 6  # the tail, and few ranges for 12 chunks in 4 places
    for name in WANTED:
        assert node.read(tree / name) == FILES[name]
    assert ranges(registry, image.layers[0]) == before
    assert node.layer()["bytes"]["demand"] == 0


def test_the_next_cold_start_fetches_what_was_learned(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"DRIVER": "fuse", "PREFETCH": "1"}
    image = add(registry, "one", layer())
    path = learn(node, image, *WANTED)
    trace = decode(path.read_bytes())
    assert (trace.manifest, trace.layers) == (image.digest, image.layers)
    assert [name.decode() for name in paths(trace)] == WANTED
    assert not trace.requests and all(read.waited == 0 for read in trace.reads)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    empty_store(node)
    learn(node, image, WANTED[0])  # nothing new
    assert decode(path.read_bytes()) == trace
    empty_store(node)
    fetched_ahead(node, registry, image, "node")
    assert registry.count("GET", "/referrers/") == 0  # the node knows better
    assert registry.bytes_sent("/blobs/") < len(WANTED) * 2 * (1 << 16) + 200_000


def test_another_command_of_an_image_is_learned_too(node: Node, registry: FakeRegistry) -> None:
    node.settings["DRIVER"] = "erofs"
    image = add(registry, "one", layer())
    learn(node, image, "f03")
    empty_store(node)
    trace = decode(learn(node, image, "f03", "f08", "f09", "f10").read_bytes())
    assert {name.decode() for name in paths(trace)} == {"f03", "f08", "f09", "f10"}


def test_chains_learn_and_fetch_ahead_too(node: Node, registry: FakeRegistry) -> None:
    """As containerd has them shown: a trace of its starts is one of the image, whoever shows it."""
    node.settings["PREFETCH"] = "1"
    image = add(registry, "one", layer("x"), layer())
    path = node.root / "traces" / image.digest.removeprefix("sha256:")
    with running(node) as client:
        layers = client.resolve(image)
        chain = client.mount(image, layers)
        assert node.read(Path(chain["lowerdirs"][0]) / "f07") == FILES["f07"]
        assert client.mount(image, layers)["chain"] == chain["chain"]  # a second container
        client.call("unmount_chain", chain=chain["chain"])
        until(path.exists, "what was learned is saved")
        trace = decode(path.read_bytes())
        assert trace.layers == image.layers and {(read.path, read.layer) for read in trace.reads} == {(b"f07", 1)}
        client.call("remove_layers", digests=[layer["digest"] for layer in layers])
        assert path.exists()
        stuck = registry.fault(Fault.BLACK_HOLE, path=f"/blobs/{image.layers[1]}", after=1)  # behind the TOC
        pulled = client.resolve(image)
        until(lambda: stuck.hits > 0, "it is being fetched before its container")
        gone = client.call("remove_layers", digests=[layer["digest"] for layer in layers])
        assert sorted(gone["removed"]) == sorted(image.layers), "that keeps nobody from removing it"
        registry.clear_faults()
        registry.clear_log()
        pulled = client.resolve(image)
        until(lambda: registry.bytes_sent(f"/blobs/{image.layers[1]}") >= 100_000, "it is fetched before its container")
        client.mount(image, pulled)
        until(lambda: traced(node)["bytes"] >= 100_000, "the mount tells of it")
        assert traced(node)["source"] == "node"


def test_the_trace_goes_before_the_landmark(node: Node, registry: FakeRegistry) -> None:
    node.settings["PREFETCH"] = "1"
    front = file("front", pattern(1_000_000, 99))
    rest = [file(name, data) for name, data in FILES.items()]
    tar = tar_of(front, file(LANDMARK, LANDMARK_CONTENT), *rest)
    blob = zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16)
    image = add(registry, "one", blob)
    told = encode(Trace(image.digest, image.layers, (Read(b"f17", 0, 0, 100_000),)))
    (node.root / "traces").mkdir(mode=0o700, parents=True)
    node.root.chmod(0o700)
    (node.root / "traces" / image.digest.removeprefix("sha256:")).write_bytes(told)
    node.mount(image)
    until(lambda: node.layer()["present"] >= 1_100_000, "both are fetched ahead")
    asked = [request.range.removeprefix("bytes=") for request in registry.requests if blob.digest in request.path]
    starts = [start for start in (int(each.partition("-")[0]) for each in asked) if start < blob.payload_end]
    assert starts[0] > 1_000_000 and 0 in starts


def test_a_trace_of_the_registry_is_fetched_and_kept(node: Node, registry: FakeRegistry) -> None:
    node.settings["PREFETCH"] = "1"
    registry.referrers = True
    image = add(registry, "one", layer())
    artifact = attached(registry, image, *[Read(name.encode(), 0, 0, 100_000) for name in WANTED])
    fetched_ahead(node, registry, image, "registry")
    node.mount(image)
    assert registry.count("GET", artifact) == 0  # it rode in the list
    assert registry.count("GET", "/referrers/") == 1  # for both
    node.stop()
    kept = decode((node.root / "traces" / image.digest.removeprefix("sha256:")).read_bytes())
    assert {name.decode() for name in paths(kept)} == set(WANTED)


def test_a_trace_that_only_a_tag_lists_is_fetched_first(node: Node, registry: FakeRegistry) -> None:
    """A registry without the referrers API: what `lazyfs optimize` left there is found by a node without the image."""
    node.settings["PREFETCH"] = "1"
    image = add(registry, "one", layer())
    told = node.place / "told"
    told.write_bytes(encode(Trace(image.digest, image.layers, tuple(Read(n.encode(), 0, 0, 100_000) for n in WANTED))))
    done = node.lazyfs("optimize", image.reference, told)
    assert done.returncode == 0, done.stderr
    assert not (node.root / "traces").exists()
    fetched_ahead(node, registry, image, "registry")
    asked = [request.path for request in registry.requests]
    tag = asked.index(f"/v2/one/manifests/{fallback_tag(image.digest)}")
    refused, *_ = registry.matching(path="/referrers/")
    assert refused.status == 404 and asked.index(refused.path) < tag
    assert registry.count(path=fallback_tag(image.digest)) == 1  # the trace rides in the list
    behind = [request for request in registry.requests[tag:] if request.path.endswith(image.layers[0])]
    assert sum(request.sent for request in behind) >= len(WANTED) * 100_000  # all that it tells of, once it was known


def attached(registry: FakeRegistry, image: AddedImage, *reads: Read, layers: tuple[str, ...] = ()) -> str:
    """Attach a trace to an image in the registry. Return the artifact's digest."""
    with_layers = layers or image.layers
    repository = open_repository(parse(image.reference), OpenOptions())
    subject = Descriptor(OCI_MANIFEST, image.digest, len(image.raw))
    artifact = traces.attach(repository, subject, Trace(image.digest, with_layers, reads))
    repository.close()
    return artifact.digest


def test_hostile_traces_harm_nothing_and_delay_nothing(node: Node, registry: FakeRegistry) -> None:
    node.settings["PREFETCH"] = "1"
    registry.referrers = True
    image, other = add(registry, "one", layer()), add(registry, "other", layer("x"))
    huge = [Read(name.encode(), 0, number << 16, 1 << 61) for name in FILES for number in range(2000)]
    attached(registry, image, *[Read(b"none/such", 0, 1 << 60, 1 << 61), Read(b"f00", 0, 1 << 61, 5)], *huge)
    path = node.root / "traces" / other.digest.removeprefix("sha256:")
    path.parent.mkdir(parents=True, mode=0o700)
    node.root.chmod(0o700)
    path.write_bytes(encode(Trace(image.digest, image.layers, (Read(b"f00", 0, 0, 1),))))  # another image's
    trees = [node.mount(image), node.mount(other)]
    assert node.read(trees[0] / "f19") == FILES["f19"]
    assert node.read(trees[1] / "f19x") == FILES["f19"]
    until(lambda: node.status()["mounts"][0]["layers"][0]["complete"], "the enormous one has fetched all there is")
    assert registry.bytes_sent(f"/blobs/{image.layers[0]}") <= len(registry.blobs[image.layers[0]]) + 200_000
    assert not path.exists()  # removed and ignored
    assert node.status()["mounts"][1]["trace"] == {"source": "none", "bytes": 0}


def test_a_registry_that_hangs_on_referrers_delays_nothing(node: Node, registry: FakeRegistry) -> None:
    node.settings["PREFETCH"] = "1"
    image = add(registry, "one", layer())
    registry.fault(Fault.BLACK_HOLE, path="/referrers/")
    tree = node.mount(image)
    assert node.read(tree / "f00") == FILES["f00"]
    assert traced(node)["source"] == "none"
    order = [request.path for request in registry.requests]
    asked = next((number for number, path in enumerate(order) if "/referrers/" in path), None)
    assert asked is None or asked > next(number for number, path in enumerate(order) if "/manifests/" in path)


def test_settings_say_whether_traces_are_learned_and_fetched(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"PREFETCH": "1", "TRACE": "0", "LEARN": "0"}
    image = add(registry, "one", layer())
    path = learn(node, image, "f03")
    assert not path.exists() and registry.count("GET", "/referrers/") == 0
    path.parent.mkdir(0o700)
    path.write_bytes(encode(Trace(image.digest, image.layers, (Read(b"f17", 0, 0, 100_000),))))
    tree = node.mount(image)
    assert node.read(tree / "f05") == FILES["f05"]
    assert traced(node) == {"source": "none", "bytes": 0}
    assert node.layer()["bytes"]["prefetch"] == 0


def test_what_is_whole_needs_no_learning_and_its_removal_drops_the_trace(node: Node, registry: FakeRegistry) -> None:
    node.settings["PREFETCH"] = "1"
    image = add(registry, "one", layer())
    assert node.lazyfs("fetch", image.reference).returncode == 0
    registry.clear_log()
    path = learn(node, image, "f04")
    assert not path.exists() and registry.count("GET", "/referrers/") == 0
    path.parent.mkdir(0o700, exist_ok=True)
    path.write_bytes(encode(Trace(image.digest, image.layers, ())))
    done = node.lazyfs("cache", "rm", image.reference)
    assert done.returncode == 0, done.stderr
    assert not path.exists()


def test_a_disk_smaller_than_the_image(node: Node, registry: FakeRegistry) -> None:
    """More than the disk holds is in the trace: reads are served, and what was fetched ahead stays within bounds."""
    with tmpfs(node.root, 1_200_000):
        node.settings["PREFETCH"] = "1"
        image = add(registry, "one", layer())
        (node.root / "traces").mkdir(0o700)
        told = Trace(image.digest, image.layers, tuple(Read(name.encode(), 0, 0, 100_000) for name in FILES))
        (node.root / "traces" / image.digest.removeprefix("sha256:")).write_bytes(encode(told))
        tree = node.mount(image)
        for name, data in FILES.items():
            assert node.read(tree / name) == data
        assert traced(node)["source"] == "node"
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends")


def test_no_reader_waits_for_the_rate_of_prefetch(node: Node, registry: FakeRegistry) -> None:
    """Some of what he reads was asked for before the mount and waits for its turn, some has not been asked for."""
    files = {f"f{number:02}": pattern(200_000, number) for number in range(60)}
    tar = tar_of(*(file(name, data) for name, data in files.items()))
    image = add(registry, "one", zstd_chunked_layer(tar, chunk_size=1 << 16, frame_size=1 << 16))
    tree = node.mount(image)
    for name, data in files.items():
        assert node.read(tree / name) == data
    node.umount(tree)
    until(lambda: not node.processes(), "the daemon ends with what it has learned")
    kept = decode((node.root / "traces" / image.digest.removeprefix("sha256:")).read_bytes())
    assert len(kept.spans) >= 5
    empty_store(node)
    node.settings |= {"PREFETCH": "1", "PREFETCH_RATE": "65536", "READ_TIMEOUT": "600", "LEARN": "0"}
    tree = node.mount(image)
    for name in ("f25", "f59"):  # their turns are after one minute and after three
        assert node.read(tree / name) == files[name]
    assert traced(node)["source"] == "node"
    assert node.layer()["present"] < 10_000_000, "of twelve, the rest waits for its turn"


def test_a_full_disk_keeps_what_was_read(node: Node, registry: FakeRegistry) -> None:
    """The check of the whole image, and what its trace tells of, push out nothing that a reader has had."""
    with tmpfs(node.root, 1_200_000):
        node.settings |= {"LEARN": "0", "MEMORY_SIZE": "0"}
        image = add(registry, "one", layer())
        wanted = ("f03", "f15")
        learn(node, image, *wanted)  # nothing is learned, but the two files are here
        (node.root / "traces").mkdir(0o700, exist_ok=True)
        told = Trace(image.digest, image.layers, tuple(Read(name.encode(), 0, 0, 100_000) for name in FILES))
        (node.root / "traces" / image.digest.removeprefix("sha256:")).write_bytes(encode(told))
        node.settings |= {"PREFETCH": "1", "BACKGROUND": "1", "READ_TIMEOUT": "30"}
        tree = node.mount(image)
        until(lambda: node.layer()["verified"], "the whole check has ended", 30)
        state = node.layer()
        assert 200_000 < state["present"] < len(FILES) * 100_000 and not state["complete"], "the disk was full"
        sent = registry.bytes_sent(f"/blobs/{image.layers[0]}")
        for name in wanted:
            assert node.read(tree / name) == FILES[name]
        assert registry.bytes_sent(f"/blobs/{image.layers[0]}") == sent
        node.umount(tree)
        until(lambda: not node.processes(), "the daemon ends")
