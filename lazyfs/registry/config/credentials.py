"""Files of logins as docker, podman and skopeo leave them (config.json, auth.json).

Source: containers-auth.json(5) and Docker's documentation of config.json. `auths` holds logins by host, or by a part of
its repositories ("host/team"); `credHelpers` and `credsStore` name programs that are asked instead.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_AUTH_FILE
from lazyfs.registry.config.config_files import read_bounded

# All names under which Docker Hub's credentials have been stored; the first is docker login's own.
_HUB = ("index.docker.io", "docker.io", "registry-1.docker.io", "registry.hub.docker.com")
HUB_SERVERS = ("https://index.docker.io/v1/", "docker.io")  # what programs have been told to keep them under


@dataclass(frozen=True, slots=True)
class Credentials:
    """A login for one registry host. Never logged.

    `identity_token` replaces the password where it is set: it is exchanged for a token. `registry_token` is one.
    """

    username: str
    password: str = field(repr=False)
    identity_token: str = field(repr=False)
    source: str  # the file, the program or the option they are from, for messages
    registry_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """Return the value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class AuthFile:
    """A parsed file. `program` answers for the file's hosts: the name of a credential program, "" for none."""

    path: Path
    auths: dict[str, Any] = field(repr=False)
    helpers: dict[str, str]
    store: str

    def program(self, host: str) -> str:
        """Return the name of the program that keeps the login for `host` ("host[:port]"), "" when none does."""
        by_host: dict[str, str] = {}
        for key, name in self.helpers.items():
            by_host.setdefault(_bare(key), name)
        return next((by_host[name] for name in names_of(host) if name in by_host), self.store)

    def find(self, host: str, repository: str = "") -> Credentials | None:
        """Return the login for a repository: of the longest part of its name that has one, then of the host.

        Raise UsageError for an entry that is malformed.
        """
        by_name: dict[str, Any] = {}
        for key, value in self.auths.items():
            by_name.setdefault(_bare(key), value)
        parts = repository.split("/") if repository else []
        for count in range(len(parts), -1, -1):
            for name in names_of(host):
                full = "/".join((name, *parts[:count]))
                if isinstance(by_name.get(full), dict) and (found := self._parse(by_name[full], full)) is not None:
                    return found
        return None

    def _parse(self, entry: dict[str, Any], name: str) -> Credentials | None:
        username, password = entry.get("username", ""), entry.get("password", "")
        token = entry.get("identitytoken", "")
        encoded = entry.get("auth", "")
        if not all(isinstance(value, str) for value in (username, password, token, encoded)):
            raise UsageError(f"credentials file {self.path}: the entry for {name} is malformed")
        if encoded:
            try:
                username, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
            except (binascii.Error, ValueError):
                colon = ""
            if not colon:
                raise UsageError(f"credentials file {self.path}: `auth` of {name} is not base64 of user:password")
            password = password.rstrip("\0")  # docker pads
        if not username and not token:
            return None
        return Credentials(username, password, token, str(self.path))


def read_auth_file(path: Path) -> AuthFile | None:
    """Return a file of logins, None when there is no such file. Blocking.

    Raise UsageError for a file that can't be read or is not what Docker and podman write.
    """
    raw = read_bounded(path, MAX_AUTH_FILE)
    if raw is None:
        return None
    try:
        document = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError) as error:
        # Only where it breaks: the text itself holds secrets.
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "it is not text"
        raise UsageError(f"credentials file {path} is not JSON ({where})") from None
    if not isinstance(document, dict):
        raise UsageError(f"credentials file {path} is no JSON object")
    auths, helpers, store = document.get("auths"), document.get("credHelpers"), document.get("credsStore")
    for name, value in (("auths", auths), ("credHelpers", helpers)):
        if not isinstance(value, dict | None):
            raise UsageError(f"credentials file {path}: `{name}` is no object")
    helpers = helpers or {}
    if not isinstance(store, str | None) or not all(isinstance(value, str) for value in helpers.values()):
        raise UsageError(f"credentials file {path}: the name of a credential helper is no text")
    return AuthFile(path, auths or {}, helpers, store or "")


def names_of(host: str) -> tuple[str, ...]:
    """All names under which a host's logins may be kept."""
    return _HUB if host in _HUB else (host,)


def _bare(key: str) -> str:
    """A key without its scheme and its API version: "https://host/v1/" is "host", "host/team" stays."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, rest = bare.partition("/")
    rest = rest.rstrip("/")
    return host if rest in ("", "v1", "v2") else f"{host}/{rest}"
