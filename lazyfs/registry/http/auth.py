"""Answering a registry's 401: Basic, or a Bearer token from the endpoint that the challenge names.

Nothing is asked before the registry demands it: the first request goes out bare, its 401 carries the challenge, and the
token then serves all requests to this repository. Source: RFC 9110 section 11.6, Docker's "Token Authentication
Specification".
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode, urlunsplit

from lazyfs.errors import BadAnswer, RegistryTimeout, Unauthorized, UsageError
from lazyfs.limits import MAX_CHALLENGE, MAX_TOKEN, MAX_TOKEN_TRIES
from lazyfs.registry.config.credentials import Credentials
from lazyfs.registry.config.logins import Found, Logins
from lazyfs.registry.http.addresses import split_named
from lazyfs.registry.http.status import error_for
from lazyfs.registry.http.transport import Answer

DEFAULT_LIFETIME = 60.0  # seconds, where the endpoint doesn't say
MARGIN = 0.1  # of its lifetime: a token is renewed this long before it expires

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PIECE = re.compile(rf'[\s,]*({_TOKEN})(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header. `scheme` and the parameters' names are in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges of a WWW-Authenticate header (several may be joined by commas), without malformed ones."""
    found: list[Challenge] = []
    at = 0
    header = header[:MAX_CHALLENGE]
    while match := _PIECE.match(header, at):
        at = match.end()
        name, quoted, bare = match[1].lower(), match[2], match[3]
        if quoted is None and bare is None:
            found.append(Challenge(name, {}))
        elif found:
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
            found[-1].parameters.setdefault(name, value)
    return found


# (method, url, headers, body, deadline) -> the answer of the token endpoint, redirects not followed
AskToken = Callable[[str, str, dict[str, str], bytes | None, float], Answer]


