"""Errors as JSON between our own processes: child to daemon, daemon to command line. Class, sentence, hint."""

from __future__ import annotations

from typing import Any

from lazyfs import errors
from lazyfs.errors import LazyfsError


def encode_error(error: LazyfsError) -> dict[str, Any]:
    """Return an error as a JSON object."""
    return {
        "class": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
    }


def decode_error(value: object, default: type[LazyfsError]) -> LazyfsError:
    """Return the error that an object from `encode_error` tells of; of class `default` when it names none of ours.

    Only message and hint are carried over, so that the sentence is the same on both sides; a constructor's own
    attributes are not set.
    """
    found = value if isinstance(value, dict) else {}
    kind = getattr(errors, str(found.get("class")), None)
    if not (isinstance(kind, type) and issubclass(kind, LazyfsError)):
        kind = default
    error = kind.__new__(kind)
    LazyfsError.__init__(error, str(found.get("message", "no reason was given")), hint=str(found.get("hint", "")))
    return error
