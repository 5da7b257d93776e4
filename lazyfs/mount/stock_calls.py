"""The control calls of a node's operator: fetch images, list, remove, prune and verify what the store holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import trio

from lazyfs.chunks.stock import Stock, Verification, check_names
from lazyfs.errors import UsageError
from lazyfs.limits import MAX_CALL_NUMBER
from lazyfs.mount.control import Say
from lazyfs.mount.fetching import Fetcher, Wanted
from lazyfs.mount.resolving import Pull
from lazyfs.registry.config import access as accesses

T = TypeVar("T")


class StockCalls:
    """Answers these calls. Belongs to the trio loop; the work is done in threads, one call that changes at a time."""

    def __init__(self, stock: Stock, fetcher: Fetcher) -> None:
        self._stock = stock
        self._fetcher = fetcher
        self._limiter = trio.CapacityLimiter(4)
        self._changing = trio.Lock()

    async def handle(self, name: str, args: dict[str, Any], say: Say) -> dict[str, Any]:
        """Answer one call. Raise LazyfsError, UsageError for a call that there is not."""
        match name:
            case "fetch_image":
                return asdict(await self._fetcher.fetch(_wanted(args), say))
            case "image_state":
                wanted = _wanted(args)
                return await self._in_thread(partial(self._fetcher.state, wanted.image, wanted.platform))
            case "cache_layers":
                return await self._in_thread(partial(self._stock.layers, str(args.get("after") or "")))
            case "cache_images":
                return await self._in_thread(partial(self._stock.images, str(args.get("after") or "")))
            case "cache_verify":
                return await self._verify(check_names(args.get("names", [])), say)
            case "cache_unpin":
                return await self._change(partial(self._stock.unpin, check_names(args.get("names"))))
            case "cache_remove":
                names = check_names(args.get("names"))
                return await self._change(partial(self._stock.remove, names, args.get("force") is True))
            case "cache_prune":
                size, age = _number(args, "size"), _number(args, "age")
                whole = int(size) if size is not None else None
                return await self._change(partial(self._stock.prune, whole, age, args.get("everything") is True))
        raise UsageError(f"lazyfsd knows no call {name!r}")

    async def _change(self, work: Callable[[], T]) -> T:
        async with self._changing:
            return await self._in_thread(work)

    async def _verify(self, names: list[str], say: Say) -> dict[str, Any]:
        check: Verification = await self._in_thread(partial(self._stock.verify, names))
        steps, done = check.steps(), 0
        try:
            while (size := await self._in_thread(partial(next, steps, None))) is not None:
                done += size
                say("", done=min(done, check.total), total=max(check.total, 1))
            return await self._in_thread(check.result)
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(check.close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)


def pull_of(args: dict[str, Any]) -> Pull:
    """Return when to ask the registry, as a call says; without a word: always, unless it is down."""
    try:
        return Pull(args.get("pull") or Pull.NEWER.value)
    except ValueError:
        raise UsageError(f"pull can't be {args['pull']!r}") from None


def _wanted(args: dict[str, Any]) -> Wanted:
    image, platform, plain_http, access = (args.get(key) for key in ("image", "platform", "plain_http", "access"))
    if not isinstance(image, str) or not image:
        raise UsageError("a control call lacks image")
    if not isinstance(platform, str | None) or not isinstance(plain_http, bool | None):
        raise UsageError("platform is a text and plain_http true or false")
    given = None if access is None else accesses.from_json(access)
    return Wanted(image, platform, plain_http, given, pull_of(args), args.get("pin") is True)


def _number(args: dict[str, Any], key: str) -> float | None:
    value = args.get(key)
    if value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < MAX_CALL_NUMBER
    ):
        return value
    raise UsageError(f"{key} is a number below {MAX_CALL_NUMBER}, not {str(value)[:100]!r}")
