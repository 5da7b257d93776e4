"""What a node learns of starts stays its own, whatever a registry says; and what registries say is soon forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.chunks.census import Census
from lazyfs.chunks.layer import ServedLayer
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.errors import LazyfsError, RegistryUnreachable
from lazyfs.format.trace import Read, Trace
from lazyfs.limits import MAX_READS
from lazyfs.mount import answers as answers_module
from lazyfs.mount.answers import Answers, Find
from lazyfs.mount.plan import credible
from lazyfs.mount.starts import Starts
from lazyfs.registry.offline import OfflineRepository
from lazyfs.registry.repository import Repository
from tests.helpers.blobs import zstd_chunked_layer
from tests.helpers.chunk_tables import noise
from tests.helpers.fake_registry import FakeRegistry
from tests.helpers.served import Node, node
from tests.helpers.tars import dir_, file, hardlink, symlink, tar_of

CHUNK = 16 << 10
NAMES = [b"d/f%02d" % number for number in range(8)]
BLOB = zstd_chunked_layer(
    tar_of(
        dir_("d"),
        *(file(name, noise(name, CHUNK)) for name in NAMES),
        file("big", noise("big", 4 * CHUNK)),
        hardlink("link", "d/f00"),
        symlink("sym", "d/f01"),
    ),
    chunk_size=CHUNK,
    frame_size=CHUNK,
)
MANIFEST, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
DEADLINE = 10  # seconds


def starts_of(one: Node, root: Path, find: Find) -> Starts:
    nothing = cast(Census, SimpleNamespace(store=SimpleNamespace(table_path=lambda digest: root / "none")))
    config = Settings(root, root / "run")
    return Starts(config, TraceFiles(root), nothing, one.remote, one.scheduler, one.nursery, find, one.errors.append)


async def learned(one: Node, starts: Starts, layer: ServedLayer, root: Path, *names: bytes) -> Trace:
    """Start an image that reads these files; return what the node keeps of that."""
    start = starts.begin(layer.repository, MANIFEST, [layer.digest], whole=True)
    starts.mounted(start, [layer])
    with trio.fail_after(DEADLINE):
        await starts.until_over(start)
        await start.over.wait()
        for name in names:
            await one.read(layer, name)
        await starts.close()
    kept = TraceFiles(root).load(MANIFEST)
    assert kept is not None
    return kept


async def test_invented_reads_don_t_keep_a_node_from_learning(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        there = Read(NAMES[7], 0, 0, CHUNK)
        invented = tuple(Read(b"x%d" % number, 0, 0, 1) for number in range(MAX_READS - 1))
        hostile = Trace(MANIFEST, (layer.digest,), (there, *invented))
        starts = starts_of(one, scratch, lambda *_: hostile)
        kept = await learned(one, starts, layer, scratch, *NAMES[:3])
        assert {read.path for read in kept.reads} == {*NAMES[:3], NAMES[7]}


async def test_a_node_that_has_kept_invented_reads_gets_rid_of_them(scratch: Path, registry: FakeRegistry) -> None:
    async with node(scratch) as one:
        layer = one.serve(BLOB, registry)
        TraceFiles(scratch).save(
            Trace(MANIFEST, (layer.digest,), tuple(Read(b"x%d" % number, 0, 0, 1) for number in range(1000)))
        )
        kept = await learned(one, starts_of(one, scratch, lambda *_: None), layer, scratch, *NAMES[:3])
        assert [read.path for read in kept.reads] == NAMES[:3]


@pytest.fixture(scope="module")
def plan_layer(module_scratch: Path) -> Iterator[ServedLayer]:
    with FakeRegistry() as registry:
        one = Node(module_scratch, cast(trio.Nursery, None), read_timeout=1.0, memory=0, connections=4)
        yield one.serve(BLOB, registry, check=False)
        one.close()


TOLD = st.lists(
    st.builds(
        Read,
        st.sampled_from([*NAMES[:2], b"big", b"link", b"sym", b"d", b"", b"none/at/all"]),
        st.integers(0, 1),
        st.one_of(st.integers(0, 5 * CHUNK), st.just(1 << 61)),
        st.one_of(st.integers(0, 5 * CHUNK), st.just(1 << 61)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=TOLD)
def test_a_trace_is_believed_to_tell_of_each_chunk_once(plan_layer: ServedLayer, told: list[Read]) -> None:
    whole = Trace(MANIFEST, (plan_layer.digest, OTHER), tuple(told))
    kept = credible(whole, [plan_layer])
    ours = [read for read in kept.reads if read.layer == 0]
    assert len(ours) <= plan_layer.table.chunk_count
    assert {read.path for read in ours} <= {*NAMES, b"big", b"link"}
    assert [read for read in kept.reads if read.layer] == [read for read in told if read.layer]
    assert credible(kept, [plan_layer]) == kept
    for read in told:
        if read.path in NAMES and read.layer == 0 and read.offset < CHUNK and read.size:
            assert any(each.path in (read.path, b"link") for each in ours)


# -- what registries say


TOLD_OF = Trace(MANIFEST, (OTHER,), (Read(b"a", 0, 0, 1),))


def repository(host: str, name: str = "app") -> Repository:
    return cast(Repository, SimpleNamespace(host=host, name=name))


async def test_what_one_registry_does_not_have_another_may(nursery: trio.Nursery) -> None:
    asked = []

    def find(where: Repository, *_: object) -> Trace | None:
        asked.append((where.host, where.name))
        return TOLD_OF if where.host == "good" else None

    answers = Answers(find, nursery, lambda error: None)
    for _ in range(2):
        assert await answers.ask(repository("bad"), MANIFEST, None) is None
        assert await answers.ask(repository("good"), MANIFEST, None) == TOLD_OF
        assert await answers.ask(repository("good", "other"), MANIFEST, None) == TOLD_OF
        assert await answers.ask(OfflineRepository("good", "app"), MANIFEST, None) is None
    assert asked == [("bad", "app"), ("good", "app"), ("good", "other")]


async def test_answers_are_forgotten_when_nobody_asks_again(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_AGAIN", 0.05)
    answers = Answers(lambda *_: TOLD_OF, nursery, lambda error: None)
    for host in ("one", "two"):
        await answers.ask(repository(host), MANIFEST, None)
        assert len(answers)
        with trio.fail_after(DEADLINE):
            while len(answers):
                await trio.sleep(0.005)
    assert answers.size == 0


async def test_answers_have_a_bound_in_bytes(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_ANSWER_BYTES", 100_000)
    long = replace(TOLD_OF, reads=tuple(Read(b"%04d" % number + b"/x" * 1000, 0, 0, 1) for number in range(20)))
    answers = Answers(lambda where, *_: long if where.name == "app" else TOLD_OF, nursery, lambda error: None)
    for host in range(5):
        await answers.ask(repository(f"r{host}"), MANIFEST, None)
        assert 40_000 < answers.size <= 100_000
    assert len(answers) == 2
    many = Answers(lambda *_: None, nursery, lambda error: None)
    for host in range(100):
        await many.ask(repository(f"r{host}"), MANIFEST, None)
    assert len(many) == 64


async def test_a_registry_that_fails_is_counted_and_no_more(nursery: trio.Nursery) -> None:
    errors: list[LazyfsError] = []

    def find(*_: object) -> Trace | None:
        raise RegistryUnreachable("r", "gone")

    assert await Answers(find, nursery, errors.append).ask(repository("r"), MANIFEST, None) is None
    assert len(errors) == 1
