"""podman's registries.conf: which registries are blocked, remapped, insecure, or have mirrors.

Source: containers-registries.conf(5), version 2; of version 1 the lists of insecure and blocked registries are taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_CONF_FILES, MAX_MIRRORS
from lazyfs.registry.config.config_files import Section, read_section

# The sentinel in `credential-helpers` that stands for the files of logins.
AUTH_FILES = "containers-auth.json"
# Files of short names alone are common and long: parsing one would take a start two milliseconds.
_OF_USE = re.compile(
    rb"""^[ \t]*(?:\[[ \t]*\[?[ \t]*["']?registr"""
    rb"""|["']?(?:registry|registries|credential-helpers)["']?[ \t]*(?:\.|=[ \t]*[\[{]))""",
    re.MULTILINE,
)
_LOCATION = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[a-z0-9._-]+)*"
)
_PREFIX = re.compile(r"(?:\*\.)?[A-Za-z0-9\[](?:[A-Za-z0-9._:@/\[\]-]*)")


class PullBy(Enum):
    """For which references a mirror is asked."""

    ALL = "all"
    DIGEST = "digest-only"
    TAG = "tag-only"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a repository lies: "host[:port][/path]" takes the place of the prefix. "" leaves the name as it is."""

    text: str
    insecure: bool = False
    pull_by: PullBy = PullBy.ALL


@dataclass(frozen=True, slots=True)
class RegistryRule:
    """A [[registry]] table: what holds for names that begin with `prefix`."""

    prefix: str
    location: Location
    mirrors: tuple[Location, ...]
    blocked: bool
    source: Path

    def rewrite(self, name: str, location: Location) -> str:
        """Return "host/repository" at `location` of a `name` that the prefix matches."""
        return location.text + name[_matched(self.prefix, name) :] if location.text else name


@dataclass(frozen=True, slots=True)
class RegistriesConf:
    """All files taken together. `helpers` are credential programs by name, in order, perhaps with AUTH_FILES."""

    rules: tuple[RegistryRule, ...] = ()
    helpers: tuple[str, ...] = ()
    helpers_source: Path | None = None

    def match(self, name: str) -> RegistryRule | None:
        """Return the rule for "host/repository": the one with the longest prefix."""
        fitting = [rule for rule in self.rules if _matched(rule.prefix, name) >= 0]
        return max(fitting, key=lambda rule: len(rule.prefix), default=None)


def read_registries_conf(paths: tuple[Path, ...]) -> RegistriesConf:
    """Read files, and directories of *.conf in the order of their names; later ones override earlier ones. Blocking.

    Missing ones are passed over. Raise UsageError with the file and the key for what is malformed.
    """
    rules: dict[str, RegistryRule] = {}
    helpers: tuple[str, ...] = ()
    source: Path | None = None
    for path in _files(paths):
        section = read_section(path, _OF_USE)
        if section is None:
            continue
        rules |= {rule.prefix: rule for rule in _version_1(section)}
        rules |= {rule.prefix: rule for rule in map(_rule, section.tables("registry"))}
        if "credential-helpers" in section.values:
            helpers, source = tuple(section.texts("credential-helpers")), path
    return RegistriesConf(tuple(rules.values()), helpers, source)


def _files(paths: tuple[Path, ...]) -> list[Path]:
    found = []
    for path in paths:
        try:
            inside = sorted(path.glob("*.conf")) if path.is_dir() else [path]
        except PermissionError:
            continue  # a home that isn't ours
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}") from None
        if len(inside) > MAX_CONF_FILES:
            raise UsageError(f"{path} holds more than {MAX_CONF_FILES} files")
        found += inside
    return found


def _matched(prefix: str, name: str) -> int:
    """How many characters of `name` a prefix stands for, -1 when it doesn't match."""
    if prefix.startswith("*."):
        host = name.partition("/")[0]
        return len(host) if host.partition(":")[0].endswith(prefix[1:]) or host.endswith(prefix[1:]) else -1
    if not name.startswith(prefix) or name[len(prefix) : len(prefix) + 1] not in ("", "/", ":", "@"):
        return -1
    return len(prefix)


def _rule(section: Section) -> RegistryRule:
    location = _location(section)
    prefix = section.text("prefix").rstrip("/") or location.text
    if not prefix:
        raise section.wrong("location", "is missing, and so is prefix")
    if not _PREFIX.fullmatch(prefix):
        raise section.wrong("prefix", "is neither HOST[:PORT][/PATH] nor *.DOMAIN")
    if not location.text and not prefix.startswith("*."):
        raise section.wrong("location", "is missing, which only a prefix of *.DOMAIN allows")
    tables = section.tables("mirror")
    if len(tables) > MAX_MIRRORS:
        raise section.wrong("mirror", f"has more than {MAX_MIRRORS} entries")
    by_digest = section.flag("mirror-by-digest-only")
    return RegistryRule(
        prefix,
        location,
        tuple(_mirror(table, by_digest) for table in tables),
        section.flag("blocked"),
        section.path,
    )


def _mirror(section: Section, by_digest: bool) -> Location:
    location = _location(section)
    if not location.text:
        raise section.wrong("location", "is missing")
    text = section.text("pull-from-mirror")
    if text and by_digest:
        raise section.wrong("pull-from-mirror", "can't be set where mirror-by-digest-only is")
    try:
        pull_by = PullBy(text) if text else PullBy.DIGEST if by_digest else PullBy.ALL
    except ValueError:
        raise section.wrong("pull-from-mirror", "is none of all, digest-only and tag-only") from None
    return Location(location.text, location.insecure, pull_by)


def _location(section: Section) -> Location:
    text = section.text("location").rstrip("/")
    if "://" in text:
        raise section.wrong("location", "has a scheme; write HOST[:PORT][/PATH] alone")
    if text and not _LOCATION.fullmatch(text):
        raise section.wrong("location", "is no HOST[:PORT][/PATH]")
    return Location(text, section.flag("insecure"))


def _version_1(section: Section) -> list[RegistryRule]:
    """The rules of a file of version 1; its search list is of no use to complete references."""
    table = section.table("registries")
    insecure = table.table("insecure").texts("registries")
    blocked = table.table("block").texts("registries")
    return [
        RegistryRule(name, Location(name, name in insecure), (), name in blocked, section.path)
        for name in dict.fromkeys(insecure + blocked)
    ]
