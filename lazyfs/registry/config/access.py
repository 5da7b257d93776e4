"""Which logins, certificates and configuration files hold for a command, as a value that travels to the daemon.

The command's flags and environment decide the paths; whoever opens a repository reads the files, and reads them again
when it needs to. Explicit logins travel by value, in memory only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_VARIABLE, MAX_VARIABLES

CERTS_DIR = Path("/etc/containerd/certs.d")
# What credential programs may look at. Clouds' own variables carry the identity that their programs log in with.
_PASSED = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "DOCKER_CONFIG", "GNUPGHOME", "PASSWORD_STORE_DIR"),
        *("DBUS_SESSION_BUS_ADDRESS", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    }
)
_PASSED_PREFIXES = ("XDG_", "AWS_", "GOOGLE_", "CLOUDSDK_", "AZURE_")


@dataclass(frozen=True, slots=True)
class Login:
    """A user's name and password as given on the command line."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Access:
    """Where to look for what registries want, each list in order of preference. Paths are absolute.

    `login`, `client` and `skip_verify` hold for the registry that the reference names, never for its mirrors; `ca` is
    trusted for all. `auth_files` are looked at one after another; with `auth_file_given` a missing one is an error.
    `certs_dirs` are like containerd's certs.d, `cert_dirs` like Docker's (no hosts.toml). `registries_conf` are files
    of podman's format or directories of *.conf, later ones overriding earlier ones. `environment` is what credential
    programs get. `node`: nobody's in particular, but the node's, so what its image service was told holds, too; it does
    not travel.
    """

    login: Login | None = None
    auth_files: tuple[Path, ...] = ()
    auth_file_given: bool = False
    certs_dirs: tuple[Path, ...] = ()
    cert_dirs: tuple[Path, ...] = ()
    registries_conf: tuple[Path, ...] = ()
    ca: tuple[Path, ...] = ()
    client: tuple[Path, Path | None] | None = None
    skip_verify: bool = False
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    node: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the value for the control socket. It holds secrets: never log or store it."""
        return {
            "login": [self.login.username, self.login.password] if self.login else None,
            "auth_files": [str(path) for path in self.auth_files],
            "auth_file_given": self.auth_file_given,
            "certs_dirs": [str(path) for path in self.certs_dirs],
            "cert_dirs": [str(path) for path in self.cert_dirs],
            "registries_conf": [str(path) for path in self.registries_conf],
            "ca": [str(path) for path in self.ca],
            "client": [str(path) for path in self.client if path] if self.client else None,
            "skip_verify": self.skip_verify,
            "environment": dict(self.environment),
        }


def from_json(document: object) -> Access:
    """Return what `to_json` was called on; names it doesn't know are passed over. Raise UsageError without a secret."""
    if not isinstance(document, dict):
        raise UsageError("`access` is no object")
    login, client, variables = document.get("login"), document.get("client"), document.get("environment", {})
    if login is not None and not (isinstance(login, list) and len(login) == 2 and _all_text(login)):
        raise UsageError("`access`: login is no pair of texts")
    if client is not None and not (isinstance(client, list) and 1 <= len(client) <= 2 and _all_text(client)):
        raise UsageError("`access`: client is no certificate with its key")
    if not isinstance(variables, dict) or not _all_text(list(variables.values())):
        raise UsageError("`access`: environment is no object of texts")
    return Access(
        login=Login(*login) if login else None,
        auth_files=_paths(document, "auth_files"),
        auth_file_given=bool(document.get("auth_file_given")),
        certs_dirs=_paths(document, "certs_dirs"),
        cert_dirs=_paths(document, "cert_dirs"),
        registries_conf=_paths(document, "registries_conf"),
        ca=_paths(document, "ca"),
        client=(Path(client[0]), Path(client[1]) if len(client) > 1 else None) if client else None,
        skip_verify=bool(document.get("skip_verify")),
        environment=tuple(sorted(variables.items())),
    )


def from_environment(variables: Mapping[str, str] | None = None, *, certs_dir: Path = CERTS_DIR) -> Access:
    """Return what an environment (default: this process's) says without any flag. Blocking: looks for one file.

    Sources: containers-auth.json(5), containers-registries.conf(5), containers-certs.d(5), Docker's command line.
    """
    found = os.environ if variables is None else variables
    home = Path(found.get("HOME") or os.path.expanduser("~"))
    user = Path(found.get("XDG_CONFIG_HOME") or home / ".config") / "containers"
    named = found.get("REGISTRY_AUTH_FILE")
    return Access(
        auth_files=(_absolute(named),) if named else _auth_files(found, home, user),
        certs_dirs=(certs_dir,),
        cert_dirs=(user / "certs.d", Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d")),
        registries_conf=_registries_conf(found, user),
        environment=_for_programs(found),
    )


def of_node(certs_dir: Path = CERTS_DIR) -> Access:
    """Return what holds where nobody says otherwise: this process's environment, and the node's logins."""
    return replace(from_environment(certs_dir=certs_dir), node=True)


def parse_login(text: str, where: str) -> Login:
    """Return the login that "USER:PASSWORD" says. Raise UsageError that doesn't repeat it."""
    username, colon, password = text.rstrip("\r\n").partition(":")
    if not colon or not username:
        raise UsageError(f"{where} does not hold USER:PASSWORD")
    if any(ord(c) < 32 for c in username + password):
        raise UsageError(f"{where} holds control characters")
    return Login(username, password)


def _auth_files(found: Mapping[str, str], home: Path, user: Path) -> tuple[Path, ...]:
    runtime = Path(found.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.geteuid()}")
    first = runtime / "containers/auth.json" if found.get("XDG_RUNTIME_DIR") else runtime / "auth.json"
    docker = found.get("DOCKER_CONFIG")
    return (first, user / "auth.json", (_absolute(docker) if docker else home / ".docker") / "config.json")


def _registries_conf(found: Mapping[str, str], user: Path) -> tuple[Path, ...]:
    """A user's own file replaces the system's with its directory; the user's directory comes on top of both."""
    named, directory = found.get("CONTAINERS_REGISTRIES_CONF"), found.get("CONTAINERS_REGISTRIES_CONF_DIR")
    system = Path("/etc/containers")
    own, above = user / "registries.conf", user / "registries.conf.d"
    if not named and not directory and os.path.exists(own):
        return (own, above)
    first = _absolute(named) if named else own if os.path.exists(own) else system / "registries.conf"
    return (first, _absolute(directory)) if directory else (first, system / "registries.conf.d", above)


def _for_programs(found: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    kept = []
    room = MAX_VARIABLES
    for name, value in sorted(found.items(), key=lambda item: (item[0] not in _PASSED, item[0])):
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES)) and len(value) <= min(MAX_VARIABLE, room):
            kept.append((name, value))
            room -= len(value)
    return tuple(sorted(kept))


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _paths(document: dict[str, Any], name: str) -> tuple[Path, ...]:
    values = document.get(name, [])
    if not isinstance(values, list) or not _all_text(values):
        raise UsageError(f"`access`: {name} is no list of paths")
    return tuple(Path(value) for value in values)


def _all_text(values: list[object]) -> bool:
    return all(isinstance(value, str) and "\0" not in value for value in values)
