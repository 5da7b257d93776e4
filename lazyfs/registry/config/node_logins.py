"""The logins that a node's image service was told: kubelet's, sent by the snapshotter, kept in memory alone.

They belong to a registry and a repository, and go to that registry's own endpoint: never to a mirror, which whoever
made the login may not know of.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_LOGIN_PLACES, MAX_TOLD_LOGINS
from lazyfs.registry.config.credentials import Credentials, names_of

SOURCE = "the node's image service"
_SECRETS = ("username", "password", "identity_token", "registry_token")
_TOKEN = re.compile(r"[\x21-\x7e]*")


class NodeLogins:
    """What `set_logins` told. Thread-safe; nothing blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_place: OrderedDict[tuple[str, str], list[Credentials]] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._by_place.values()))

    def update(self, document: object) -> None:
        """Take the logins of a `set_logins` call. Raise UsageError, without a secret, for a bad one.

        They take the place of what was told of the same repositories. Others stay: a snapshotter that was restarted
        knows less than was told before, and images are still read. Several of one repository are tried in their order.
        """
        if not isinstance(document, list) or len(document) > MAX_TOLD_LOGINS:
            raise UsageError("set_logins: `logins` is no list, or too long a one")
        taken: dict[tuple[str, str], list[Credentials]] = {}
        for entry in document:
            host, repository, credentials = _parse(entry)
            taken.setdefault((names_of(host)[0], repository), []).append(credentials)
        with self._lock:
            for place, logins in taken.items():
                self._by_place[place] = logins
                self._by_place.move_to_end(place)
            while len(self._by_place) > MAX_LOGIN_PLACES:
                self._by_place.popitem(last=False)

    def find(self, host: str, repository: str, refused: Collection[Credentials] = ()) -> Credentials | None:
        """Return the login for a repository, else the one for its whole registry, leaving out those in `refused`."""
        name = names_of(host)[0]
        with self._lock:
            found = [*self._by_place.get((name, repository), ()), *self._by_place.get((name, ""), ())]
        return next((one for one in found if one not in refused), None)


def _parse(entry: object) -> tuple[str, str, Credentials]:
    if not isinstance(entry, dict):
        raise UsageError("set_logins: a login is no object")
    values: dict[str, Any] = {name: entry.get(name, "") for name in ("host", "repository", *_SECRETS)}
    if not all(isinstance(value, str) for value in values.values()) or not values["host"]:
        raise UsageError("set_logins: a login lacks its host, or holds something that is no text")
    if not values["username"] and not values["identity_token"] and not values["registry_token"]:
        raise UsageError("set_logins: a login holds neither a user nor a token")
    if not _TOKEN.fullmatch(values["registry_token"]):
        raise UsageError("set_logins: a registry token holds characters that no header takes")
    credentials = Credentials(source=SOURCE, **{name: values[name] for name in _SECRETS})
    return values["host"], values["repository"], credentials
