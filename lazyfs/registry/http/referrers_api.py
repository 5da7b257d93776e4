"""Asking a registry for the referrers of a manifest. Source: OCI distribution-spec 1.1, "Listing Referrers"."""

from __future__ import annotations

from urllib.parse import quote

from lazyfs import oci
from lazyfs.errors import ManifestMissing
from lazyfs.limits import MAX_DOCUMENT, MAX_REFERRER_PAGES, MAX_REFERRERS
from lazyfs.registry.http.exchange import Exchange, follow_location
from lazyfs.registry.http.retry import RetryPolicy
from lazyfs.registry.http.status import error_for


class ReferrersApi:
    """The referrers of one repository's manifests, the one whose URL is `root` (".../v2/NAME"). Every call blocks."""

    def __init__(self, exchange: Exchange, retry: RetryPolicy, root: str) -> None:
        self._exchange = exchange
        self._retry = retry
        self._root = root

    def ask(self, digest: str, deadline: float) -> list[oci.Descriptor] | None:
        """Return the referrers of a manifest, at most MAX_REFERRERS; None where the registry has no API for it."""
        found: list[oci.Descriptor] = []
        url = f"{self._root}/referrers/{quote(digest, safe=':')}"
        what = f"the referrers of {digest}"
        for _ in range(MAX_REFERRER_PAGES):
            page = self._retry.run(lambda address=url: self._page(address, what, deadline), deadline)  # type: ignore[misc]
            if page is None:
                return None
            listed, url = page
            found += listed
            if not url or len(found) >= MAX_REFERRERS:
                break
        return found[:MAX_REFERRERS]

    def _page(self, url: str, what: str, deadline: float) -> tuple[list[oci.Descriptor], str] | None:
        answer = self._exchange.ask(
            "GET", url, kind="manifest", what=what, deadline=deadline, headers={"Accept": oci.OCI_INDEX}
        )
        # 404: no API (a registry that has it answers an empty list); others say so with 400 or 405.
        if answer.status in (400, 404, 405, 501):
            answer.discard()
            return None
        if answer.status != 200:
            raise error_for(answer, ManifestMissing)
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        following = answer.headers.get("Link", "")
        raw = answer.read_all(MAX_DOCUMENT)
        if kind != oci.OCI_INDEX:  # a front page for every address, as some proxies have
            return None
        listed = list(oci.parse_index(raw, kind).manifests)
        target, _, parameters = following.partition(">")
        if 'rel="next"' in parameters and target.startswith("<"):
            return listed, follow_location(answer, target[1:])
        return listed, ""
