"""A chain whose mount takes longer than its caller's time: the caller is answered, and nothing stays behind."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pytest
import trio

from lazyfs import reference as references
from lazyfs.errors import RegistryTimeout
from lazyfs.mount.apart import Apart
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.chains import Chains
from lazyfs.mount.forest import Forest
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.keeping import Keeping
from lazyfs.mount.planting import Planting
from lazyfs.mount.reachable import Reachable
from lazyfs.mount.showing import Showing
from lazyfs.mount.starts import Starts
from lazyfs.registry.offline import OfflineRepository


class Parts:
    """What a chain needs, without a tree or a kernel; `done` notes what happened."""

    elsewhere = ""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.done: list[str] = []

    def begin(self, *_: object, whole: bool) -> str:
        return "start"

    def mounted(self, *_: object) -> None: ...

    def end(self, start: str) -> None: ...

    async def hold_all(self, *_: object) -> list[object]:
        return []

    async def check(self, *_: object) -> None:
        await trio.lowlevel.checkpoint()

    async def plant(self, *_: object) -> str:
        await trio.lowlevel.checkpoint()
        return "planted"

    async def release(self, planted: object) -> None:
        self.done.append(f"released {planted}")

    async def show(self, planted: object, driver: None) -> str:
        await trio.to_thread.run_sync(self.gate.wait, 20)  # a child builds, and its thread can't be left
        self.done.append(f"shown {planted}")
        return "shown"

    async def hide(self, planted: object, shown: object) -> None:
        self.done.append(f"hidden {planted}")


async def test_the_caller_is_answered_in_its_time_and_what_comes_late_is_taken_back() -> None:
    parts: Any = Parts()
    reference = references.parse("registry.invalid/app")
    source = ChainSource(reference, OfflineRepository("registry.invalid", "app"), time.monotonic() + 0.1)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            chains = Chains(
                cast(ChainLayers, parts), cast(Keeping, parts), cast(Reachable, parts), cast(Planting, parts),
                cast(Forest, parts), Apart(nursery), cast(Showing, parts), cast(Starts, parts),
                Inheritance(None),
            )  # fmt: skip
            with pytest.raises(RegistryTimeout, match="in time"):
                await chains.mount(source, "", [])
            assert parts.done == [] and len(chains) == 0
            parts.gate.set()
    assert parts.done == ["shown planted", "hidden planted", "released planted"] and len(chains) == 0
