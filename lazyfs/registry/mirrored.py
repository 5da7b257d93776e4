"""A repository with several sources: mirrors in order of preference, and the origin.

Everything that is named by a digest may come from any of them. One that is dead, slow, limited or lies is passed by,
and a body that breaks off or drips is resumed at the next one from where it stopped. While another source is well, one
gets PATIENCE seconds to begin its answer and about as long again until a drip is known for one: a bad mirror delays a
read by DELAY seconds at most, and the next read not at all. Nobody but a thread of ours waits for those that are tried
again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, TypeVar

from lazyfs import digest as digests
from lazyfs.errors import (
    BlobMissing,
    DigestMismatch,
    DocumentInvalid,
    LazyfsError,
    RegistryError,
    TooManyRequests,
    Unauthorized,
)
from lazyfs.limits import MIRROR_PATIENCE, MIRROR_PROBE_TIMEOUT, MIRROR_STALL, REQUEST_TIMEOUT, SLOWEST_TRANSFER
from lazyfs.oci import Descriptor
from lazyfs.registry.endpoints import Endpoint
from lazyfs.registry.health import Health
from lazyfs.registry.http.pace import Pace
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.member import Member
from lazyfs.registry.relay import RelayedStream
from lazyfs.registry.repository import ByteStream, Repository

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = MIRROR_PATIENCE
WINDOW = 1.0  # seconds over which a rate is measured; a drip may begin anywhere in one
DELAY = PATIENCE + max(MIRROR_STALL, 2 * WINDOW)  # seconds that one bad mirror may cost a read
_PROBE = 64 << 10  # bytes asked of a failing host to see whether it is well again
_WORDS = 160  # characters of each mirror's error in the origin's


class MirroredRepository:
    """The Repository protocol over several members, the origin last. Thread-safe; every call blocks.

    `host` and `name` are those of the reference. `health` is shared by all repositories of the process.
    """

    def __init__(
        self,
        host: str,
        name: str,
        members: Sequence[Member],
        health: Health,
        retry: RetryPolicy | None = None,
        *,
        total: float = REQUEST_TIMEOUT,
    ) -> None:
        self.host = host
        self.name = name
        self.members = tuple(members)
        self.health = health
        self._retry = retry or RetryPolicy()
        self._total = total  # seconds of a call without a deadline
        self._resolved: dict[str, str] = {}  # tag -> the host that resolved it last

    @property
    def link(self) -> str:
        """The host that is asked next, for whoever counts connections."""
        hosts = [member.endpoint.host for member in self.members]
        order = self.health.order(hosts, "")
        return hosts[order[0]] if order else hosts[-1]

    @property
    def hosts(self) -> list[str]:
        """The hosts that bytes may come from."""
        return [member.endpoint.host for member in self._able(lambda endpoint: endpoint.can_pull)]

    # -- pull

    def manifest(self, target: str, *, deadline: float | None = None) -> tuple[str, bytes]:
        """Return (media type, raw bytes) of a manifest or index; see Repository.

        A tag is asked of the members that may resolve tags, in order; the first answer is believed, as containerd does.
        """
        by_digest = digests.is_digest(target)
        self._resolved.pop(target, None)
        what = target if by_digest else f"{self.name}:{target}"
        able = self._able(lambda endpoint: endpoint.can_pull if by_digest else endpoint.can_resolve)
        limit = self._limit(deadline, 0)

        def ask(member: Member, pace: Pace | None) -> tuple[str, bytes]:
            return member.manifest(target, deadline=limit, pace=pace)

        found, member = self._ask(what, limit, ask, able)
        if not by_digest:
            self._resolved[target] = member.endpoint.host
        return found

    def doubt(self, target: str) -> bool:
        """Tell that a tag led to something that nobody has. True: another source may know better, ask again."""
        host = self._resolved.pop(target, "")
        able = [member.endpoint.host for member in self._able(lambda endpoint: endpoint.can_resolve)]
        if not host or host == able[-1]:
            return False
        log.warning("%s resolved %s:%s to what nobody has: asking the next one", host, self.name, target)
        self.health.note_stale(host, f"{self.name}:{target}")
        return True

    def blob(self, descriptor: Descriptor, *, deadline: float | None = None) -> bytes:
        """Return a small document whole, verified; see Repository."""
        limit = self._limit(deadline, descriptor.size)

        def ask(member: Member, pace: Pace | None) -> bytes:
            return member.blob(descriptor, deadline=limit, pace=pace)

        return self._ask(descriptor.digest, limit, ask, self._able(lambda endpoint: endpoint.can_pull))[0]

    def fetch(self, digest: str, blob_offset: int, size: int, *, deadline: float | None = None) -> ByteStream:
        """Start reading a range of a blob; see Repository. The stream goes from member to member as need be."""
        digests.parse(digest, "blob digest")
        limit = self._limit(deadline, size)

        def begin(at: int, left: int, passed_by: frozenset[str]) -> tuple[ByteStream, str]:
            def ask(member: Member, pace: Pace | None) -> ByteStream:
                return member.fetch(digest, at, left, deadline=limit, pace=pace)

            able = self._able(lambda endpoint: endpoint.can_pull)
            stream, member = self._ask(digest, limit, ask, able, passed_by, whole=False)
            self._probe(digest, at, left)
            return stream, member.endpoint.host

        return RelayedStream(begin, self.health, digest, blob_offset, size, limit, len(self.members))

    def referrers(self, digest: str, *, deadline: float | None = None) -> list[Descriptor]:
        """Return the manifests whose subject is `digest`; see Repository. Mirrors seldom have them: the origin does."""
        return self.members[-1].referrers(digest, deadline=deadline)

    # -- push: to one member

    def has_blob(self, digest: str) -> bool:
        """Tell whether the registry that is pushed to has the blob."""
        return self._pushed.has_blob(digest)

    def push_blob(self, digest: str, size: int, source: BinaryIO) -> bool:
        """Upload a blob; see Repository."""
        return self._pushed.push_blob(digest, size, source)

    def push_manifest(self, target: str, media_type: str, raw: bytes) -> None:
        """Store a manifest or index; see Repository."""
        self._pushed.push_manifest(target, media_type, raw)

    def mount_blob(self, digest: str, size: int, source: Repository) -> bool:
        """Have a blob of another repository here; see Repository."""
        return self._pushed.mount_blob(digest, size, source)

    def close(self) -> None:
        """Close idle connections of all members."""
        for member in self.members:
            member.close()

    @property
    def _pushed(self) -> Member:
        return next((member for member in reversed(self.members) if member.endpoint.can_push), self.members[-1])

    # -- wrong bytes

    def blame(self, digest: str, reason: str) -> list[str]:
        """Tell that a blob was wrong as a whole. Return the hosts that sent it; the others are asked first now."""
        return self.health.blame(digest, f"{digest} of {self.name}: {reason}")

    # -- asking one after another

    def _ask(
        self,
        what: str,
        limit: float,
        action: Callable[[Member, Pace | None], T],
        able: Sequence[Member],
        passed_by: frozenset[str] = frozenset(),
        *,
        whole: bool = True,
    ) -> tuple[T, Member]:
        """Return what `action` gets from the first member that works, and that member. Blocks until `limit`.

        Round after round while errors are temporary; hosts in `passed_by` come last in the first one. `whole`:
        what `action` returns is all of the answer. Raise the origin's error, with what the mirrors said.
        """
        pause = self._retry.first
        for attempt in range(1, self._retry.attempts + 1):
            failed: dict[int, LazyfsError] = {}
            hosts = [member.endpoint.host for member in able]
            order = self.health.order(hosts, what)
            if attempt == 1 and passed_by:
                order.sort(key=lambda index: hosts[index] in passed_by)
            for index in order:
                member, host = able[index], hosts[index]
                others = [hosts[i] for i in order if i != index and not _final(failed.get(i))]
                pace = self._pace(host, what, others)
                began = time.monotonic()
                try:
                    found = action(member, pace)
                except (RegistryError, DigestMismatch, DocumentInvalid) as error:
                    self.health.note_error(host, what, error)
                    failed[index] = error
                    log.info("%s failed, asking the next source: %s", host, error)
                    if time.monotonic() >= limit:
                        break
                else:
                    self.health.note_answer(host, what, time.monotonic() - began)
                    if whole:
                        self.health.note_done(host)
                    return found, member
            verdict = self._verdict(what, failed, hosts)
            if attempt == self._retry.attempts or not verdict.temporary:
                raise verdict
            wait = max(self._retry.uniform(pause / 2, pause), float(getattr(verdict, "retry_after", 0.0)))
            if time.monotonic() + wait >= limit:
                raise verdict
            self._retry.sleep(wait)
            pause = min(pause * 2, self._retry.longest)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _pace(self, host: str, what: str, others: Sequence[str]) -> Pace | None:
        """Return how soon a host must deliver: no limits of ours where nobody else is well, and honest about `what`."""
        health = self.health
        well = [one for one in others if one != host and health.is_well(one) and not health.has_lied(one, what)]
        if not well:
            return None
        return Pace(time.monotonic() + PATIENCE, MIRROR_STALL, health.floor(well), WINDOW)

    def _verdict(self, what: str, failed: dict[int, LazyfsError], hosts: Sequence[str]) -> LazyfsError:
        if not failed:
            host, wait = min(((h, self.health.limited_for(h)) for h in hosts), key=lambda pair: pair[1])
            return TooManyRequests(host, f"{host} limits how often it may be asked", retry_after=max(wait, 0.1))
        last = max(failed)  # the origin, unless it must not be asked
        error = failed[last]
        others = [f"{hosts[i]}: {each.message[:_WORDS]}" for i, each in failed.items() if i != last]
        if others:
            error.message = f"{error.message}; before that {'; '.join(others)}"
        limited = [f"{h} limits how often it may be asked" for h in hosts if self.health.limited_for(h)]
        if limited and not isinstance(error, TooManyRequests):
            error.message = f"{error.message}; not asked: {'; '.join(limited)}"
        if isinstance(error, (BlobMissing, DigestMismatch)) or not error.temporary:
            # A mirror that is down may have what the origin lacks: worth another try.
            error.temporary = digests.is_digest(what) and any(each.temporary for each in failed.values())
        return error

    def _limit(self, deadline: float | None, size: int) -> float:
        return deadline if deadline is not None else time.monotonic() + self._total + size / SLOWEST_TRANSFER

    def _able(self, can: Callable[[Endpoint], bool]) -> list[Member]:
        return [member for member in self.members if can(member.endpoint)] or list(self.members)

    # -- trying failing hosts again

    def _probe(self, digest: str, blob_offset: int, size: int) -> None:
        """Try failing members again, in threads: none of the readers waits for them. Doesn't block."""
        for member in self.members:
            host = member.endpoint.host
            if self.health.take_probe(host):
                asker = threading.Thread(
                    target=self._try_again,
                    args=(member, digest, blob_offset, min(size, _PROBE)),
                    name="lazyfs-probe",
                    daemon=True,
                )
                try:
                    asker.start()
                except RuntimeError:  # no more threads: the reader goes on, the next one tries
                    self.health.probed(host)

    def _try_again(self, member: Member, digest: str, blob_offset: int, size: int) -> None:
        host = member.endpoint.host
        began = time.monotonic()
        others = [other.endpoint.host for other in self.members if other is not member]
        pace = Pace(began + PATIENCE, MIRROR_STALL, self.health.floor(others), WINDOW)
        try:
            with member.fetch(digest, blob_offset, size, deadline=began + MIRROR_PROBE_TIMEOUT, pace=pace) as stream:
                first = time.monotonic() - began
                while stream.read(size):
                    pass
            self.health.note_answer(host, digest, first)
            self.health.note_done(host)
        except (BlobMissing, TooManyRequests, Unauthorized) as error:
            self.health.note_done(host)
            self.health.note_error(host, digest, error)
        except LazyfsError as error:
            self.health.note_error(host, digest, error)
        finally:
            self.health.probed(host)


def _final(error: LazyfsError | None) -> bool:
    """Tell whether a member has said its last word."""
    return error is not None and not error.temporary


def read_again(repository: Repository, digest: str, action: Callable[[], T], wrong: tuple[type[LazyfsError], ...]) -> T:
    """Return `action()`, which reads a blob; where it raises one of `wrong`, once more from each other source.

    Blocks as `action` does. With one source it is called once.
    """
    if not isinstance(repository, MirroredRepository):
        return action()
    repository.health.reopen(digest)
    for _ in repository.hosts:
        try:
            return action()
        except wrong as error:
            blamed = repository.blame(digest, error.message)
            if not blamed or repository.health.all_condemned(digest, repository.hosts):
                repository.health.pardon(digest, repository.hosts)
                raise
            log.warning("%s is fetched again from another source than %s: %s", digest, ", ".join(blamed), error)
    return action()
