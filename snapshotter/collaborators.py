"""What a server is put together with: who decides about layers, shows chains and collects, in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from lazyfs.config import Settings
from snapshotter import parts
from snapshotter.directories import Directories
from snapshotter.service import NoteCall, no_note
from snapshotter.store import Store

Handler: TypeAlias = "grpc.GenericRpcHandler[Any, Any]"  # generic in its stubs alone


@dataclass(frozen=True, slots=True)
class Collaborators:
    """Who decides, shows and collects; and what is to be stopped with the server, first to last."""

    extraction: parts.Extraction
    chains: parts.Chains
    collector: parts.Collector
    close: tuple[Callable[[], None], ...] = ()
    handlers: tuple[Handler, ...] = ()  # further services on the same socket
    note_call: NoteCall = no_note


Connect = Callable[[Settings, Store, Directories], Collaborators]


def no_collaborators(settings: Settings, store: Store, directories: Directories) -> Collaborators:
    """Return stand-ins: every snapshot is an ordinary one, and nothing is given back."""
    return Collaborators(parts.NoExtraction(), parts.NoChains(), parts.NoCollector())
