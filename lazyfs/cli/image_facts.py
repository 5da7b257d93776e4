"""What this node knows of an image, put together from the snapshotter's records, the store and a running daemon.

Each of the three may be missing; none is started for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lazyfs import reference as references
from lazyfs.cli.output import count
from lazyfs.errors import LazyfsError, ManifestMissing
from snapshotter.reasons import ADVICE, Outcome, classify

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.cli.output import Output
    from lazyfs.config import Settings
    from snapshotter.records import ImageRecord, LayerRecord, Records

_HEX = re.compile(r"(?:sha256:)?[0-9a-f]{6,64}")


@dataclass(slots=True)
class LayerFacts:
    """One layer. Sizes in bytes; 0 where not known. `decided`: seconds since the epoch, 0: not known."""

    digest: str
    size: int = 0  # of the blob
    state: str = "unknown"  # "lazy", "small", "full" (fetched whole by lazyfs), "fallback" (by containerd), "unknown"
    reason_class: str = ""
    reason: str = ""
    advice: str = ""
    decided: float = 0.0
    present: int = 0  # of its files' bytes
    full: int = 0
    complete: bool = False
    verified: bool = False
    quarantine: str = ""


@dataclass(slots=True)
class ImageFacts:
    """One image. `layers` from the base up, as far as the order is known."""

    image: str
    manifest_digest: str = ""
    layers: list[LayerFacts] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)  # keys of its committed snapshots
    users: list[str] = field(default_factory=list)  # keys of the active snapshots and views on them
    chains: list[str] = field(default_factory=list)  # ids of the chains that the daemon shows of it
    mounts: list[str] = field(default_factory=list)  # directories

    def layer(self, digest: str) -> LayerFacts:
        """Return the facts of a layer, begun where there are none."""
        for layer in self.layers:
            if layer.digest == digest:
                return layer
        self.layers.append(LayerFacts(digest))
        return self.layers[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return asdict(self)


@dataclass(slots=True)
class Sources:
    """What was found to ask. `images` and `layers` are those of `lazyfs cache ls`."""

    records: Records | None
    images: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    mounts: list[dict[str, Any]]  # of `lazyfs status`, the snapshotter's chains among them


def gather(name: str, sources: Sources) -> list[ImageFacts]:
    """Return what is known of the images that `name` means: a reference, or a manifest's digest or its beginning.

    Blocking. Raise ManifestMissing when nobody knows it, ReferenceInvalid, StoreError.
    """
    found = [_one(reference, sources) for reference in _matching(name, sources)]
    if not found:
        raise _nobody_knows(name, sources)
    return found


def _matching(name: str, sources: Sources) -> list[str]:
    """Return the names, as `_plain` writes them, of what is meant and known."""
    known: dict[str, set[str]] = {}  # name → manifest digests
    for text, digest in [
        *((reference, image["digest"]) for image in sources.images for reference in image["references"]),
        *((mount["image"], mount["manifest_digest"]) for mount in sources.mounts),
        *((reference, digest) for reference, digest in _recorded(sources)),
    ]:
        known.setdefault(_plain(text), set()).update({digest, _digest_of(text)} - {""})
    if _HEX.fullmatch(name):
        start = "sha256:" + name.removeprefix("sha256:")
        meant = sorted(one for one, digests in known.items() if any(each.startswith(start) for each in digests))
        if meant or name.startswith("sha256:"):
            return meant
    wanted = references.parse(name)
    if not wanted.digest:
        return [one for one in known if one == str(wanted)]
    # A digest says more than the tag beside it, and one pulled by tag is the same image.
    return sorted(one for one, digests in known.items() if wanted.digest in digests and _origin(one) == wanted.origin)


def _recorded(sources: Sources) -> list[tuple[str, str]]:
    """Return the references in the snapshotter's records, each with a manifest digest or ""."""
    return sorted(sources.records.references()) if sources.records is not None else []


def _plain(name: str) -> str:
    """Return a reference as lazyfs writes it, without a digest beside its tag; what is none stays as it is."""
    try:
        found = references.parse(name)
    except LazyfsError:
        return name
    return str(replace(found, digest="") if found.tag and found.digest else found)


def _digest_of(name: str) -> str:
    try:
        return references.parse(name).digest
    except LazyfsError:
        return ""


def _origin(name: str) -> str:
    try:
        return references.parse(name).origin
    except LazyfsError:
        return ""


def _nobody_knows(name: str, sources: Sources) -> ManifestMissing:
    hint = "lazyfs cache ls lists the images of this node, and lazyfs status what is mounted"
    unsaid = [one for one in sources.records.reasons() if not one.image] if sources.records is not None else []
    if unsaid:
        hint = (
            f"{count(len(unsaid))} of late came from a client that does not tell its image: lazyfs pull does, and CRI "
            "with disable_snapshot_annotations = false"
        )
    return ManifestMissing("", f"{name} was neither pulled nor mounted here, as far as this node knows", hint=hint)


