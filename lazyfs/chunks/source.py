"""What a layer directory says about itself: where the layer came from and how far it is trusted. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lazyfs import digest as digests
from lazyfs.errors import DocumentInvalid, StoreBroken
from lazyfs.oci import Descriptor, parse_descriptor
from lazyfs.versions import is_readable, is_too_new

VERSION = 1


@dataclass(frozen=True, slots=True)
class LayerSource:
    """The content of a layer's `source` file."""

    descriptor: Descriptor  # as in the manifest, annotations included
    form: str  # "zstd-chunked", "plain" …
    origin: str  # the repository it came from, "host/name"; a new origin replaces it
    diff_id: str  # "sha256:<hex>" that the image config declares; "" when unknown
    verified: bool = False  # the whole check has passed
    verified_at: int = 0  # seconds since the epoch
    quarantine: str = ""  # why nothing may be read from it; empty: it may
    reason: str = ""  # why it is plain although its descriptor promises a TOC
    payload_end: int = 0  # blob offset behind its content, where there is a TOC; 0: unknown
    toc: str = ""  # digest of the `toc` file as it was when it was held against the descriptor; "": unknown


def encode_source(source: LayerSource) -> bytes:
    """Serialise for the `source` file: JSON for people to look at."""
    value = {
        "version": VERSION,
        "descriptor": source.descriptor.to_json(),
        "form": source.form,
        "origin": source.origin,
        "diffId": source.diff_id,
        "verified": source.verified,
        "verifiedAt": source.verified_at,
        "quarantine": source.quarantine,
        "reason": source.reason,
        "payloadEnd": source.payload_end,
        "toc": source.toc,
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def decode_source(raw: bytes) -> LayerSource | None:
    """Parse a `source` file; None for a damaged one, which is rebuilt. Raise StoreBroken for a newer version."""
    try:
        value: Any = json.loads(raw)
        version = value["version"]
        if is_too_new(version, VERSION):
            raise StoreBroken(
                "a layer in the store was written by a newer lazyfs", hint="use that version, or another --root"
            )
        if not is_readable(version, VERSION):
            return None
        diff_id = value["diffId"]
        if diff_id and not digests.is_digest(diff_id):
            return None
        reason, toc = value.get("reason", ""), value.get("toc", "")
        texts = (value["form"], value["origin"], value["quarantine"], reason, toc)
        if not all(isinstance(text, str) for text in texts) or not isinstance(value["verified"], bool):
            return None
        payload_end = value.get("payloadEnd", 0)
        if not isinstance(payload_end, int) or payload_end < 0:
            return None
        return LayerSource(
            parse_descriptor(value["descriptor"], "the descriptor"),
            value["form"],
            value["origin"],
            diff_id,
            value["verified"],
            int(value["verifiedAt"]),
            value["quarantine"],
            reason,
            payload_end,
            toc,
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, DocumentInvalid):
        return None
