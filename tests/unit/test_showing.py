"""Which driver shows a tree, and why: what was asked for, what the self-test said, and what one mount made of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazyfs.config import Settings
from lazyfs.container import mounts
from lazyfs.container.mounts import MountPoint
from lazyfs.errors import MountFailed, UsageError
from lazyfs.mount import erofs_mount, erofs_probe
from lazyfs.mount.erofs_mount import Method
from lazyfs.mount.erofs_probe import Verdict
from lazyfs.mount.forest import Planted
from lazyfs.mount.showing import Showing, Shown

PLANTED = Planted(7, b"a" * 64, None, ())  # type: ignore[arg-type]
WORKS, LOOPS, BROKEN = Verdict(Method.FILES, ""), Verdict(Method.LOOPS, "no files"), Verdict(None, "no erofs")
Make = Callable[..., Showing]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Any]]:
    """What would have been mounted and unmounted."""
    done: list[tuple[str, Path, Any]] = []

    def mount(image: Path, devices: list[Path], target: Path, method: Method) -> None:
        if image.name == "bad":
            raise MountFailed("no such thing")
        done.append(("mount", target, method))

    def top_at(directory: bytes) -> MountPoint | None:
        here = [kind for kind, target, _ in done if os.fsencode(target) == directory]
        return MountPoint(1, "0:1", b"/", directory, "erofs", b"", "") if here[-1:] == ["mount"] else None

    monkeypatch.setattr(mounts, "top_at", top_at)
    monkeypatch.setattr(erofs_mount, "mount", mount)
    monkeypatch.setattr(erofs_mount, "unmount", lambda target: done.append(("unmount", target, None)))
    return done


@pytest.fixture
def make(tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> Make:
    def one(verdict: Verdict, driver: str = "auto", elsewhere: str = "", image: str = "image") -> Showing:
        monkeypatch.setattr(erofs_probe, "probe", lambda directory, device: verdict)
        settings = Settings(tmp_path / "root", tmp_path / "run", driver=driver)
        settings.root.mkdir(exist_ok=True)
        return Showing(settings, lambda planted: (Path(image), [3, 5]), lambda planted: "/fuse", elsewhere)

    return one


async def test_the_self_test_decides(make: Make) -> None:
    works, loops, broken = make(WORKS), make(LOOPS), make(BROKEN)
    shown = await make(WORKS).show(PLANTED, None)
    assert (shown.driver, shown.reason) == ("erofs", "its self-test passed")
    assert works.choice()[0] == "auto" and loops.choice()[0] == "auto"
    shown = await make(LOOPS).show(PLANTED, None)
    assert shown.driver == "erofs" and "loop devices (no files)" in shown.reason
    broken = make(BROKEN)
    assert await broken.show(PLANTED, None) == Shown("/fuse", "fuse", "erofs doesn't work here: no erofs")
    assert broken.choice() == ("fuse", "erofs doesn't work here: no erofs") and not broken.wants_images


@pytest.mark.parametrize("named", [True, False])
async def test_erofs_by_name_is_erofs_or_an_error(make: Make, named: bool) -> None:
    wanted, settings = ("erofs", "auto") if named else (None, "erofs")
    with pytest.raises(MountFailed, match="no erofs"):
        await make(BROKEN, settings).show(PLANTED, wanted)
    with pytest.raises(MountFailed, match="no such thing"):
        await make(WORKS, settings, image="bad").show(PLANTED, wanted)
    with pytest.raises(MountFailed, match="by root alone"):
        await make(WORKS, settings, elsewhere="erofs can be mounted by root alone").show(PLANTED, wanted)
    with pytest.raises(UsageError):
        await make(WORKS, settings).show(PLANTED, "ext4")


async def test_an_image_that_erofs_refuses_is_shown_by_fuse(make: Make, made: list[Any]) -> None:
    one = make(WORKS, image="bad")
    shown = await one.show(PLANTED, None)
    assert (shown.path, shown.driver) == ("/fuse", "fuse") and "no such thing" in shown.reason
    await one.hide(PLANTED, shown)
    assert [kind for kind, *_ in made].count("mount") == 0


async def test_the_self_test_is_done_before_the_first_mount_where_one_will_ask(make: Make) -> None:
    one = make(WORKS)
    await one.test_early()
    assert one.choice() == ("erofs", "its self-test passed")
    for fuse in (make(BROKEN, "fuse"), make(BROKEN, elsewhere="erofs can be mounted by root alone")):
        before = fuse.choice()
        await fuse.test_early()
        assert fuse.choice() == before and before[0] == "fuse"


async def test_fuse_needs_no_test(make: Make, made: list[Any]) -> None:
    assert await make(BROKEN, "fuse").show(PLANTED, None) == Shown("/fuse", "fuse", "the settings say so")
    assert (await make(WORKS).show(PLANTED, "fuse")).reason == "it was asked for"
    assert made == []


async def test_one_mount_for_all_users_until_the_last_goes(make: Make, made: list[Any]) -> None:
    one = make(WORKS)
    shown: list[Shown] = []

    async def show() -> None:
        shown.append(await one.show(PLANTED, None))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(show)
    assert [kind for kind, *_ in made] == ["mount"] and len(set(shown)) == 1
    for each in shown[:-1]:
        await one.hide(PLANTED, each)
    assert [kind for kind, *_ in made] == ["mount"]
    await one.hide(PLANTED, shown[-1])
    assert [kind for kind, *_ in made] == ["mount", "unmount"]
    await one.show(PLANTED, None)
    assert [kind for kind, *_ in made] == ["mount", "unmount", "mount"]
    made.append(("unmount", made[-1][1], None))  # by somebody else
    await one.show(PLANTED, None)
    assert made[-1][0] == "mount"


async def test_images_that_take_long_keep_nobody_from_letting_go(tmp_path: Path, made: list[Any], make: Make) -> None:
    go_on, waiting = threading.Event(), threading.Semaphore(0)

    def image_of(planted: Planted) -> tuple[Path, list[int]]:
        if planted is not PLANTED:
            waiting.release()
            go_on.wait(20)
        return Path("image"), [3]

    make(WORKS)
    one = Showing(Settings(tmp_path / "root", tmp_path / "run"), image_of, lambda planted: "/fuse", "")
    shown = await one.show(PLANTED, None)
    async with trio.open_nursery() as nursery:
        try:
            for number in range(8):
                other = Planted(number, b"%064d" % number, None, ())  # type: ignore[arg-type]
                nursery.start_soon(one.show, other, None)
            await trio.to_thread.run_sync(waiting.acquire)
            with trio.fail_after(10):
                await one.hide(PLANTED, shown)
        finally:
            go_on.set()
    assert [kind for kind, *_ in made][:2] == ["mount", "unmount"]
