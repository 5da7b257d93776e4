"""Where the decision on a layer goes: records (for `lazyfs why`), metrics and log. A fallback is never silent."""

from __future__ import annotations

import logging

from lazyfs.errors import StoreError
from lazyfs.log import fields
from snapshotter.extraction import Decision
from snapshotter.metrics import Metrics
from snapshotter.reasons import Outcome
from snapshotter.store_reasons import ReasonStore

log = logging.getLogger(__name__)


class Noting:
    """Call it with each decision. Thread-safe; blocks on the local disk; raises nothing."""

    def __init__(self, store: ReasonStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    def __call__(self, decision: Decision) -> None:
        """Note one decision. A disk that is full loses its record, not the pull."""
        outcome = decision.outcome
        self._metrics.note_layer(outcome, decision.seconds)
        about = fields(
            image=decision.image,
            layer=decision.layer,
            snapshot=decision.key,
            outcome=outcome.value,
            seconds=decision.seconds,
        )
        reason = "" if outcome is Outcome.LAZY else decision.reason or outcome.value.replace("_", " ")
        if outcome.is_ready:
            log.info("lazy" if outcome is Outcome.LAZY else "small, fetched in full", extra=about)
        else:
            log.info("not lazy: %s", reason, extra=about)
        try:
            self._store.note_reason(decision.image, decision.layer, decision.key, reason, outcome.is_ready)
        except StoreError as error:
            log.warning("why a layer is lazy or not is not recorded: %s", error, extra=about)
