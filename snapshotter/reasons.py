"""What can become of a layer at an extraction, in few words for metrics, and what a user can do about it.

The sentence that tells why comes from whoever found out, in the daemon's words; here it gets its class.
"""

from __future__ import annotations

import enum
import re

from lazyfs import errors
from lazyfs.errors import LazyfsError


class Outcome(enum.StrEnum):
    """What became of a layer. All but LAZY and SMALL: it was downloaded in the ordinary way, for this reason."""

    LAZY = "lazy"
    SMALL = "small"  # fetched in full at once, which costs less than a fallback of the layers above it
    NO_TOC = "no_toc"
    UNTRUSTED = "untrusted"  # not of `lazy_from`, or no digest vouches for its TOC
    QUARANTINED = "quarantined"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    BELOW_NOT_LAZY = "below_not_lazy"
    NO_LABELS = "no_labels"
    REGISTRY = "registry"
    TIMEOUT = "timeout"
    LOGIN = "login"
    OFFLINE = "offline"
    DAEMON = "daemon"
    DISK = "disk"
    OTHER = "other"

    @property
    def is_ready(self) -> bool:
        """Whether the layer is a lazy snapshot: nothing had to be downloaded and applied."""
        return self in (Outcome.LAZY, Outcome.SMALL)


_ERRORS: tuple[tuple[type[LazyfsError], Outcome], ...] = (
    (errors.LayerQuarantined, Outcome.QUARANTINED),
    (errors.TrustError, Outcome.MALFORMED),
    (errors.FormatError, Outcome.MALFORMED),
    (errors.ReferenceInvalid, Outcome.MALFORMED),
    (errors.Unauthorized, Outcome.LOGIN),
    (errors.RegistryTimeout, Outcome.TIMEOUT),
    (errors.ReadDeadline, Outcome.TIMEOUT),
    (errors.ImageIncomplete, Outcome.OFFLINE),
    (errors.RegistryError, Outcome.REGISTRY),
    (errors.StoreError, Outcome.DISK),
    (errors.DaemonUnreachable, Outcome.DAEMON),
    (errors.DaemonFault, Outcome.DAEMON),
    (errors.FuseUnavailable, Outcome.DAEMON),
    (errors.MountFailed, Outcome.DAEMON),
)

# Phrases of the sentences that the daemon and we ourselves give as reasons; the first one that fits decides.
_PHRASES: tuple[tuple[str, Outcome], ...] = (
    (r"below it is not lazy", Outcome.BELOW_NOT_LAZY),
    (r"quarantined", Outcome.QUARANTINED),
    (r"lazy_from|not trusted|no digest vouches|not checked in full", Outcome.UNTRUSTED),
    (r"more than the \d+ allowed|too large", Outcome.TOO_LARGE),
    (r"has no TOC|too small to have a TOC|without a TOC|no table of contents", Outcome.NO_TOC),
    (r"no label|labels|annotations? of the extraction", Outcome.NO_LABELS),
    (r"deadline|not within|in time|timed out|no bytes within", Outcome.TIMEOUT),
    (r"credential|unauthori[sz]ed|login", Outcome.LOGIN),
    (r"offline|must not be asked", Outcome.OFFLINE),
    (r"lazyfsd", Outcome.DAEMON),
    (r"no space|disk|store", Outcome.DISK),
    (r"annotation|zstd:chunked|TOC|footer|digest|sparse|frame|malformed|manifest", Outcome.MALFORMED),
    (r"registry|host|connection|answer|refused|reset|HTTP|blob", Outcome.REGISTRY),
)
_SEARCHES = tuple((re.compile(phrase, re.IGNORECASE), outcome) for phrase, outcome in _PHRASES)

ADVICE: dict[Outcome, str] = {
    Outcome.LAZY: "",
    Outcome.SMALL: "",
    Outcome.NO_TOC: "convert the image: lazyfs convert SOURCE DESTINATION, and deploy the result",
    Outcome.UNTRUSTED: "add its repository to lazy_from in the settings if you trust it; a converted image vouches for "
    "its TOCs",
    Outcome.QUARANTINED: "its bytes are not what it promised: ask whoever built it, and convert or push it anew",
    Outcome.MALFORMED: "convert the image anew: lazyfs convert SOURCE DESTINATION",
    Outcome.TOO_LARGE: "build it with fewer files in a layer",
    Outcome.BELOW_NOT_LAZY: "see the layer below it: once that one is lazy this one can be",
    Outcome.NO_LABELS: "pull with lazyfs pull, or set disable_snapshot_annotations = false in containerd's config",
    Outcome.REGISTRY: "remove the image and pull it again once its registry answers; lazyfs status shows hosts in "
    "trouble",
    Outcome.TIMEOUT: "remove the image and pull it again, or raise prepare_timeout in the settings",
    Outcome.LOGIN: "give the node a login for the registry, then remove the image and pull it again",
    Outcome.OFFLINE: "have the image whole on this node first: lazyfs fetch IMAGE",
    Outcome.DAEMON: "see that lazyfsd runs (lazyfs status, lazyfs doctor), then remove the image and pull it again",
    Outcome.DISK: "make room for the store: lazyfs cache prune, or another root in the settings",
    Outcome.OTHER: "",
}


def classify(reason: LazyfsError | str) -> Outcome:
    """Return the class of a reason: an error that ended an attempt, or a sentence that the daemon gave.

    Never LAZY or SMALL. A sentence that nothing here knows is OTHER.
    """
    if isinstance(reason, LazyfsError):
        for kind, outcome in _ERRORS:
            if isinstance(reason, kind):
                return outcome
        reason = str(reason)
    return next((outcome for search, outcome in _SEARCHES if search.search(reason)), Outcome.OTHER)
