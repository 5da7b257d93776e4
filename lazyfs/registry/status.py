"""HTTP statuses as errors, with what the registry said about them."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime

from lazyfs.errors import BadAnswer, BlobMissing, RegistryError, RegistryFault, TooManyRequests, Unauthorized
from lazyfs.registry.transport import Answer

MAX_WORDS = 200  # characters of a registry's own message that are repeated
MAX_WAIT = 86_400.0  # seconds; a Retry-After beyond it says nothing more


def error_for(answer: Answer, missing: type[RegistryError] = BlobMissing) -> RegistryError:
    """Return the error that an unwanted status means; 404 becomes `missing`. Reads the body and closes the answer."""
    said = registry_words(answer.discard())
    host, what, status = answer.host, answer.what, answer.status
    detail = f": {said}" if said else ""
    if status in (401, 403):
        return Unauthorized(host, f"{host} refused {what} ({status}){detail}")
    if status == 404:
        return missing(host, f"{host} has no {what}{detail}")
    if status == 429:
        wait = retry_after(answer.headers.get("Retry-After", ""))
        return TooManyRequests(host, f"{host} was asked too often for {what}{detail}", retry_after=wait)
    if status >= 500 or status == 408:
        wait = retry_after(answer.headers.get("Retry-After", ""))
        return RegistryFault(
            host, f"{host} failed with status {status} when asked for {what}{detail}", status=status, retry_after=wait
        )
    error = BadAnswer(host, f"{host} answered {what} with status {status}{detail}")
    error.temporary = False  # a 4xx or an odd 2xx stays what it is
    return error


def retry_after(header: str) -> float:
    """Return the seconds that a Retry-After header asks for, 0 when absent or without sense (RFC 9110, 10.2.3)."""
    text = header.strip()
    if text.isdecimal() and len(text) < 10:
        return min(float(text), MAX_WAIT)
    try:
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), MAX_WAIT)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def registry_words(body: bytes) -> str:
    """Return the first error's code and message of an error document (distribution spec, "Error Codes"), printable."""
    try:
        first = json.loads(body)["errors"][0]
        words = f"{first.get('code', '')} {first.get('message', '')}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c if c.isprintable() else " " for c in words).strip()[:MAX_WORDS]
