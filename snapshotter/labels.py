"""What the labels of an extraction say: which layer of which image, whoever set them, believed of none of it.

Source: containerd, pkg/snapshotters (`cri.*`), core/unpack (`snapshot.ref`, `diff-id`, `parent-chain-id`, `max-size`);
stargz-snapshotter's clients (`remote/stargz.*`). A label's key and value have 4096 bytes at most, so lists are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lazyfs import digest as digests
from lazyfs import reference as references
from lazyfs.errors import ReferenceInvalid
from lazyfs.limits import MAX_LABEL_VALUE

SNAPSHOT_REF = "containerd.io/snapshot.ref"
_PREFIX = "containerd.io/snapshot/"
IMAGE_REF = _PREFIX + "cri.image-ref"
MANIFEST_DIGEST = _PREFIX + "cri.manifest-digest"
LAYER_DIGEST = _PREFIX + "cri.layer-digest"
IMAGE_LAYERS = _PREFIX + "cri.image-layers"
DIFF_ID = _PREFIX + "diff-id"
PARENT_CHAIN = _PREFIX + "parent-chain-id"  # containerd 2.3 and newer
MAX_SIZE = _PREFIX + "max-size"  # containerd 2.4 and newer
STARGZ_REF = _PREFIX + "remote/stargz.reference"
STARGZ_DIGEST = _PREFIX + "remote/stargz.digest"


@dataclass(frozen=True, slots=True)
class Asked:
    """What an extraction is to produce. `chain_id` is what containerd will call the snapshot.

    `layer_digest` and `manifest_digest` may be "": the client does not say. `parallel`: the layers of the image are
    prepared side by side, without a parent, and get theirs at Commit; `staged`: a read-only answer to Prepare is
    understood.
    """

    chain_id: str
    image: str  # the reference as it was pulled, normalised
    manifest_digest: str
    layer_digest: str
    parallel: bool
    staged: bool


@dataclass(frozen=True, slots=True)
class Unsaid:
    """The labels don't tell enough to be lazy. `reason` is a sentence's end; `image` what they tell all the same."""

    reason: str
    image: str = ""
    layer_digest: str = ""


def is_extraction(labels: Mapping[str, str]) -> bool:
    """Tell whether a Prepare is to produce a layer of an image, rather than a container's writable one."""
    return bool(labels.get(SNAPSHOT_REF))


def read(labels: Mapping[str, str], parent: str) -> Asked | Unsaid:
    """Return what is asked for, or why that can't be known. Pure; raises nothing, whatever the labels hold."""
    chain_id = labels.get(SNAPSHOT_REF, "")
    image = labels.get(IMAGE_REF) or labels.get(STARGZ_REF) or ""
    layer = labels.get(LAYER_DIGEST) or labels.get(STARGZ_DIGEST) or ""
    manifest = labels.get(MANIFEST_DIGEST) or ""
    if not image:
        return Unsaid("the client does not say which image it pulls (no label cri.image-ref)", "", _digest(layer))
    try:
        reference = references.parse(image[:MAX_LABEL_VALUE])
    except ReferenceInvalid as error:
        return Unsaid(f"the client's label is no image: {error.message}", "", _digest(layer))
    if reference.transport != "docker":
        return Unsaid(f"the client's label names no image of a registry: {image[:80]!r}", "", _digest(layer))
    name = str(reference)
    if not digests.is_digest(chain_id):
        return Unsaid(f"the snapshot that is asked for, {chain_id[:80]!r}, is no chain ID", name, _digest(layer))
    for what, value in (("manifest", manifest), ("layer", layer)):
        if value and not digests.is_digest(value):
            return Unsaid(f"the client's {what} digest {value[:80]!r} is malformed", name, _digest(layer))
    if not layer and not manifest:
        return Unsaid("the client says neither which manifest nor which layer it unpacks", name)
    return Asked(
        chain_id,
        name,
        manifest,
        layer,
        parallel=not parent and bool(labels.get(PARENT_CHAIN)),
        staged=MAX_SIZE in labels,
    )


def _digest(value: str) -> str:
    return value if digests.is_digest(value) else ""
