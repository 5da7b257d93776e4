"""Image references as skopeo users write them, parsed once into frozen values.

docker://HOST/REPO:TAG    docker://HOST/REPO@sha256:…    HOST/REPO:TAG    debian    oci:DIR    oci:DIR:REF
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lazyfs import digest as digests
from lazyfs.errors import ReferenceInvalid

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DEFAULT_HOST = "docker.io"
_KNOWN_TRANSPORTS = ("containers-storage:", "docker-daemon:", "docker-archive:", "oci-archive:", "dir:", "containerd:")


@dataclass(frozen=True, slots=True)
class Reference:
    """One image. `transport` "docker": `host`, `repository`, `tag` or `digest`; "oci": `path`, `tag` or `digest`.

    Both `tag` and `digest` may be set (NAME:TAG@DIGEST): the digest wins. In an OCI layout an empty tag means "the only
    image in it".
    """

    transport: str
    host: str = ""
    repository: str = ""
    path: str = ""
    tag: str = ""
    digest: str = ""

    @property
    def target(self) -> str:
        """What to ask for: the digest where there is one, else the tag."""
        return self.digest or self.tag

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, where plain HTTP is the rule."""
        name = self.host.rsplit(":", 1)[0] if not self.host.endswith("]") else self.host
        return name in ("localhost", "[::1]") or re.fullmatch(r"127\.\d+\.\d+\.\d+", name) is not None

    def __str__(self) -> str:
        suffix = (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")
        if self.transport == "oci":
            return f"oci:{self.path}{suffix}"
        return f"docker://{self.host}/{self.repository}{suffix}"

    def with_digest(self, digest: str) -> Reference:
        """The same image pinned to `digest`."""
        return Reference(self.transport, self.host, self.repository, self.path, self.tag, digest)


def parse(text: str) -> Reference:
    """Parse an image reference. Raise ReferenceInvalid with what is wrong."""
    if text.startswith("oci:") and all(ord(c) >= 32 for c in text):
        return _parse_oci(text)  # a directory's name may hold blanks
    if not text or text != text.strip() or any(ord(c) < 33 for c in text):
        raise ReferenceInvalid(text, "it is empty or holds blanks")
    for transport in _KNOWN_TRANSPORTS:
        if text.startswith(transport):
            raise ReferenceInvalid(
                text, f"the transport {transport} is not supported", hint="use docker://HOST/REPO:TAG or oci:DIR:REF"
            )
    rest = text
    if text.startswith("docker://"):
        rest = text[len("docker://") :]
    elif "://" in text:
        raise ReferenceInvalid(text, "unknown transport", hint="use docker://HOST/REPO:TAG or oci:DIR:REF")
    return _parse_docker(text, rest)


def _parse_oci(text: str) -> Reference:
    rest, digest = text[len("oci:") :], ""
    end = rest.rpartition("/")[2]
    if "@" in end:  # before the last slash it belongs to a directory's name
        name, digest = _split_digest(text, end)
        rest = rest[: len(rest) - len(end)] + name
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, tag = rest, ""
    if not path:
        raise ReferenceInvalid(text, "it names no directory")
    return Reference("oci", path=path, tag=tag, digest=digest)


def _split_digest(text: str, rest: str) -> tuple[str, str]:
    name, at, digest = rest.partition("@")
    if at and not digests.is_digest(digest):
        raise ReferenceInvalid(text, f"{digest[:100]!r} is not a digest", hint="sha256: and 64 hex digits")
    return name, digest


def _parse_docker(text: str, rest: str) -> Reference:
    name, digest = _split_digest(text, rest)
    head, slash, tail = name.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost" or head.startswith("[")):
        host, path = head, tail
    else:
        host, path = _DEFAULT_HOST, name
    if host == "index.docker.io":
        host = _DEFAULT_HOST
    repository, colon, tag = path.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise ReferenceInvalid(text, f"{tag[:130]!r} is not a tag", hint="letters, digits, _ . - and at most 128")
    if not _HOST.fullmatch(host):
        raise ReferenceInvalid(text, f"{host[:100]!r} is not a host name")
    if not repository:
        raise ReferenceInvalid(text, "it names no repository")
    if len(repository) > 255 or not _REPOSITORY.fullmatch(repository):
        raise ReferenceInvalid(
            text, f"{repository[:100]!r} is not a repository name", hint="lower-case letters, digits, . _ - and /"
        )
    if host == _DEFAULT_HOST and "/" not in repository:
        repository = "library/" + repository
    if not tag and not digest:
        tag = "latest"
    return Reference("docker", host, repository, "", tag, digest)
