"""How long a registry asks us to wait. Pure."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime

from lazyfs.limits import MAX_WAIT


def retry_after(header: str) -> float:
    """Return the seconds that a Retry-After header asks for, 0 when absent or without sense (RFC 9110, 10.2.3)."""
    text = header.strip()
    if text.isdecimal() and len(text) < 10:
        return min(float(text), MAX_WAIT)
    try:
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), MAX_WAIT)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