def _one(name: str, sources: Sources) -> ImageFacts:
    facts = ImageFacts(name)
    recorded = {reference for reference, _ in _recorded(sources) if _plain(reference) == name}
    records = [sources.records.image(each) for each in sorted(recorded)] if sources.records is not None else []
    for record in records:
        if record.image is not None:
            facts.manifest_digest = facts.manifest_digest or record.image.manifest_digest
            for layer in record.image.layers:
                facts.layer(layer.digest).size = layer.size
    for image in sources.images:
        if name in map(_plain, image["references"]):
            facts.manifest_digest = facts.manifest_digest or image["digest"]
            if image["digest"] == facts.manifest_digest:
                for digest in image["layers"]:
                    facts.layer(digest)
    for mount in sources.mounts:
        if _plain(mount["image"]) == name:
            facts.manifest_digest = facts.manifest_digest or mount["manifest_digest"]
            if mount["kind"] == "chain":
                facts.chains.append(mount["mount"])
            else:
                facts.mounts.append(mount["dir"] or "(being mounted)")
            _add_mounted(facts, mount["layers"])
    for record in records:
        _add_record(facts, record)
    if sources.records is not None and any(layer.state == "unknown" for layer in facts.layers):
        chains = {layer.digest: layer.chain_id for one in records if one.image for layer in one.image.layers}
        _add_others(facts, sources.records.layers(), chains)
    for each in facts.layers:
        _add_held(each, sources.layers.get(each.digest))
        if each.quarantine:
            each.reason_class = Outcome.QUARANTINED.value
        if each.reason_class:
            each.advice = ADVICE[Outcome(each.reason_class)]
    return facts


def _add_mounted(facts: ImageFacts, layers: Iterable[dict[str, Any]]) -> None:
    for one in layers:
        layer = facts.layer(one["digest"])
        layer.size = layer.size or one["size"]
        layer.state = "lazy" if one["lazy"] else "full"
        layer.reason = one["reason"]
        layer.reason_class = "" if one["lazy"] else classify(one["reason"]).value
        layer.complete, layer.verified, layer.quarantine = one["complete"], one["verified"], one["quarantine"]
        layer.present = one["present"]


def _add_record(facts: ImageFacts, record: ImageRecord) -> None:
    facts.snapshots += record.snapshots
    facts.users += record.users
    known = {layer.digest for layer in facts.layers}  # a tag that has moved has reasons for layers of other images
    for reason in reversed(record.reasons):  # the first one that was decided is the nearest to the base
        if not reason.layer or (known and reason.layer not in known):
            continue
        layer = facts.layer(reason.layer)
        layer.decided = reason.when / 1e9
        layer.reason = reason.reason
        ready = reason.lazy or reason.layer in record.ready
        layer.state = "fallback" if not ready else "small" if reason.reason else "lazy"
        layer.reason_class = "" if ready else classify(reason.reason).value
    for digest in record.ready:
        layer = facts.layer(digest)
        if layer.state == "unknown":
            layer.state = "lazy"


def _add_others(facts: ImageFacts, known: Mapping[str, LayerRecord], chains: Mapping[str, str]) -> None:
    """Tell of layers that came with another image: containerd asks for a layer that is there never again."""
    for layer in facts.layers:
        found = known.get(layer.digest)
        if layer.state != "unknown" or found is None:
            continue
        chain = chains.get(layer.digest, "")
        reason = found.nearest(chain)
        if chain in found.ready or (not chain and found.ready) or (reason is not None and reason.lazy):
            layer.state = "small" if reason is not None and reason.lazy and reason.reason else "lazy"
        elif reason is not None:
            layer.state, layer.reason_class = "fallback", classify(reason.reason).value
        if reason is not None:
            layer.decided = reason.when / 1e9
            layer.reason = reason.reason if layer.state != "lazy" else ""


def _add_held(layer: LayerFacts, held: dict[str, Any] | None) -> None:
    if held is None:
        return
    layer.size = layer.size or held["size"]
    layer.present, layer.full, layer.complete = held["present"], held["full"], held["complete"]
    layer.verified, layer.quarantine = held["verified"], layer.quarantine or held["quarantine"]


def _may_be_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # whoever opens it says why that can't be


def look(settings: Settings, out: Output) -> Sources:
    """Ask whoever is there. Blocking, 10 s at most. What can't be asked is told as a warning. Close `records`."""
    from lazyfs.cli.status import gather as ask_daemons

    sources = Sources(None, [], {}, [])
    path = settings.root / "snapshots.db"
    if _may_be_there(path):
        from snapshotter.records import open_records

        try:
            sources.records = open_records(path)
        except LazyfsError as error:
            out.warn(str(error))
    for status in ask_daemons(settings, out):
        sources.mounts += status.get("mounts", [])
    if _may_be_there(settings.root / "catalog.db"):
        from lazyfs.cli.cache import pages
        from lazyfs.cli.stock_access import open_stock

        try:
            with open_stock(settings) as stock:
                sources.images, _ = pages(stock, "images")
                sources.layers = {layer["digest"]: layer for layer in pages(stock, "layers")[0]}
        except LazyfsError as error:
            out.warn(str(error))
    return sources