class Authorizer:
    """The Authorization header for one repository of one registry. Thread-safe: parallel 401s fetch one token."""

    def __init__(self, host: str, repository: str, logins: Logins, ask: AskToken) -> None:
        self.secure = True  # the registry is reached over TLS: then so must be the token endpoint
        self._host = host
        self._repository = repository
        self._logins = logins
        self._ask = ask
        self._lock = threading.Lock()
        self._header = ""
        self._credentials: Credentials | None = None  # what the header was made with
        self._renew_at = float("inf")
        self._challenge: Challenge | None = None
        self._pushes = False
        self._others: set[str] = set()  # repositories that the token should also let us pull from
        self._narrow = False  # the endpoint refused a token for several repositories
        self._tried = "no credentials"

    def header(self, deadline: float, *, pushes: bool = False) -> str:
        """Return the header's value, "" before any challenge.

        Blocks for a new token when the old one is about to expire or doesn't cover pushing. Raise Unauthorized,
        RegistryTimeout and what the token endpoint's failure is.
        """
        if not pushes or self._pushes:
            header, renew_at = self._header, self._renew_at
            if time.monotonic() < renew_at:
                return header
        self._acquire(deadline)
        try:
            wider = pushes and not self._pushes
            self._pushes = self._pushes or pushes
            if self._challenge is not None and (wider or time.monotonic() >= self._renew_at):
                self._obtain(self._challenge, deadline)
            return self._header
        finally:
            self._lock.release()

    def renew(self, answer: Answer, used: str, deadline: float) -> None:
        """Take up the challenge of a 401 to a request that was sent with the header value `used`. Blocks.

        Raise Unauthorized when the challenge can't be met.
        """
        challenges = parse_challenges(answer.headers.get("WWW-Authenticate", ""))
        chosen = next((c for scheme in ("bearer", "basic") for c in challenges if c.scheme == scheme), None)
        self._acquire(deadline)
        try:
            if self._header != used:
                return  # another thread has got a new one meanwhile
            if chosen is None:
                raise Unauthorized(
                    self._host, f"{self._host} refused {answer.what} (401) and asked for no login that lazyfs knows"
                )
            if (used.startswith("Basic ") and chosen.scheme == "basic") or self._is_fixed():
                if not self._changed(chosen, deadline):
                    raise self.refused(answer.what, 401)
            else:
                self._obtain(chosen, deadline)
        finally:
            self._lock.release()

    def changed(self, used: str, deadline: float) -> bool:
        """Look for another login after a 403 to a request that was sent with `used`. Blocks.

        Clouds answer 403 to a Basic login that has expired; its file or program may have a new one.
        """
        if not used.startswith("Basic "):
            return self.another(used, deadline)
        self._acquire(deadline)
        try:
            return self._header != used or self._changed(Challenge("basic", {}), deadline)
        finally:
            self._lock.release()

    def another(self, used: str, deadline: float) -> bool:
        """Turn to another login of the node, after a refusal of what was just obtained. False: there is none. Blocks.

        Some registries hand out tokens to anybody, and refuse what is asked with them.
        """
        if not used or not self._logins.of_node:
            return False
        self._acquire(deadline)
        try:
            return self._header != used or (
                self._challenge is not None and self._changed(self._challenge, deadline, only_another=True)
            )
        finally:
            self._lock.release()

    def _is_fixed(self) -> bool:
        """Whether the header is the login itself: asking for it again gives the same."""
        return self._credentials is not None and bool(self._credentials.registry_token)

    def _changed(self, challenge: Challenge, deadline: float, *, only_another: bool = False) -> bool:
        before, refused = self._header, [self._credentials] if self._credentials is not None else []
        if only_another and self._find(deadline, False, refused).credentials in (None, *refused):
            return False
        self._obtain(challenge, deadline, fresh=True, refused=refused)
        return self._header != before

    def widen(self, repository: str) -> None:
        """Have the token cover pulls from another repository of the registry, too, from the next request on."""
        with self._lock:
            if not self._narrow and repository not in self._others and repository != self._repository:
                self._others.add(repository)
                self._renew_at = min(self._renew_at, 0.0)

    def refused(self, what: str, status: int) -> Unauthorized:
        """Return the error for a 401 or 403 that stays, saying which credentials were tried."""
        file = f", or fill {self._logins.file}" if self._logins.file else ""
        way = "log in with docker, podman or skopeo"
        if self._logins.of_node:
            way = "have kubelet pull the image again, whose logins are kept in memory alone"
        hint = "" if self._tried.startswith("the ") else f"{way}{file}"
        return Unauthorized(self._host, f"{self._host} refused {what} ({status}), tried {self._tried}", hint=hint)

    def _acquire(self, deadline: float) -> None:
        if not self._lock.acquire(timeout=max(0.0, min(deadline - time.monotonic(), threading.TIMEOUT_MAX))):
            raise RegistryTimeout(self._host, f"no token for {self._host} in time")

    def _obtain(
        self, challenge: Challenge, deadline: float, *, fresh: bool = False, refused: Sequence[Credentials] = ()
    ) -> None:
        found = self._find(deadline, fresh, refused)
        tried = list(refused)
        while True:
            try:
                header, lifetime = self._header_for(challenge, found.credentials, deadline)
                break
            except Unauthorized:
                # What a program said some minutes ago may have expired, and the node may have been told another login.
                if found.credentials is None or (fresh and not self._logins.of_node) or len(tried) >= MAX_TOKEN_TRIES:
                    raise
                tried.append(found.credentials)
                before, found, fresh = self._tried, self._find(deadline, True, tried), True
                if found.credentials in tried:
                    raise
                if found.credentials is None and self._logins.of_node:
                    self._tried = before  # a login was refused: that there is no other is no news
                    raise
        self._challenge = challenge
        self._credentials = found.credentials
        self._renew_at = time.monotonic() + lifetime * (1 - MARGIN)
        self._header = header

    def _header_for(self, challenge: Challenge, credentials: Credentials | None, deadline: float) -> tuple[str, float]:
        """Return the header's value, and for how many seconds it holds."""
        if challenge.scheme == "basic":
            if credentials is None or not credentials.username:
                raise self.refused(self._repository, 401)
            return credentials.basic(), float("inf")
        if credentials is not None and credentials.registry_token:
            return f"Bearer {credentials.registry_token}", float("inf")
        return self._token(challenge, credentials, deadline)

    def _find(self, deadline: float, fresh: bool, refused: Sequence[Credentials] = ()) -> Found:
        try:
            found = self._logins.find(deadline, fresh=fresh, refused=refused)
        except UsageError as error:  # in the middle of a read a file is as bad as a refusal: this source can't be used
            raise Unauthorized(self._host, error.message, hint=error.hint) from None
        self._tried = found.tried
        return found

    def _token(self, challenge: Challenge, credentials: Credentials | None, deadline: float) -> tuple[str, float]:
        allowed = ("https",) if self.secure else ("https", "http")
        no_url = BadAnswer(self._host, f"{self._host} names a token endpoint that is no {' or '.join(allowed)} URL")
        try:
            realm = split_named(challenge.parameters.get("realm", ""))
        except ValueError:
            raise no_url from None
        if realm.scheme not in allowed or realm.username is not None:
            raise no_url
        scopes = [f"repository:{self._repository}:{'pull,push' if self._pushes else 'pull'}"]
        scopes += [f"repository:{other}:pull" for other in sorted(self._others)]
        fields: dict[str, str] = {}
        if "service" in challenge.parameters:
            fields["service"] = challenge.parameters["service"]
        headers: dict[str, str] = {}
        if credentials is not None and credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": "lazyfs"}
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            form["scope"] = " ".join(scopes)
            answer = self._ask("POST", realm.geturl(), headers, urlencode({**form, **fields}).encode(), deadline)
        else:
            if credentials is not None:
                headers["Authorization"] = credentials.basic()
            query = "&".join(filter(None, (realm.query, urlencode([*fields.items(), *(("scope", s) for s in scopes)]))))
            url = urlunsplit((realm.scheme, realm.netloc, realm.path, query, ""))
            answer = self._ask("GET", url, headers, None, deadline)
        if answer.status in (400, 401, 403) and self._others:
            answer.discard()
            self._others.clear()
            self._narrow = True
            return self._token(challenge, credentials, deadline)
        if answer.status in (400, 401, 403):
            answer.discard()
            raise self.refused(f"a token for {self._repository}", answer.status)
        if answer.status != 200:
            raise error_for(answer)
        return self._read_token(answer)

    def _read_token(self, answer: Answer) -> tuple[str, float]:
        raw = answer.read_all(MAX_TOKEN)
        try:
            document = json.loads(raw)
            token = document.get("token") or document.get("access_token")
            lifetime = document.get("expires_in") or DEFAULT_LIFETIME
        except (ValueError, AttributeError, RecursionError):
            token, lifetime = None, DEFAULT_LIFETIME
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise BadAnswer(self._host, f"the token endpoint {answer.host} gave no token for {self._repository}")
        if isinstance(lifetime, bool) or not isinstance(lifetime, (int, float)) or not lifetime > 0:
            lifetime = DEFAULT_LIFETIME
        return f"Bearer {token}", float(min(lifetime, 1e9))
