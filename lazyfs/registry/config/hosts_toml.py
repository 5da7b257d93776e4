"""containerd's certs.d/HOST/hosts.toml, and directories of certificates as Docker names them.

Source: containerd's docs/hosts.md. `[host."URL"]` tables are endpoints in the order of the file; `server` (default: the
registry itself), with the keys at the top level, is the last one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_DIAL_TIMEOUT, MAX_HOST_RULES
from lazyfs.registry.config.config_files import Section, read_section
from lazyfs.registry.endpoints import NO_TLS, Tls

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~%!$&'()*+,;=:@-]+)*")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "range", "accept-encoding", "te"})
_CAPABILITIES = frozenset({"pull", "resolve", "push"})
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class HostRule:
    """One endpoint of a hosts.toml. `api` is "" for the last one when the file names no server."""

    api: str
    host: str
    capabilities: frozenset[str] = _CAPABILITIES
    tls: Tls = NO_TLS
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold secrets
    connect_timeout: float = 0.0


@dataclass(frozen=True, slots=True)
class HostRules:
    """A registry's endpoints, mirrors in order and the server last, and the file or directory they are from."""

    rules: tuple[HostRule, ...]
    source: Path


def find_host_rules(directory: Path, host: str) -> HostRules | None:
    """Return what `directory` (a certs.d) says of `host` ("host[:port]"), None when nothing. Blocking.

    Raise UsageError for a hosts.toml that is malformed: containerd would go on without it, and nobody would know.
    """
    for name in _directory_names(host):
        place = directory / name
        section = read_section(place / "hosts.toml")
        if section is not None:
            return HostRules(_parse(section), section.path)
        tls = certificates_in(place)
        if tls is not None:
            return HostRules((HostRule("", "", tls=tls),), place)
    return None


def find_default_rules(directory: Path) -> HostRules | None:
    """Return what `directory` says of registries that it doesn't name: _default/hosts.toml. Blocking."""
    section = read_section(directory / "_default/hosts.toml")
    return HostRules(_parse(section), section.path) if section is not None else None


def find_certificates(directories: tuple[Path, ...], host: str) -> tuple[Tls, Path] | None:
    """Return the certificates that the first of some Docker-like directories has for `host`, and where. Blocking."""
    for directory in directories:
        tls = certificates_in(directory / host)
        if tls is not None:
            return tls, directory / host
    return None


def certificates_in(directory: Path) -> Tls | None:
    """Return a directory's *.crt (authorities) and *.cert with *.key (ours), None when it has none. Blocking.

    Raise UsageError for a *.cert without its *.key.
    """
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        raise UsageError(f"{directory} can't be read: {error.strerror}") from None
    authorities = tuple(directory / name for name in names if name.endswith(".crt"))
    client = []
    for name in names:
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            if key not in names:
                raise UsageError(f"{directory} has {name} without {key}")
            client.append((directory / name, directory / key))
    return Tls(authorities, tuple(client)) if authorities or client else None


def split_server(text: str, *, override_path: bool = False) -> tuple[str, str] | None:
    """Return (API root, "host[:port]") of a server's URL, None when it is none. Without a scheme it is https.

    The root ends with /v2 unless `override_path`.
    """
    if text and not text.startswith(("http://", "https://")):
        text = f"https://{text}"
    try:
        parts = urlsplit(text)
        path = parts.path.rstrip("/")
        if parts.query or parts.fragment or not _HOST.fullmatch(parts.netloc) or (parts.port or 1) > 65535:
            return None
    except ValueError:
        return None
    if not _PATH.fullmatch(path) or "/.." in path or "/./" in path:
        return None
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{parts.netloc}{path}", parts.netloc


def _directory_names(host: str) -> tuple[str, ...]:
    """The directories of a host: "host_port_" for systems whose names can't have colons, then as it is."""
    name, colon, port = host.rpartition(":")
    return (f"{name}_{port}_", host) if colon and port.isdecimal() else (host,)


def _parse(top: Section) -> tuple[HostRule, ...]:
    hosts = top.table("host")
    if len(hosts.values) >= MAX_HOST_RULES:
        raise top.wrong("host", f"has more than {MAX_HOST_RULES - 1} entries")
    found = [_rule(hosts.table(url), url, hosts, url) for url in hosts.values]
    found.append(_rule(top, top.text("server"), top, "server"))
    return tuple(found)


def _rule(section: Section, url: str, named_in: Section, name: str) -> HostRule:
    api = host = ""
    if url or named_in is not section:
        split = split_server(url, override_path=section.flag("override_path"))
        if split is None:
            raise named_in.wrong(name, "is no http or https URL of a host")
        api, host = split
    capabilities = frozenset(word.lower() for word in section.texts("capabilities"))
    if not capabilities <= _CAPABILITIES:
        raise section.wrong("capabilities", "knows pull, resolve and push only")
    tls = Tls(_authorities(section), _client(section), section.flag("skip_verify"))
    return HostRule(api, host, capabilities or _CAPABILITIES, tls, _headers(section), _timeout(section))


def _authorities(section: Section) -> tuple[Path, ...]:
    value = section.values.get("ca", [])
    texts = [value] if isinstance(value, str) else section.texts("ca")
    return tuple(_path(section, "ca", text) for text in texts)


def _client(section: Section) -> tuple[tuple[Path, Path | None], ...]:
    value = section.values.get("client", [])
    pairs: list[tuple[Path, Path | None]] = []
    for one in value if isinstance(value, list) else [value]:
        words = one if isinstance(one, list) else [one]
        if not 1 <= len(words) <= 2 or not all(isinstance(word, str) for word in words):
            raise section.wrong("client", "is no certificate file, nor a list of [certificate, key]")
        key = _path(section, "client", words[1]) if len(words) > 1 and words[1] else None
        pairs.append((_path(section, "client", words[0]), key))
    return tuple(pairs)


def _path(section: Section, name: str, text: str) -> Path:
    if not text or "\0" in text:
        raise section.wrong(name, "holds an empty path")
    return section.path.parent / text


def _headers(section: Section) -> tuple[tuple[str, str], ...]:
    table = section.table("header")
    found = []
    for name, value in table.values.items():
        words = [value] if isinstance(value, str) else table.texts(name)
        joined = ", ".join(words)
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(joined):
            raise table.wrong(name, "is no HTTP header")
        if name.lower() in _OURS:
            raise table.wrong(name, "can't be set: the client needs it for itself")
        found.append((name, joined))
    return tuple(found)


def _timeout(section: Section) -> float:
    text = section.text("dial_timeout")
    if not text:
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise section.wrong("dial_timeout", 'is no duration like "3s"')
    return min(float(match[1]) * _UNITS[match[2]], MAX_DIAL_TIMEOUT)
