"""Chains: what a snapshotter has the daemon do. Made ready side by side, shown, let go, and removed without a rest."""

from __future__ import annotations

import gzip
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazyfs import oci
from lazyfs.digest import of
from lazyfs.errors import LayerQuarantined, LazyfsError, ManifestMissing, RegistryTimeout
from tests.helpers.blobs import LayerBlob, annotated, zstd_chunked_layer
from tests.helpers.chains import Snapshotter, mount_args, resolve_args, running, told
from tests.helpers.daemon import Node, add, until
from tests.helpers.fake_registry import AddedImage, FakeRegistry, Fault
from tests.helpers.pattern import pattern
from tests.helpers.tars import file, tar_of

Layers = list[dict[str, Any]]


def lazy(number: int, size: int = 150_000) -> LayerBlob:
    return zstd_chunked_layer(tar_of(file(f"file{number}", pattern(size, number))))


def plain(name: str, size: int) -> bytes:
    return gzip.compress(tar_of(file(name, pattern(size, size))), mtime=0)


def shown(chain: dict[str, Any]) -> Path:
    return Path(chain["lowerdirs"][0])


def summary(layers: Layers) -> list[tuple[bool, bool]]:
    return [(layer["ready"], layer["lazy"]) for layer in layers]


def left(node: Node) -> list[str]:
    """Return all that a store still has of images."""
    found = [str(path) for top in ("layers/sha256", "trees") for path in (node.root / top).glob("*")]
    with sqlite3.connect(f"file:{node.root}/catalog.db?mode=ro", uri=True) as catalog:
        for table in ("documents", "resolved", "layers", "chunk_places", "indexed", "pinned"):
            count = catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            found += [f"{count} rows of {table}"] if count else []
    catalog.close()
    return found


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run calls side by side, and return what they returned or raised."""
    found: dict[int, Any] = {}

    def run(number: int, job: Callable[[], Any]) -> None:
        try:
            found[number] = job()
        except LazyfsError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number, job)) for number, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[number] for number in range(len(jobs))]


def remove(client: Snapshotter, layers: Layers) -> dict[str, Any]:
    return client.call("remove_layers", digests=[layer["digest"] for layer in layers])


def test_the_life_of_a_chain(node: Node, registry: FakeRegistry) -> None:
    node.settings["BACKGROUND"] = "1"
    small, large = plain("small", 1000), plain("large", 300_000)
    image = add(registry, "app", lazy(1), lazy(2), small, large)
    index = registry.add_index("app", "index", {oci.host_platform(): image})
    with running(node) as client:
        layers = client.resolve(image)
        assert summary(layers) == [(True, True), (True, True), (True, False), (False, False)]
        assert "no TOC" in layers[2]["reason"] and "no TOC" in layers[3]["reason"]
        assert registry.count(path=of(large)) == 0
        assert [layer["chain_id"] for layer in layers] == oci.chain_ids(tuple(layer["diff_id"] for layer in layers))
        before = len(registry.requests)
        assert client.resolve(image) == layers
        assert len(registry.requests) == before  # all of it is known
        assert client.resolve(image, digest=index) == layers
        assert len(registry.requests) == before + 2  # the index, and what it leads to

        chain = client.mount(image, layers[:3])
        with client.again() as other:
            assert other.call("mount_chain", **mount_args(image, layers[:3])) == chain
        assert chain["root"] == {"mode": 0o755, "uid": 0, "gid": 0}
        assert node.read(shown(chain) / "file2") == pattern(150_000, 2)
        base = client.mount(image, layers[:1])
        assert node.python("print(json.dumps(os.listdir(a[0])))", shown(base)) == ["file1"]
        listed = {each["chain"]: each for each in client.call("chains")["chains"]}
        assert set(listed) == {chain["chain"], base["chain"]}
        assert listed[chain["chain"]]["layers"] == [layer["digest"] for layer in layers[:3]]
        mounts = {each["mount"]: each for each in node.status()["mounts"]}
        assert mounts[chain["chain"]]["kind"] == "chain" and len(mounts[chain["chain"]]["layers"]) == 3
        assert "for the snapshotter" in node.lazyfs("status").stdout
        until(lambda: all(layer["verified"] for layer in node.status()["mounts"][0]["layers"]), "all is checked")
        usage = client.call("layer_usage", digests=[layer["digest"] for layer in layers])["usage"]
        assert usage[layers[0]["digest"]]["size"] >= 150_000 and usage[layers[0]["digest"]]["inodes"] > 4
        assert usage[layers[3]["digest"]] == {"size": 0, "inodes": 0}

        assert remove(client, layers)["removed"] == []
        client.call("unmount_chain", chain=chain["chain"])
        client.call("unmount_chain", chain=chain["chain"])
        assert node.read(shown(base) / "file1") == pattern(150_000, 1)
        answer = remove(client, layers)
        assert set(answer["removed"]) == {layers[1]["digest"], layers[2]["digest"]}
        assert answer["kept"] == {layers[0]["digest"]: "it is in use"} and answer["freed"] > 150_000
        client.call("unmount_chain", chain=base["chain"])
        assert remove(client, layers)["kept"] == {}
        assert left(node) == []


def test_all_of_an_image_is_asked_for_at_once_and_only_once(node: Node, registry: FakeRegistry) -> None:
    node.settings["ANSWER_TIMEOUT"] = "20"  # a second is short on a busy machine, and then the manifest is asked twice
    image = add(registry, "app", *(lazy(number, 2000) for number in range(10)))
    registry.fault(Fault.BLACK_HOLE, path="/blobs/", times=11)

    def let_go() -> None:
        registry.wait_for(11, path="/blobs/", timeout=30)  # config and tails, before any of them has come
        registry.clear_faults()

    with running(node) as client:
        with client.again() as other:
            both: list[Callable[[], Any]] = [
                lambda: client.resolve(image, deadline=30),
                lambda: other.call("resolve_chain", **resolve_args(image, deadline=30)),
                let_go,
            ]
            first, second, _ = at_once(*both)
        assert summary(first) == [(True, True)] * 10 and second["layers"] == first
        assert registry.count(path="/manifests/") == 1
        # Those that were let go without an answer were asked for again.
        assert all(registry.count(path=digest) == 2 for digest in (image.config, *image.layers))
        client.mount(image, first)
        assert registry.count(path="/blobs/") == 22


def test_a_layer_that_is_slow_holds_up_none_below_it(node: Node, registry: FakeRegistry) -> None:
    node.settings["ANSWER_TIMEOUT"] = "20"
    image = add(registry, "app", *(lazy(number, 2000) for number in range(4)))
    registry.fault(Fault.BLACK_HOLE, path=image.layers[2])
    with running(node) as client:
        layers = client.resolve(image, until="sha256:" + "00" * 32)  # of none: as soon as the layers are known
        chain_ids = [layer["chain_id"] for layer in layers]
        layers = client.resolve(image, until=chain_ids[1])
        assert summary(layers[:2]) == [(True, True)] * 2
        assert [layer["settled"] for layer in layers] == [True, True, False, layers[3]["settled"]]
        assert client.resolve(image, until=chain_ids[0])[0] == layers[0]
        with client.again() as other:
            _, whole, upper = at_once(
                registry.clear_faults,
                lambda: client.resolve(image),
                lambda: other.call("resolve_chain", **resolve_args(image, until=chain_ids[3])),
            )
        assert summary(whole) == summary(upper["layers"]) == [(True, True)] * 4
        assert registry.count(path="/manifests/") == 1
        assert [registry.count(path=digest) for digest in image.layers] == [1, 1, 2, 1]  # once more after the fault


def test_what_does_not_come_in_time_is_not_ready_and_holds_up_nobody(node: Node, registry: FakeRegistry) -> None:
    node.settings["ANSWER_TIMEOUT"] = "20"
    image = add(registry, "app", lazy(1), lazy(2), plain("small", 500))
    for digest in image.layers[1:]:
        registry.fault(Fault.BLACK_HOLE, path=digest)
    registry.fault(Fault.BLACK_HOLE, path="/silent/")
    with FakeRegistry() as good, running(node) as client, client.again() as second, client.again() as third:
        other = add(good, "other", lazy(1), lazy(3))

        def missing() -> Any:
            return client.resolve(other.reference.replace("other", "nowhere"))

        layers, silent, fine = at_once(
            lambda: client.resolve(image, deadline=2),
            lambda: second.call(
                "resolve_chain", image=f"{registry.host}/silent/app", manifest_digest="", small=0, deadline=1
            ),
            lambda: third.call("resolve_chain", image=other.reference, manifest_digest="", small=0, deadline=20),
        )
        assert summary(layers) == [(True, True), (False, False), (False, False)]
        assert "in time" in layers[1]["reason"] and "in time" in layers[2]["reason"]
        assert isinstance(silent, RegistryTimeout) and "silent" in str(silent)
        assert summary(fine["layers"]) == [(True, True)] * 2
        with pytest.raises(ManifestMissing):
            missing()
        with pytest.raises(RegistryTimeout, match="in time"):
            client.mount(image, layers, deadline=1)
        assert client.mount(other, fine["layers"])["chain"]
        registry.clear_faults()
        chain = client.mount(image, layers)
        assert node.read(shown(chain) / "file2") == pattern(150_000, 2)


def test_layers_of_others_are_ready_once_they_were_checked(node: Node, registry: FakeRegistry) -> None:
    node.settings["LAZY_FROM"] = "*/trusted"
    honest, slow = lazy(1, 400_000), lazy(2, 400_000)
    image = add(registry, "stranger", honest, slow)
    registry.fault(Fault.BLACK_HOLE, path=slow.digest, after=1)  # its TOC comes, and nothing else
    with running(node) as client:
        layers = client.resolve(image, deadline=4)
        assert summary(layers) == [(True, True), (False, False)]
        assert "not checked in full in time" in layers[1]["reason"]
        assert registry.bytes_sent(honest.digest) >= 400_000
        registry.clear_faults()
        assert summary(client.resolve(image)) == [(True, True)] * 2
        trusted = add(registry, "trusted", lazy(3, 400_000))
        assert summary(client.resolve(trusted)) == [(True, True)]
        assert registry.bytes_sent(trusted.layers[0]) < 10_000
        chain = client.mount(image, layers)
        assert all(layer["verified"] for layer in node.status()["mounts"][0]["layers"])
        client.call("unmount_chain", chain=chain["chain"])
        assert remove(client, [*layers, *client.resolve(trusted)])["kept"] == {}
        assert left(node) == []


@pytest.mark.parametrize("trusted", [True, False])
def test_an_image_that_declares_another_ones_diff_ids(node: Node, registry: FakeRegistry, trusted: bool) -> None:
    node.settings |= {"BACKGROUND": "1", "LAZY_FROM": "*" if trusted else "*/honest"}
    honest, false = lazy(1), lazy(2)
    good = add(registry, "honest", honest)
    liar = add(registry, "liar", false, rootfs={"type": "layers", "diff_ids": [honest.diff_id]})
    with running(node) as client:
        layers = client.resolve(liar)
        assert layers[0]["chain_id"] == honest.diff_id  # the chain that it wants to own
        if trusted:
            assert summary(layers) == [(True, True)]
            client.mount(liar, layers)
            until(lambda: node.layer()["quarantine"], "the check finds it false")
        else:
            assert summary(layers) == [(False, False)]
            assert "diff ID" in layers[0]["reason"]
        with pytest.raises(LayerQuarantined):
            client.mount(liar, layers)
        assert summary(client.resolve(liar)) == [(False, False)]
        chain = client.mount(good, client.resolve(good))
        assert node.read(shown(chain) / "file1") == pattern(150_000, 1)


@pytest.mark.parametrize("by", ["its diff ID", "its registry"])
def test_a_layer_that_is_shown_as_a_false_one_is_there_for_honest_images(
    node: Node, registry: FakeRegistry, by: str
) -> None:
    node.settings["BACKGROUND"] = "1"
    blob = lazy(1)
    with FakeRegistry() as other, running(node) as client:
        if by == "its registry":
            liar = add(other, "liar", blob)
            other.fault(Fault.FLIP, path=blob.digest, after=1)  # its TOC is right
        else:
            liar = add(other, "liar", blob, rootfs={"type": "layers", "diff_ids": [of(b"false")]})
        good = add(registry, "honest", blob)
        records = told(liar, [of(b"false") if by == "its diff ID" else blob.diff_id])
        false = client.mount(liar, records)
        until(lambda: node.layer()["quarantine"], "the check finds it false", 60)
        honest = client.mount(good, told(good, [blob.diff_id]))
        assert honest["chain"] != false["chain"]
        assert node.read(shown(honest) / "file1") == pattern(150_000, 1)
        assert "Input/output error" in node.read_fails(shown(false) / "file1")
        client.call("unmount_chain", chain=false["chain"])
        assert node.read(shown(honest) / "file1") == pattern(150_000, 1)
        until(lambda: node.layer()["verified"], "the honest one passes")
        assert client.mount(good, told(good, [blob.diff_id])) == honest
        client.call("unmount_chain", chain=honest["chain"])
        assert remove(client, told(good, [blob.diff_id]))["kept"] == {}
        assert left(node) == []


def test_a_layer_of_two_registries_outlives_one_of_them(node: Node, registry: FakeRegistry) -> None:
    node.settings["ANSWER_TIMEOUT"] = "1"
    blob = lazy(1)
    with FakeRegistry() as other, running(node) as client:
        here, there = add(registry, "here", blob, lazy(2)), add(other, "there", blob, lazy(3))
        first = client.mount(here, client.resolve(here))
        last = client.mount(there, client.resolve(there))
        other.fault(Fault.BLACK_HOLE)
        assert node.read(shown(first) / "file1") == pattern(150_000, 1)
        assert node.read(shown(last) / "file1") == pattern(150_000, 1)


def test_the_daemon_ends_while_a_registry_hangs(node: Node, registry: FakeRegistry) -> None:
    node.settings |= {"ANSWER_TIMEOUT": "60", "BACKGROUND": "1"}
    image = add(registry, "app", lazy(1), plain("small", 500), lazy(2))
    registry.fault(Fault.BLACK_HOLE, path="/blobs/")
    with running(node) as client:
        with pytest.raises(RegistryTimeout):
            client.mount(image, told(image, [of(b"1"), of(b"2"), of(b"3")]), deadline=0.5)
        with pytest.raises(RegistryTimeout):
            client.resolve(image, deadline=0.5)


def test_a_toc_that_is_none(node: Node, registry: FakeRegistry) -> None:
    def edit(toc: dict[str, Any]) -> None:
        toc["entries"].append({"name": "../../etc/passwd", "type": "reg", "size": 0})

    tar = tar_of(file("good", pattern(300_000, 4)))
    malformed = zstd_chunked_layer(tar, edit_toc=edit)
    other = annotated(lazy(5), TOC_DIGEST=of(b"another"))
    image = add(registry, "app", malformed, other, rootfs={"type": "layers", "diff_ids": [of(tar), other.diff_id]})
    with running(node) as client:
        client.resolve(image)
        layers = until(
            lambda: (found := client.resolve(image)) and not found[0]["ready"] and found, "its TOC is found malformed"
        )
        assert "entry" in layers[0]["reason"] and not layers[1]["ready"] and "digest" in layers[1]["reason"]
        assert registry.bytes_sent(malformed.digest) < 100_000
        # Whoever has it as a lazy snapshot already gets the right bytes all the same.
        chain = client.mount(image, layers[:1])
        assert node.read(shown(chain) / "good") == pattern(300_000, 4)
        client.call("unmount_chain", chain=chain["chain"])
        assert remove(client, layers)["kept"] == {}
        assert left(node) == []


@pytest.mark.parametrize("name", ["", "gone.invalid/app:latest"])
def test_after_a_restart_complete_chains_need_no_network(node: Node, registry: FakeRegistry, name: str) -> None:
    node.settings["BACKGROUND"] = "1"
    image = add(registry, "app", lazy(1), plain("small", 1000))
    with running(node) as client:
        layers = client.resolve(image)
        chain = client.mount(image, layers)
        node.until_verified()
        assert summary(client.resolve(image)) == [(True, True), (True, False)]
    registry.fault(Fault.BLACK_HOLE)
    before = len(registry.requests)
    records = told(image, [layer["diff_id"] for layer in layers])
    with running(node) as client:
        args = mount_args(image, records) | ({"image": name} if name else {})
        assert client.call("mount_chain", **args) == chain
        assert node.read(shown(chain) / "file1") == pattern(150_000, 1)
        assert len(registry.requests) == before


def test_pinned_layers_stay_and_readers_of_a_chain_that_goes_get_errors(node: Node, registry: FakeRegistry) -> None:
    image = add(registry, "app", lazy(1), lazy(2))
    base: AddedImage = add(registry, "base", lazy(1))
    with running(node) as client:
        assert node.lazyfs("fetch", "--pin", base.reference).returncode == 0
        layers = client.resolve(image)
        chain = client.mount(image, layers)
        reader = node.spawn(
            ["python3", "-c", "import os,sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\nprint(1, flush=True)\n"
             "sys.stdin.readline()\ntry:\n os.read(fd, 9)\nexcept OSError as error: print(error.errno)",
             str(shown(chain) / "file2")], feed=True,
        )  # fmt: skip
        assert reader.stdout is not None and reader.stdin is not None
        assert reader.stdout.readline() == b"1\n"
        client.call("unmount_chain", chain=chain["chain"])
        reader.stdin.write(b"\n")
        out = reader.communicate(timeout=20)[0]
        assert out.strip() in (b"5", b"116"), out  # EIO, ESTALE
        answer = remove(client, layers)
        assert answer["kept"] == {layers[0]["digest"]: "it is pinned"}
        assert answer["removed"] == [layers[1]["digest"]]
        held = json.loads(node.lazyfs("cache", "ls", "--json").stdout)["images"]
        assert [each["digest"] for each in held if each["pinned"]] == [base.digest]
