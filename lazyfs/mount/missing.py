"""What to say, and whether to go on, where an image's registry can't be asked and bytes of the image are not here."""

from __future__ import annotations

from lazyfs.chunks.census import Census, HeldLayer
from lazyfs.errors import ImageIncomplete
from lazyfs.mount.resolving import Pull, Resolved
from lazyfs.reference import Reference
from lazyfs.units import format_size

_SHOWN = 3  # layers named in a sentence


def check(census: Census, reference: Reference, resolved: Resolved, pull: Pull) -> list[str]:
    """Return remarks on what is missing of an image whose registry does not answer. Blocking (local disk).

    Bytes that are missing may come yet, when the registry is back; without its tables a layer can't be shown: then, and
    where the registry must not be asked at all, raise ImageIncomplete.
    """
    if not resolved.stale and pull is not Pull.NEVER:
        return []
    gone = census.missing(resolved.manifest)
    reason = resolved.stale
    if gone and (pull is Pull.NEVER or not all(layer.full for layer in gone)):
        raise incomplete(reference, gone, reason)
    if not resolved.stale:
        return []
    note = f"the registry does not answer ({reason}): using what {reference} was last"
    return [f"{note}; {describe(gone)}" if gone else note]


def describe(gone: list[HeldLayer]) -> str:
    """Return how many bytes of which layers are not here, as the end of a sentence."""
    shown = [
        f"{layer.digest[:19]}…: {format_size(layer.missing)} of {format_size(layer.full or layer.size)}"
        for layer in gone[:_SHOWN]
    ]
    more = [f"and {len(gone) - _SHOWN} more"] if len(gone) > _SHOWN else []
    total = format_size(sum(layer.missing for layer in gone))
    layers = "1 layer is" if len(gone) == 1 else f"{len(gone)} layers are"
    return f"{total} of {layers} not here ({', '.join(shown + more)})"


def incomplete(reference: Reference, gone: list[HeldLayer], reason: str) -> ImageIncomplete:
    """Return the error for an image that is not whole here. `reason`: why not to ask; "": nobody must be asked."""
    what = describe(gone) if gone else "its config is not here"
    silent = f"its registry does not answer ({reason})" if reason else "its registry must not be asked"
    return ImageIncomplete(
        reference.host,
        f"{reference} is not whole on this node and {silent}: {what}",
        hint="lazyfs fetch it while the registry can be reached",
    )
