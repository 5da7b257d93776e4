"""Which login an endpoint gets: the flags, the node's, then credential programs and files in podman's order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass

from lazyfs.errors import UsageError
from lazyfs.registry.config.access import Access
from lazyfs.registry.config.credential_programs import CredentialPrograms
from lazyfs.registry.config.credentials import HUB_SERVERS, Credentials, names_of, read_auth_file
from lazyfs.registry.config.node_logins import NodeLogins
from lazyfs.registry.config.registries_conf import AUTH_FILES, read_registries_conf
from lazyfs.registry.endpoints import Endpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A login, or why there is none: `tried` says where was looked, in words for a message."""

    credentials: Credentials | None
    tried: str


class Logins:
    """The logins of one endpoint. Files are read at each call, so what `docker login` changes holds at once.

    `node`: what the node's image service was told; asked where `access` is the node's, not for mirrors of hosts.toml.
    """

    def __init__(
        self, access: Access, endpoint: Endpoint, programs: CredentialPrograms, node: NodeLogins | None = None
    ) -> None:
        self._access = access
        self._host = endpoint.credentials_host
        self._repository = endpoint.repository
        self._explicit = access.login if endpoint.origin else None
        self._programs = programs
        # What stands in for another registry is not what a login was made for. Looked up is the host that is asked.
        self._node = node if access.node and not endpoint.namespace else None

    @property
    def of_node(self) -> bool:
        """Whether the node's logins are asked: then there may be another behind one that is refused."""
        return self._node is not None

    def find(self, deadline: float, *, fresh: bool = False, refused: Collection[Credentials] = ()) -> Found:
        """Return the login. Blocking: reads files and may run a program, until `deadline` at most.

        `fresh`: what programs said before is not good enough. A program that fails is passed over, and told about when
        nothing else has a login. The node's logins in `refused` are passed over. Raise UsageError for a file that is
        malformed or was named and is missing.
        """
        if self._explicit is not None:
            given = Credentials(self._explicit.username, self._explicit.password, "", "the command line")
            return Found(given, f"the login for {self._host} from the command line")
        if self._node is not None:
            told = self._node.find(self._host, self._repository, refused)
            if told is not None:
                return Found(told, f"the login for {self._host} from {told.source}")
        problems: list[str] = []
        not_before = time.monotonic() if fresh else 0.0
        conf = read_registries_conf(self._access.registries_conf)
        order = conf.helpers if AUTH_FILES in conf.helpers else (*conf.helpers, AUTH_FILES)
        for name in order:
            found = (
                self._from_files(deadline, not_before, problems)
                if name == AUTH_FILES
                else self._from_program(name, deadline, not_before, problems)
            )
            if found is not None:
                return Found(found, f"the login for {self._host} from {found.source}")
        if problems:
            log.warning("no login for %s: %s", self._host, "; ".join(problems))
            return Found(None, f"no credentials, as {problems[0]}")
        places = " and ".join(str(path) for path in self._access.auth_files if os.path.exists(path))
        places = places or " and ".join(str(path) for path in self._access.auth_files[-1:])
        if self._node is not None:
            return Found(
                None,
                f"no credentials, as the node's image service was told none and {places or 'no file'} "
                f"has none for {self._host}",
            )
        return Found(None, f"no credentials, as {places or 'no file'} has none for {self._host}")

    @property
    def file(self) -> str:
        """The file that a login may be put into, for hints."""
        return str(self._access.auth_files[-1]) if self._access.auth_files else ""

    def _from_files(self, deadline: float, not_before: float, problems: list[str]) -> Credentials | None:
        for path in self._access.auth_files:
            file = read_auth_file(path)
            if file is None:
                if self._access.auth_file_given:
                    raise UsageError(f"credentials file {path} is not there for us to read")
                continue
            program = file.program(self._host)
            found = self._from_program(program, deadline, not_before, problems) if program else None
            found = found or file.find(self._host, self._repository)
            if found is not None:
                return found
        return None

    def _from_program(self, name: str, deadline: float, not_before: float, problems: list[str]) -> Credentials | None:
        servers = HUB_SERVERS if len(names_of(self._host)) > 1 else (self._host,)
        for server in servers:
            try:
                found = self._programs.ask(name, server, self._access.environment, deadline, not_before)
            except UsageError as error:
                problems.append(error.message)
                return None
            if found is not None:
                return found
        return None
