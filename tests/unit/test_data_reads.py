"""Reads of a data space end before the mount that made them is taken away."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lazyfs.chunks.data_reads import DataReads
from lazyfs.errors import MountFailed


async def bytes_after(come: trio.Event) -> bytes:
    await come.wait()
    return b"bytes"


async def test_what_nobody_else_wants_ends_at_once() -> None:
    reads = DataReads()
    refused = []

    async def read() -> None:
        with pytest.raises(MountFailed, match="being taken away"):
            await reads.run(bytes_after(trio.Event()))
        refused.append(True)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await reads.end(shared=False)
        assert len(refused) == 3
        await reads.end(shared=False)  # nothing is left


async def test_what_others_may_want_is_waited_for_and_later_reads_are_not() -> None:
    reads, come, never = DataReads(), trio.Event(), trio.Event()
    got = []

    async def read(event: trio.Event) -> None:
        got.append(await reads.run(bytes_after(event)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, come)
        await wait_all_tasks_blocked()
        ended = trio.Event()

        async def end() -> None:
            await reads.end(shared=True)
            ended.set()

        nursery.start_soon(end)
        await wait_all_tasks_blocked()
        nursery.start_soon(read, never)
        assert not ended.is_set()
        come.set()
        await ended.wait()
        assert got == [b"bytes"]
        nursery.cancel_scope.cancel()


async def test_a_failure_is_the_readers_own() -> None:
    async def fails() -> bytes:
        raise OSError("disk")

    reads = DataReads()
    with pytest.raises(OSError, match="disk"):
        await reads.run(fails())
    await reads.end(shared=False)
