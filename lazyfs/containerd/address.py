"""Which containerd, and which namespace of it, when a reference does not say."""

from __future__ import annotations

import os
import re

from lazyfs.errors import UsageError

SOCKET = "/run/containerd/containerd.sock"
NAMESPACE = "default"
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")  # containerd: pkg/identifiers
_MAX_NAME = 76  # characters
_MAX_SOCKET = 107  # bytes of a Unix socket's path


def socket_path(given: str = "") -> str:
    """Return the absolute path of containerd's socket: `given`, else $CONTAINERD_ADDRESS, else the usual one.

    Raise UsageError for an address of another kind.
    """
    address = given or os.environ.get("CONTAINERD_ADDRESS") or SOCKET
    path = address.removeprefix("unix://")
    if "://" in path or path.startswith("@"):
        raise UsageError(f"containerd's address {address[:200]!r} is no socket's path", hint="such as " + SOCKET)
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > _MAX_SOCKET:
        raise UsageError(f"containerd's address is longer than the {_MAX_SOCKET} bytes that a socket's path may have")
    return path


def namespace_name(given: str = "") -> str:
    """Return the namespace: `given`, else $CONTAINERD_NAMESPACE, else "default".

    Raise UsageError for what containerd takes for none.
    """
    name = given or os.environ.get("CONTAINERD_NAMESPACE") or NAMESPACE
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:100]!r} is not a containerd namespace",
            hint=f"letters, digits, and single . _ - between them; at most {_MAX_NAME}",
        )
    return name
