"""HTTP statuses as errors, with what the registry said about them."""

from __future__ import annotations

import json

from lazyfs.errors import BadAnswer, BlobMissing, RegistryError, RegistryFault, TooManyRequests, Unauthorized
from lazyfs.limits import MAX_REGISTRY_WORDS, MAX_WAIT
from lazyfs.registry.http.tls import wants_certificate
from lazyfs.registry.http.transport import Answer
from lazyfs.registry.http.waits import retry_after

__all__ = ["MAX_WAIT", "error_for", "registry_words", "retry_after"]

# What nginx and Apache's kin say after the handshake, where others end it.
_NO_CERTIFICATE = (b"No required SSL certificate was sent", b"The SSL certificate error")


def error_for(answer: Answer, missing: type[RegistryError] = BlobMissing) -> RegistryError:
    """Return the error that an unwanted status means; 404 becomes `missing`. Reads the body and closes the answer."""
    body = answer.discard()
    said = registry_words(body)
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
    if status == 400 and any(words in body for words in _NO_CERTIFICATE):
        sentence, hint = wants_certificate(host)
        return Unauthorized(host, sentence, hint=hint)
    error = BadAnswer(host, f"{host} answered {what} with status {status}{detail}")
    error.temporary = False  # a 4xx or an odd 2xx stays what it is
    return error


def registry_words(body: bytes) -> str:
    """Return the first error's code and message of an error document (distribution spec, "Error Codes"), printable."""
    try:
        first = json.loads(body)["errors"][0]
        words = f"{first.get('code', '')} {first.get('message', '')}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c if c.isprintable() else " " for c in words).strip()[:MAX_REGISTRY_WORDS]
