"""What this node knows of an image, put together from the snapshotter's records, the store and a running daemon.

Each of the three may be missing; none is started for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lazyfs import reference as references
from lazyfs.errors import LazyfsError, ManifestMissing
from snapshotter.reasons import ADVICE, Outcome, classify

if TYPE_CHECKING:
    from lazyfs.cli.output import Output
    from lazyfs.config import Settings
    from snapshotter.records import ImageRecord, Records

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
    known: dict[str, set[str]] = {}  # reference → manifest digests
    for image in sources.images:
        for reference in image["references"]:
            known.setdefault(_whole(reference), set()).add(image["digest"])
    for mount in sources.mounts:
        known.setdefault(_whole(mount["image"]), set()).add(mount["manifest_digest"])
    if sources.records is not None:
        for reference in sources.records.references():
            known.setdefault(_whole(reference), set())
    if _HEX.fullmatch(name):
        start = "sha256:" + name.removeprefix("sha256:")
        by_digest = [ref for ref, digests in known.items() if any(one.startswith(start) for one in digests)]
        by_digest += [ref for ref in known if f"@{start}" in ref and ref not in by_digest]
        if by_digest or name.startswith("sha256:"):
            return sorted(by_digest)
    wanted = references.parse(name)
    return [str(wanted)] if str(wanted) in known else []


def _whole(name: str) -> str:
    """Return a reference as lazyfs writes it; what is none stays as it is."""
    try:
        return str(references.parse(name))
    except LazyfsError:
        return name


def _nobody_knows(name: str, sources: Sources) -> ManifestMissing:
    hint = "lazyfs cache ls lists the images of this node, and lazyfs status what is mounted"
    unsaid = [one for one in sources.records.reasons() if not one.image] if sources.records is not None else []
    if unsaid:
        hint = (
            f"{len(unsaid)} layers were pulled by a client that does not tell their image: lazyfs pull does, and CRI "
            "with disable_snapshot_annotations = false"
        )
    return ManifestMissing("", f"{name} was neither pulled nor mounted here, as far as this node knows", hint=hint)


def _one(reference: str, sources: Sources) -> ImageFacts:
    facts = ImageFacts(reference)
    record = sources.records.image(reference) if sources.records is not None else None
    mounts = [mount for mount in sources.mounts if _whole(mount["image"]) == reference]
    if record is not None and record.image is not None:
        facts.manifest_digest = record.image.manifest_digest
        for layer in record.image.layers:
            facts.layer(layer.digest).size = layer.size
    for image in sources.images:
        if reference in map(_whole, image["references"]):
            facts.manifest_digest = facts.manifest_digest or image["digest"]
            if image["digest"] == facts.manifest_digest:
                for digest in image["layers"]:
                    facts.layer(digest)
    for mount in mounts:
        facts.manifest_digest = facts.manifest_digest or mount["manifest_digest"]
        if mount["kind"] == "chain":
            facts.chains.append(mount["mount"])
        else:
            facts.mounts.append(mount["dir"] or "(being mounted)")
        _add_mounted(facts, mount["layers"])
    if record is not None:
        _add_record(facts, record)
    for layer_facts in facts.layers:
        _add_held(layer_facts, sources.layers.get(layer_facts.digest))
        if layer_facts.quarantine:
            layer_facts.reason_class = Outcome.QUARANTINED.value
        if layer_facts.reason_class:
            layer_facts.advice = ADVICE[Outcome(layer_facts.reason_class)]
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
    facts.snapshots, facts.users = list(record.snapshots), list(record.users)
    for reason in reversed(record.reasons):  # the first one that was decided is the nearest to the base
        if not reason.layer:
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


def _add_held(layer: LayerFacts, held: dict[str, Any] | None) -> None:
    if held is None:
        return
    layer.size = layer.size or held["size"]
    layer.present, layer.full, layer.complete = held["present"], held["full"], held["complete"]
    layer.verified, layer.quarantine = held["verified"], layer.quarantine or held["quarantine"]


def look(settings: Settings, out: Output) -> Sources:
    """Ask whoever is there. Blocking, 10 s at most. What can't be asked is told as a warning. Close `records`."""
    from lazyfs.cli.status import gather as ask_daemons

    sources = Sources(None, [], {}, [])
    path = settings.root / "snapshots.db"
    if path.exists():
        from snapshotter.records import open_records

        try:
            sources.records = open_records(path)
        except LazyfsError as error:
            out.warn(str(error))
    for status in ask_daemons(settings, out):
        sources.mounts += status.get("mounts", [])
    if (settings.root / "catalog.db").exists():
        from lazyfs.cli.cache import pages
        from lazyfs.cli.stock_access import open_stock

        try:
            with open_stock(settings) as stock:
                sources.images, _ = pages(stock, "images")
                sources.layers = {layer["digest"]: layer for layer in pages(stock, "layers")[0]}
        except LazyfsError as error:
            out.warn(str(error))
    return sources
