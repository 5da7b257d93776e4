"""What is mounted where, by whom: the daemon's list of mounts, their leases, and the calls that change it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeGuard
from uuid import uuid4

import trio

from lazyfs.chunks.catalog import Catalog, MountRecord
from lazyfs.chunks.trace_files import TraceFiles
from lazyfs.config import Settings
from lazyfs.container import mounts, sweep
from lazyfs.errors import MountPointInvalid, StoreError, UsageError
from lazyfs.format.trace import fitting
from lazyfs.limits import LONGEST_START
from lazyfs.mount import claims, processes
from lazyfs.mount.chain_service import ChainService
from lazyfs.mount.claims import Claim
from lazyfs.mount.control import Say, caller_of
from lazyfs.mount.images import Images
from lazyfs.mount.inheritance import Inheritance
from lazyfs.mount.mounted_image import MountedImage
from lazyfs.mount.processes import Process
from lazyfs.mount.showing import Showing, Shown
from lazyfs.mount.stock_calls import pull_of
from lazyfs.mount.tracing import Recorder
from lazyfs.registry.config import access as accesses

log = logging.getLogger(__name__)

PREFIX, LOGINS = "mount:", "logins:"  # of what is left to the next daemon
_TOLD = 8  # times that logins came whose words are kept; a snapshotter says all of its own each time
KINDS = frozenset({"ro", "rw", "container"})
_LAST_BREATH = 0.3  # seconds between a killed command's end and the sweep of what it left
_LOOK = 5.0  # seconds between looks at the mount table for mounts that somebody else took away


@dataclass(eq=False, slots=True)
class Mount:
    """One mount of an image. `dir` is empty until the client attached it."""

    id: str
    name: str  # the image as the user wrote it
    image: MountedImage
    shown: Shown
    client: object  # the connection that asked for it; its end releases what is leased, or not attached yet
    leased: bool
    dir: str = ""
    kind: str = "ro"
    state_dir: str = ""
    recorder: Recorder | None = None  # of the start, while it is recorded
    command: tuple[str, ...] = ()  # that was said to be executed
    access: dict[str, Any] | None = None  # the client's, as it was said: secrets
    plain_http: bool | None = None
    caller: Process | None = None  # the client's


class Mounted:
    """The calls of the control socket that concern mounts. Belongs to the trio loop."""

    def __init__(
        self,
        settings: Settings,
        images: Images,
        catalog: Catalog,
        showing: Showing,
        status: Callable[[list[Mount]], Awaitable[dict[str, Any]]],
        metrics: Callable[[list[Mount]], Awaitable[dict[str, Any]]],
        stop: Callable[[], None],
        chains: ChainService,
        traces: TraceFiles,
        inheritance: Inheritance,
    ) -> None:
        self._settings = settings
        self._images = images
        self._catalog = catalog
        self._showing = showing
        self._status = status
        self._metrics = metrics
        self._stop = stop
        self._chains = chains
        self._traces = traces
        self._inheritance = inheritance
        self._mounts: dict[str, Mount] = {}
        self._limiter = trio.CapacityLimiter(4)
        self._callers: dict[Process, Process] = {}  # clients of the daemon before us, each once
        self._told = 0  # times that logins came
        self.changed = trio.Event()  # set and renewed when the number of mounts changes

    def __len__(self) -> int:
        return len(self._mounts) + len(self._chains.chains)

    async def handle(self, name: str, args: dict[str, Any], connection: object, say: Say) -> dict[str, Any]:
        """Answer one call. Raise LazyfsError."""
        match name:
            case "mount_image":
                return await self._mount_image(args, connection, say)
            case "attach":
                return await self._attach(args)
            case "release":
                await self._release(self._find_id(args))
                return {}
            case "trace_end":
                return await self._end_trace(args)
            case "find":
                return self._found(self._find_dir(_text(args, "dir")))
            case "status":
                return await self._status(self.all())
            case "metrics":
                return await self._metrics(self.all())
            case "set_logins":
                self._images.node_logins.update(args.get("logins"))
                self._inheritance.put(f"{LOGINS}{self._told % _TOLD}", {"logins": args.get("logins")})
                self._told += 1
                return {}
            case "stop":
                self._stop()
                return {}
        return await self._chains.calls.handle(name, args, say)

    def all(self) -> list[Mount]:
        """Return the mounts of this moment."""
        return list(self._mounts.values())

    def places(self) -> dict[str, list[str]]:
        """Return where images show, by the digest of their manifest. From any thread."""
        found = self._chains.chains.places()
        for mount in list(self._mounts.values()):
            found.setdefault(mount.image.manifest.digest, []).append(mount.dir or "(being mounted)")
        return found

    async def hung_up(self, connection: object) -> None:
        """Release what a connection leased or did not attach; tidy up after a container whose command was killed."""
        ours = [mount for mount in self._mounts.values() if mount.client is connection]
        gone = [mount for mount in ours if mount.leased or not mount.dir]
        for mount in gone:
            await self._release(mount)
        if any(mount.kind == "container" for mount in gone):
            # A command that ended in order has removed its container and released its mount before it hung up, or is
            # about to; one that was killed takes a moment to let go of its lock.
            await trio.sleep(_LAST_BREATH)
            await trio.to_thread.run_sync(sweep.sweep, self._settings, limiter=self._limiter)

    async def release_all(self) -> None:
        """Take every mount down, as far as it goes; for the end of the daemon, which answers no request any more."""
        await self._showing.sever()
        for mount in list(self._mounts.values()):
            await self._take_away(mount.dir, mount.kind, mount.state_dir)
            await self._release(mount)

    async def watch_table(self) -> None:
        """Release mounts whose directory somebody unmounted without telling us. Runs until cancelled.

        The first look is at once: what was unmounted while a daemon before us died could not be told to anybody.
        """
        for wait in chain([0.0], repeat(_LOOK)):
            await trio.sleep(wait)
            shown = [mount for mount in self._mounts.values() if mount.dir and mount.kind != "container"]
            if not shown:
                continue
            try:
                table = await trio.to_thread.run_sync(mounts.mount_table, limiter=self._limiter)
            except OSError as error:  # too many files are open, most likely: no reason to take everybody's mounts away
                log.warning("it can't be seen which mounts there are: %s", error.strerror)
                continue
            there = {entry.dir for entry in table}
            for mount in shown:
                if os.fsencode(mount.dir) not in there and mount.id in self._mounts:
                    log.info("unmounted from outside: dir=%s", mount.dir)
                    await trio.to_thread.run_sync(sweep.remove_state, mount.state_dir, limiter=self._limiter)
                    await self._release(mount)

    async def clean_up_crashed(self) -> None:
        """Take away what mounts of a daemon that died have left: dead mount points, writable layers."""
        for record in await trio.to_thread.run_sync(self._catalog.mounts, limiter=self._limiter):
            log.info("left by a crash: image=%s dir=%s", record.image, record.dir)
            await self._take_away(record.dir, record.kind, record.state_dir)
            await self._note(partial(self._catalog.remove_mount, record.id), record.dir)

    async def _take_away(self, directory: str, kind: str, state_dir: str) -> None:
        work = partial(sweep.take_away, self._settings, directory, kind, state_dir)
        await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def _note(self, work: Callable[[], None], directory: str) -> None:
        """Write down what only the clean-up after a crash needs: a disk that is full keeps nobody from mounting."""
        try:
            await trio.to_thread.run_sync(work, limiter=self._limiter)
        except StoreError as error:
            log.warning("what became of mount %s is not noted: %s", directory, error)

    # -- calls

    async def _mount_image(self, args: dict[str, Any], connection: object, say: Say) -> dict[str, Any]:
        name = _text(args, "image")
        platform, plain_http = args.get("platform"), args.get("plain_http")
        if not isinstance(platform, str | None) or not isinstance(plain_http, bool | None):
            raise UsageError("mount_image: platform is a text and plain_http true or false")
        access, driver = args.get("access"), args.get("driver")
        if not isinstance(driver, str | None):
            raise UsageError("mount_image: driver is a text")
        entrypoint, command = args.get("entrypoint"), args.get("command")
        if not isinstance(entrypoint, str | None) or not (command is None or _is_words(command)):
            raise UsageError("mount_image: command is a list of texts and entrypoint a text")
        trace = args.get("trace", False)
        if not isinstance(trace, bool | None):
            raise UsageError("mount_image: trace is true or false")
        recorder = Recorder() if trace else None
        try:
            image = await self._images.mount(
                name,
                platform,
                plain_http,
                say,
                pull=pull_of(args),
                access=None if access is None else accesses.from_json(access),
                recorder=recorder,
                follow=True,
            )
        except BaseException:
            if recorder is not None:
                recorder.detach()
            raise
        try:
            shown = await self._showing.show(image.planted, driver)
        except BaseException:
            if recorder is not None:
                recorder.detach()
            with trio.CancelScope(shield=True):
                await self._images.release(image)
            raise
        mount = Mount(uuid4().hex[:16], name, image, shown, connection, bool(args.get("lease")))
        mount.recorder, mount.command = recorder, tuple(command or ())
        mount.access, mount.plain_http, mount.caller = access, plain_http, processes.find(caller_of(connection))
        self._mounts[mount.id] = mount
        self._leave(mount)
        if command is not None:
            self._images.expect_exec(image, entrypoint, command)
        self._note_change()
        return {
            "mount": mount.id,
            "path": shown.path,
            "manifest_digest": image.manifest.digest,
            "config": image.config.document,
            "driver": shown.driver,
            "reason": shown.reason,
            "layers": [
                {
                    "digest": fact.layer.digest,
                    "size": fact.layer.descriptor.size,
                    "lazy": fact.lazy,
                    "reason": fact.reason,
                }
                for fact in image.layers
            ],
            "notes": list(image.notes),
            "size": image.size,
        }

    async def _attach(self, args: dict[str, Any]) -> dict[str, Any]:
        mount = self._find_id(args)
        kind = _text(args, "kind")
        if kind not in KINDS:
            raise UsageError(f"a mount can't be of kind {kind!r}")
        directory, state_dir = _text(args, "dir"), str(args.get("state_dir") or "")
        if state_dir and not sweep.is_below(self._settings, state_dir):
            raise UsageError(f"{state_dir} is not in the store")
        mount.dir, mount.kind, mount.state_dir = directory, kind, state_dir
        tree = mount.image.planted.name.decode()
        record = MountRecord(
            mount.id, mount.name, mount.image.manifest.digest, mount.dir, kind, mount.state_dir, os.getpid(), tree
        )
        self._leave(mount)
        await self._note(partial(self._catalog.set_mount, record), mount.dir)
        return {}

    def _leave(self, mount: Mount) -> None:
        """Tell the next daemon of a mount."""
        image = mount.image
        claim = Claim(
            str(image.reference),
            image.manifest.digest,
            mount.plain_http,
            mount.access,
            claims.layers_of(image.layers),
            mount.shown,
        )
        caller = mount.caller
        self._inheritance.put(
            PREFIX + mount.id,
            claim.to_json()
            | {
                "numbers": claims.numbers_of(image.planted, image.layers),
                "name": mount.name,
                "platform": image.platform,
                "dir": mount.dir,
                "kind": mount.kind,
                "state_dir": mount.state_dir,
                "leased": mount.leased,
                "caller": None if caller is None else [caller.pid, caller.began],
            },
        )

    def regain(self, identity: str, value: dict[str, Any], image: MountedImage) -> None:
        """Take over a mount that a daemon before us made, of an image that is planted again.

        Its client's connection ended with that daemon; what is leased goes with the client's process.
        """
        claim, caller = claims.from_json(value), value.get("caller")
        process = None
        if caller is not None:
            process = Process(*caller[:2])  # a release behind this one may tell more
            process = self._callers.setdefault(process, process)
        mount = Mount(identity, value["name"], image, claim.shown, process, bool(value["leased"]))
        mount.dir, mount.kind, mount.state_dir = value["dir"], value["kind"], value["state_dir"]
        mount.access, mount.plain_http, mount.caller = claim.access, claim.plain_http, process
        self._showing.regain(image.planted, claim.shown)  # last: nothing is counted of what lacks a field
        self._mounts[identity] = mount

    async def watch_callers(self) -> None:
        """Release what clients of a daemon before us leased, once their processes have ended. Ends with them."""
        left = {mount.client for mount in self._mounts.values() if mount.leased or not mount.dir}
        # Those of today have a connection, which tells when they go.
        callers: set[Process | None] = {client for client in left if client is None or isinstance(client, Process)}

        async def watch(caller: Process | None) -> None:
            if caller is not None:
                await processes.wait(caller)
            await self.hung_up(caller)

        async with trio.open_nursery() as nursery:
            for caller in callers:
                nursery.start_soon(watch, caller)

    async def _end_trace(self, args: dict[str, Any]) -> dict[str, Any]:
        """End the recording of a start, and write it to a file."""
        mount, ready = self._find_id(args), args.get("ready")
        if ready is not None and (
            not isinstance(ready, int | float) or isinstance(ready, bool) or not 0 <= ready < LONGEST_START
        ):
            raise UsageError("trace_end: ready is a number of seconds, at most a day")
        recorder, mount.recorder = mount.recorder, None
        if recorder is None:
            raise UsageError("trace_end: nothing is recorded", hint="say trace: true when the image is mounted")
        recorder.detach()
        seconds = time.monotonic() - recorder.began if ready is None else float(ready)

        manifest = mount.image.manifest
        layers = [layer.digest for layer in manifest.layers]

        def write() -> dict[str, Any]:
            trace = fitting(recorder.trace(manifest.digest, layers, seconds, mount.command))
            path = self._traces.record(trace)
            return {
                "path": os.fspath(path), "reads": len(trace.reads), "requests": len(trace.requests), "ready": seconds
            }  # fmt: skip

        return await trio.to_thread.run_sync(write, limiter=self._limiter)

    def _found(self, mount: Mount) -> dict[str, Any]:
        return {"mount": mount.id, "kind": mount.kind, "state_dir": mount.state_dir, "image": mount.name}

    async def _release(self, mount: Mount) -> None:
        if self._mounts.pop(mount.id, None) is None:
            return
        self._inheritance.remove(PREFIX + mount.id)
        if mount.recorder is not None:
            mount.recorder.detach()
        await self._showing.hide(mount.image.planted, mount.shown)
        await self._images.release(mount.image)
        if mount.dir:
            await self._note(partial(self._catalog.remove_mount, mount.id), mount.dir)
        self._note_change()

    def _note_change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def _find_id(self, args: dict[str, Any]) -> Mount:
        mount = self._mounts.get(_text(args, "mount"))
        if mount is None:
            raise MountPointInvalid(_text(args, "mount"), "is no mount of this daemon")
        return mount

    def _find_dir(self, directory: str) -> Mount:
        for mount in reversed(self._mounts.values()):
            if mount.dir == directory:
                return mount
        raise MountPointInvalid(directory, "is no mount of lazyfs")


def _text(args: dict[str, Any], name: str) -> str:
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise UsageError(f"a control call lacks {name}")
    return value


def _is_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
