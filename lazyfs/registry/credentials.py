"""Credentials as `docker login` leaves them: $DOCKER_CONFIG/config.json or ~/.docker/config.json.

Read: `auths` with auth, username and password, or identitytoken. Credential helpers are programs and are not run.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyfs.errors import UsageError

MAX_CONFIG = 1 << 20  # bytes
# All names under which Docker Hub's credentials have been stored; the first is docker login's own.
_HUB = ("index.docker.io", "docker.io", "registry-1.docker.io", "registry.hub.docker.com")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A login for one registry host. `identity_token` replaces the password where it is set. Never logged."""

    username: str
    password: str = field(repr=False)
    identity_token: str = field(repr=False)
    source: Path  # the file they are from

    def basic(self) -> str:
        """Return the value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def config_path() -> Path:
    """Return where Docker's configuration lies for this user."""
    directory = os.environ.get("DOCKER_CONFIG")
    return (Path(directory) if directory else Path(os.path.expanduser("~/.docker"))) / "config.json"


def find_credentials(host: str, path: Path) -> Credentials | None:
    """Return the login for registry `host` ("host[:port]"), None when there is none. Blocking: reads one file.

    Raise UsageError for a file that can't be read or is not what Docker writes.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG + 1)
        document = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"credentials file {path} can't be read: {error}") from None
    auths = document.get("auths") if isinstance(document, dict) else None
    if not isinstance(auths, dict):
        return None
    by_host: dict[str, Any] = {}
    for key, value in auths.items():
        by_host.setdefault(_host_of_key(key), value)
    for name in _HUB if host in _HUB else (host,):
        if isinstance(by_host.get(name), dict):
            return _parse(by_host[name], name, path)
    return None


def _host_of_key(key: str) -> str:
    """The host of "https://host/v1/", "host", or "" for a key of one namespace only ("host/team")."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, rest = bare.partition("/")
    return host if rest.rstrip("/") in ("", "v1", "v2") else ""


def _parse(entry: dict[str, Any], name: str, path: Path) -> Credentials | None:
    username, password = entry.get("username", ""), entry.get("password", "")
    token = entry.get("identitytoken", "")
    encoded = entry.get("auth", "")
    if not all(isinstance(value, str) for value in (username, password, token, encoded)):
        raise UsageError(f"credentials file {path}: the entry for {name} is malformed")
    if encoded:
        try:
            username, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise UsageError(f"credentials file {path}: `auth` of {name} is not base64 of user:password")
        password = password.rstrip("\0")  # docker pads
    if not username and not token:
        return None
    return Credentials(username, password, token, path)
