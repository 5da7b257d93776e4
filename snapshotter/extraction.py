"""Whether a layer that containerd wants extracted is there already, lazily, or must be downloaded, and why.

The first layer of an image that is asked for has the whole image resolved, and waits for itself and what is below it;
the others find the answer, or ask for it once more. Never an error: what can't be lazy is pulled in the ordinary way,
and the reason is recorded.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future
from dataclasses import dataclass

from lazyfs.errors import LazyfsError
from lazyfs.limits import MAX_EXTRACTIONS
from snapshotter import labels as told
from snapshotter.labels import Asked, Unsaid
from snapshotter.model import LazyImage, LazyOffer
from snapshotter.reasons import Outcome, classify
from snapshotter.remote import ResolvedChain

log = logging.getLogger(__name__)

_GOOD = 600.0  # seconds for which an answer holds when all layers are ready: about a pull
_BAD = 30.0  # seconds for which it holds otherwise: the other layers of the same pull need not ask again


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one layer, for the record, the log and the metrics."""

    image: str
    layer: str  # blob digest, "" when nobody said it
    key: str
    outcome: Outcome
    reason: str  # a sentence; "" for a lazy layer
    seconds: float


@dataclass(slots=True)
class _Known:
    answer: Future[ResolvedChain]
    since: float = 0.0  # when the answer came (monotonic)


class Extraction:
    """Decides. Thread-safe; `offer` blocks until a layer and those below it are settled, `prepare_timeout` and the
    daemon's slack (8 s) at most.

    `resolve` asks the daemon (image, manifest digest, chain ID of the layer that is waited for); `number` puts an image
    into the records; `note` is told of every decision.
    """

    def __init__(
        self,
        resolve: Callable[[str, str, str], ResolvedChain],
        number: Callable[[LazyImage], LazyImage],
        note: Callable[[Decision], None],
    ) -> None:
        self._resolve = resolve
        self._number = number
        self._note = note
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def offer(self, key: str, parent: str, labels: Mapping[str, str]) -> LazyOffer | None:
        """Return the lazy snapshot that stands for this layer, None where it must be downloaded."""
        began = time.monotonic()
        asked = told.read(labels, parent)
        if isinstance(asked, Unsaid):
            self._decide(key, asked.image, asked.layer_digest, Outcome.NO_LABELS, asked.reason, began)
            return None
        try:
            chain = self._chain(asked)
            index = _find(chain, asked)
            if index is None and not asked.manifest_digest:  # the tag may be another image's since then
                chain = self._chain(asked, good=_BAD)
                index = _find(chain, asked)
        except LazyfsError as error:
            self._decide(key, asked.image, asked.layer_digest, classify(error), str(error), began)
            return None
        if index is None:
            reason = "the manifest that the registry has names no such layer in this place"
            self._decide(key, asked.image, asked.layer_digest, Outcome.MALFORMED, reason, began)
            return None
        found = chain.layers[index]
        below = next((number for number in range(index + 1) if not chain.layers[number].ready), None)
        if below == index:
            self._decide(key, asked.image, found.layer.digest, classify(found.reason), found.reason, began)
            return None
        if below is not None:
            under = chain.layers[below]
            reason = f"layer {under.layer.digest[:19]}… below it is not lazy: {under.reason}"
            self._decide(key, asked.image, found.layer.digest, Outcome.BELOW_NOT_LAZY, reason, began)
            return None
        image = LazyImage(0, asked.image, chain.manifest_digest, tuple(one.layer for one in chain.layers))
        outcome = Outcome.LAZY if found.lazy else Outcome.SMALL
        self._decide(key, asked.image, found.layer.digest, outcome, found.reason, began)
        return LazyOffer(image, index, dict(labels), staged=asked.parallel and asked.staged)

    def forget(self, gone: Set[str]) -> None:
        """Forget the answers that promise one of these layers (blob digests): they are about to be removed.

        An answer that says why an image can't be lazy stays, or each of its layers would ask its registry again.
        """
        with self._lock:
            for key in [key for key, known in self._known.items() if _promises(known, gone)]:
                del self._known[key]

    # -- parts

    def _chain(self, asked: Asked, good: float = _GOOD) -> ResolvedChain:
        """Return what is known of the image, asking once whoever comes at the same time. Raise LazyfsError.

        `good`: seconds for which an answer without a fault holds. Blocking: as long as the daemon is asked for this
        layer, and before for another one.
        """
        while True:
            known, ours = self._take(asked, good)
            if ours:
                self._ask(asked, known)
            found = known.answer.result()
            if ours or _tells(found, asked.chain_id):
                return found

    def _take(self, asked: Asked, good: float) -> tuple[_Known, bool]:
        """Return the answer that there is or will be; True: to be asked for by us."""
        key = (asked.image, asked.manifest_digest)
        with self._lock:
            known = self._known.get(key)
            if known is not None and not _is_old(known, asked, time.monotonic(), good):
                return known, False
            known = self._known[key] = _Known(Future())
            self._known.move_to_end(key)
            while len(self._known) > MAX_EXTRACTIONS:
                self._known.popitem(last=False)
        return known, True

    def _ask(self, asked: Asked, known: _Known) -> None:
        try:
            found = self._resolve(asked.image, asked.manifest_digest, asked.chain_id)
            # Once an answer, not once a layer. What was fetched for layers that no snapshot will stand for is given
            # back with this record.
            layers = tuple(one.layer for one in found.layers)
            self._number(LazyImage(0, asked.image, found.manifest_digest, layers))
            known.since = time.monotonic()
            known.answer.set_result(found)
        except BaseException as error:
            known.since = time.monotonic()
            known.answer.set_exception(error)
            if not isinstance(error, LazyfsError):
                with self._lock:
                    self._known.pop((asked.image, asked.manifest_digest), None)

    def _decide(self, key: str, image: str, layer: str, outcome: Outcome, reason: str, began: float) -> None:
        self._note(Decision(image, layer, key, outcome, reason, time.monotonic() - began))


def _is_old(known: _Known, asked: Asked, now: float, good: float) -> bool:
    """Tell whether an answer must be asked for again. One that is not there yet need not."""
    if not known.answer.done():
        return False
    if known.answer.exception() is not None:
        return now - known.since > _BAD
    found = known.answer.result()
    if not _tells(found, asked.chain_id):
        return True
    return now - known.since > (good if all(one.ready for one in found.layers) else _BAD)


def _tells(found: ResolvedChain, chain_id: str) -> bool:
    """Tell whether an answer says what became of this layer and those below it, or that there is no such layer."""
    for number, one in enumerate(found.layers):
        if one.layer.chain_id == chain_id:
            return all(below.settled for below in found.layers[: number + 1])
    return True


def _promises(known: _Known, gone: Set[str]) -> bool:
    """Tell whether an answer offers one of these layers. One that is not there yet may."""
    if not known.answer.done():
        return True
    if known.answer.exception() is not None:
        return False
    offered = itertools.takewhile(lambda one: one.ready or not one.settled, known.answer.result().layers)
    return any(one.layer.digest in gone for one in offered)


def _find(chain: ResolvedChain, asked: Asked) -> int | None:
    """Return which layer of the image is asked for: that of its chain ID, and of its digest where one was said."""
    for index, one in enumerate(chain.layers):
        if one.layer.chain_id == asked.chain_id and asked.layer_digest in ("", one.layer.digest):
            return index
    return None
