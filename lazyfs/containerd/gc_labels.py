"""Labels by which containerd's garbage collector finds what belongs to an image, and by which it knows where from.

Source: containerd, docs/garbage-collection.md and docs/content-flow.md.
"""

from __future__ import annotations

from lazyfs.limits import MAX_LABEL
from lazyfs.oci import Index, Manifest

UNCOMPRESSED = "containerd.io/uncompressed"  # on a layer's blob: its diff ID, seen when it was applied
_CONTENT = "containerd.io/gc.ref.content."
_SNAPSHOT = "containerd.io/gc.ref.snapshot."
_ORIGIN = "containerd.io/distribution.source."


def of_index(index: Index) -> dict[str, str]:
    """Return the labels by which an index keeps its manifests, those that aren't there too."""
    return {f"{_CONTENT}m.{number}": child.digest for number, child in enumerate(index.manifests)}


def of_manifest(manifest: Manifest) -> dict[str, str]:
    """Return the labels by which a manifest keeps its config and its layers."""
    layers = {f"{_CONTENT}l.{number}": layer.digest for number, layer in enumerate(manifest.layers)}
    return {f"{_CONTENT}config": manifest.config.digest, **layers}


def of_config(snapshotter: str, chain_id: str) -> dict[str, str]:
    """Return the label by which an image's config keeps the snapshots that it was unpacked to."""
    return {f"{_SNAPSHOT}{snapshotter}": chain_id}


def origin(host: str, repository: str, present: dict[str, str]) -> dict[str, str]:
    """Return the label that says which repository of a registry has a blob, beside those that `present` names.

    {} where there is nothing to add, or the label would be too long. The host's port is left out, as containerd does.
    """
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    key = f"{_ORIGIN}{name.strip('[]')}"
    names = {name for name in present.get(key, "").split(",") if name}
    value = ",".join(sorted(names | {repository}))
    return {key: value} if repository not in names and fits(key, value) else {}


def fits(key: str, value: str) -> bool:
    """Tell whether containerd takes this label."""
    return len(key.encode()) + len(value.encode()) <= MAX_LABEL
