"""The control calls of a snapshotter: resolve chains, show them, let them go; what layers take; their removal."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import trio

from lazyfs import digest as digests
from lazyfs import oci
from lazyfs.chunks.clear import Clearing
from lazyfs.chunks.store import Store
from lazyfs.errors import DocumentInvalid, UsageError
from lazyfs.limits import MAX_CALL_DEADLINE, MAX_LAYERS, MAX_PAGE
from lazyfs.mount.chain_documents import parse_reference
from lazyfs.mount.chain_layers import ChainLayers, ChainSource
from lazyfs.mount.chain_resolving import ChainResolver
from lazyfs.mount.chains import Chain, ChainLayer, Chains
from lazyfs.mount.control import Say
from lazyfs.mount.keeping import Keeping
from lazyfs.reference import Reference
from lazyfs.registry.config import access as accesses
from lazyfs.registry.config.access import Access
from lazyfs.registry.repository import Repository

Open = Callable[[Reference, Access | None], Repository]


class Next(Protocol):
    """Who answers the other calls."""

    async def handle(self, name: str, args: dict[str, Any], say: Say) -> dict[str, Any]: ...


class ChainCalls:
    """Answers these calls. Belongs to the trio loop."""

    def __init__(
        self,
        open_repository: Open,
        resolver: ChainResolver,
        chains: Chains,
        layers: ChainLayers,
        keeping: Keeping,
        store: Store,
        clearing: Clearing,
        rest: Next,
    ) -> None:
        """`open_repository` may block on the local disk. `rest` answers all other calls."""
        self._open = open_repository
        self._resolver = resolver
        self._chains = chains
        self._layers = layers
        self._keeping = keeping
        self._store = store
        self._clearing = clearing
        self._rest = rest
        self._limiter = trio.CapacityLimiter(8)
        self._removing = trio.Lock()

    async def handle(self, name: str, args: dict[str, Any], say: Say) -> dict[str, Any]:
        """Answer one call. Raise LazyfsError."""
        match name:
            case "resolve_chain":
                source = await self._source(args, largest=_size(args, "small"))
                until = str(args.get("until") or "")
                return await self._resolver.resolve(source, until, share=args.get("access") is None)
            case "mount_chain":
                layers = _layers(args)
                source = await self._source(args, largest=None)
                return self._shown(await self._chains.mount(source, source.reference.digest, layers))
            case "unmount_chain":
                await self._chains.unmount(_text(args, "chain"))
                return {}
            case "chains":
                return self._list(str(args.get("after") or ""))
            case "layer_usage":
                wanted = _digests(args)
                return {"usage": await self._in_thread(partial(self._usage, wanted))}
            case "remove_layers":
                return await self._remove(_digests(args))
        return await self._rest.handle(name, args, say)

    async def _source(self, args: dict[str, Any], *, largest: int | None) -> ChainSource:
        began = time.monotonic()
        manifest_digest = str(args.get("manifest_digest") or "")
        if manifest_digest:
            digests.parse(manifest_digest, "manifest_digest")
        reference = parse_reference(_text(args, "image"), manifest_digest)
        access = args.get("access")
        given = None if access is None else accesses.from_json(access)
        repository = await self._in_thread(partial(self._open, reference, given))
        return ChainSource(reference, repository, began + _seconds(args), largest, access)

    def _shown(self, chain: Chain) -> dict[str, Any]:
        root = self._chains.root(chain)
        return {
            "chain": chain.id,
            "lowerdirs": [chain.path],
            "driver": chain.shown.driver,
            "reason": chain.shown.reason,
            "root": {"mode": root.mode & 0o7777, "uid": root.uid, "gid": root.gid},
        }

    def _list(self, after: str) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        size = 0
        chains = sorted((chain for chain in self._chains.all() if chain.id > after), key=lambda chain: chain.id)
        for chain in chains:
            size += 500 + 80 * len(chain.layers)
            if rows and size > MAX_PAGE:
                break
            rows.append(
                {"chain": chain.id, "image": chain.image, "lowerdirs": [chain.path], "layers": chain.digests}
            )  # fmt: skip
        return {"chains": rows, "more": len(rows) < len(chains)}

    def _usage(self, wanted: list[str]) -> dict[str, dict[str, int]]:
        found = {digest: self._store.directory_usage(digest) for digest in wanted}
        return {
            digest: {"size": size, "inodes": self._store.directory_inodes(digest)} for digest, size in found.items()
        }

    async def _remove(self, wanted: list[str]) -> dict[str, Any]:
        # By themselves: what hangs of some layers must not keep others from going.
        await self._resolver.settle(set(wanted))
        await self._layers.settle(wanted)
        async with self._removing:
            await self._keeping.release(wanted)
            done = await self._in_thread(partial(self._clearing.remove_layers, wanted))
        return {"removed": done.layers, "kept": done.kept, "freed": done.freed}

    async def _in_thread(self, job: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(job, limiter=self._limiter)


def _text(args: dict[str, Any], name: str) -> str:
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise UsageError(f"a control call lacks {name}")
    return value


def _size(args: dict[str, Any], name: str) -> int:
    value = args.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{name} is a number of bytes, not {str(value)[:100]!r}")
    return value


def _seconds(args: dict[str, Any]) -> float:
    value = args.get("deadline")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_CALL_DEADLINE:
        raise UsageError(f"deadline is a number of seconds up to {MAX_CALL_DEADLINE:.0f}, not {str(value)[:100]!r}")
    return float(value)


def _digests(args: dict[str, Any]) -> list[str]:
    value = args.get("digests")
    if not isinstance(value, list) or not all(digests.is_digest(one) for one in value):
        raise UsageError("digests is a list of sha256 digests")
    return list(dict.fromkeys(value))


def _layers(args: dict[str, Any]) -> list[ChainLayer]:
    value = args.get("layers")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_LAYERS:
        raise UsageError(f"layers is a list of 1 to {MAX_LAYERS} objects")
    return [_layer(one, number) for number, one in enumerate(value)]


def _layer(value: object, number: int) -> ChainLayer:
    if not isinstance(value, dict) or not digests.is_digest(value.get("diff_id")):
        raise UsageError(f"layer {number} of a chain lacks its diff_id")
    try:
        descriptor = oci.parse_descriptor({**value, "mediaType": value.get("media_type", "")}, f"layer {number}")
    except DocumentInvalid as error:
        raise UsageError(error.message) from None
    return ChainLayer(descriptor, value["diff_id"])
