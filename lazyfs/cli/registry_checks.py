"""What `lazyfs doctor IMAGE` asks an image's registry: is it there, may we in, does it serve ranges, how fast."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from lazyfs import reference as references
from lazyfs.cli import common
from lazyfs.cli.endpoint_checks import endpoint_checks
from lazyfs.cli.host_checks import Check, State
from lazyfs.cli.output import count
from lazyfs.errors import BadAnswer, LazyfsError, ManifestMissing, RegistryError
from lazyfs.format.lazy import NotLazy, toc_source
from lazyfs.registry.http.rate_limits import LOW
from lazyfs.registry.open import open_repository
from lazyfs.registry.resolve import resolve_image
from lazyfs.units import KiB

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.oci import Manifest
    from lazyfs.registry.hops import Hop
    from lazyfs.registry.repository import Repository

_SLOW = 0.25  # seconds a request: from there on every cold read is felt
_PROBES = 5
_PROBE = 4 * KiB  # bytes


def all_checks(args: argparse.Namespace, settings: Settings) -> list[Check]:
    """Ask the registry of `args.image`. Blocking, some requests. Never raises a LazyfsError: it is a finding."""
    hops: list[Hop] = []
    found: list[Check] = []
    try:
        reference = references.parse(args.image)
        options = common.open_options(args, settings, hops.append)
        if reference.transport == "docker" and options.access is not None:
            found = endpoint_checks(reference, options.access, options.plain_http)
        repository = open_repository(reference, options)
    except LazyfsError as error:
        if any(check.state is State.FAIL for check in found):
            return found
        return [*found, Check("image", State.FAIL, error.message, error.hint)]
    try:
        asked, manifest = _manifest(repository, reference, args, hops)
        found += asked
        if manifest is not None:
            found += [_layers(manifest, settings), *_ranges(repository, manifest)]
        return found
    finally:
        repository.close()


def _manifest(
    repository: Repository, reference: references.Reference, args: argparse.Namespace, hops: list[Hop]
) -> tuple[list[Check], Manifest | None]:
    try:
        resolved = resolve_image(repository, reference, common.platform(args))
    except RegistryError as error:
        missing = isinstance(error, ManifestMissing)
        mend = error.hint or ("check the name and the tag" if missing else "check the host's name, network and proxy")
        return [Check("registry", State.FAIL, error.message, mend)], None
    except LazyfsError as error:
        return [Check("image", State.FAIL, error.message, error.hint)], None
    login = "with a token" if any(hop.kind == "token" for hop in hops) else "no token needed"
    where = repository.host or reference.path
    total = sum(hop.seconds for hop in hops)
    return [
        Check("registry", State.OK, f"{where} answers, {login}"),
        Check("image", State.OK, f"{resolved.digest}, {count(len(hops), 'request')}, {total * 1000:.0f} ms"),
        *_limit(hops),
    ], resolved.manifest


def _limit(hops: list[Hop]) -> list[Check]:
    """Tell what is left of the registry's rate limit, where it says so."""
    left = [(hop.remaining, hop.host) for hop in hops if hop.remaining is not None]
    if not left:
        return []
    remaining, host = min(left)
    text = f"{host} allows {count(remaining, 'request')} more for now"
    if remaining >= LOW:
        return [Check("rate limit", State.OK, text)]
    return [Check("rate limit", State.WARN, text, "log in, which may allow more, or use a mirror")]


def _layers(manifest: Manifest, settings: Settings) -> Check:
    reasons = [toc_source(layer, allow_unverified=settings.allow_unverified) for layer in manifest.layers]
    plain = [reason.reason for reason in reasons if isinstance(reason, NotLazy)]
    text = f"{len(reasons) - len(plain)} of {len(reasons)} can be lazy"
    if not plain:
        return Check("layers", State.OK, text)
    return Check("layers", State.WARN, f"{text}; the first other one: {plain[0]}", "make them lazy: lazyfs convert")


def _ranges(repository: Repository, manifest: Manifest) -> list[Check]:
    """Ask for a few bytes from the middle of the largest layer, several times over one connection."""
    largest = max(manifest.layers, key=lambda layer: layer.size, default=None)
    if largest is None or largest.size < 2:
        return []
    size = min(_PROBE, largest.size // 2)
    took = []
    try:
        for probe in range(_PROBES):
            started = time.monotonic()
            blob_offset = (largest.size - size) * (probe + 1) // (_PROBES + 1)
            common.fetch_bytes(repository, largest.digest, blob_offset, size)
            took.append(time.monotonic() - started)
    except BadAnswer as error:
        mend = "lazy reading needs a registry (and proxies before it) that serves byte ranges"
        return [Check("ranges", State.FAIL, error.message, mend)]
    except LazyfsError as error:
        return [Check("ranges", State.FAIL, error.message, error.hint)]
    best, first = min(took), took[0]
    text = f"{best * 1000:.1f} ms for {size} bytes at best, the first one {first * 1000:.1f} ms"
    slow = Check("latency", State.WARN, text, "use a registry or mirror nearer by") if best > _SLOW else None
    return [Check("ranges", State.OK, "served"), slow or Check("latency", State.OK, text)]
