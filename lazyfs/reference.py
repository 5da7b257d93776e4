"""Image references as skopeo users write them, parsed once into frozen values.

docker://HOST/REPO:TAG    docker://HOST/REPO@sha256:…    HOST/REPO:TAG    debian    oci:DIR    oci:DIR:REF
oci-archive:FILE    oci-archive:FILE:REF    docker-archive:FILE    docker-archive:FILE:REPO:TAG
containerd:NAME    containerd://NAMESPACE/NAME    containerd://NAMESPACE/NAME?address=SOCKET
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lazyfs import digest as digests
from lazyfs.errors import ReferenceInvalid

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DEFAULT_HOST = "docker.io"
LOCAL = ("oci", "oci-archive", "docker-archive", "containerd")  # transports of what lies on this machine
_INDEX = re.compile(r"@[0-9]{1,4}")
_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")  # containerd: pkg/identifiers
_ADDRESS = "?address="
_USE = "use docker://HOST/REPO:TAG, oci:DIR:REF, oci-archive:FILE, docker-archive:FILE or containerd:NAME"
# Transports of other tools that we don't speak, and the way round.
_UNSUPPORTED = {
    "containers-storage:": "write it to a file first: skopeo copy containers-storage:NAME oci-archive:FILE",
    "docker-daemon:": "write it to a file first: docker save -o FILE NAME, then docker-archive:FILE",
    "dir:": "copy it to a layout first: skopeo copy dir:DIR oci:OTHER",
}


@dataclass(frozen=True, slots=True)
class Reference:
    """One image.

    `transport` "docker": `host`, `repository`, `tag` or `digest`. "oci" and "oci-archive": `path`, `tag` or `digest`.
    "docker-archive": `path`, and `tag`: the whole name in it (HOST/REPO:TAG) or its number ("@0"). "containerd":
    `host` is the namespace and `path` the socket, both "" for the usual ones, `tag` the image's whole name there.

    Both `tag` and `digest` may be set (NAME:TAG@DIGEST): the digest wins. Where `path` names a layout or an archive an
    empty tag means "the only image in it".
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
    def origin(self) -> str:
        """The repository, as settings and records name it, whatever mirror or endpoint serves it.

        HOST/REPO; the path of a layout or an archive; in containerd the image's name without its tag.
        """
        if self.transport == "docker":
            return f"{self.host}/{self.repository}"
        if self.transport == "containerd":
            name, colon, tag = self.tag.rpartition(":")
            return name if colon and "/" not in tag else self.tag
        return self.path

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine, where plain HTTP is the rule."""
        name = self.host.rsplit(":", 1)[0] if not self.host.endswith("]") else self.host
        return name in ("localhost", "[::1]") or re.fullmatch(r"127\.\d+\.\d+\.\d+", name) is not None

    def __str__(self) -> str:
        suffix = (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")
        if self.transport == "containerd":
            where = f"//{self.host}/" if self.host else ""
            digest = f"@{self.digest}" if self.digest else ""
            return f"containerd:{where}{self.tag}{digest}" + (f"{_ADDRESS}{self.path}" if self.path else "")
        if self.transport != "docker":
            return f"{self.transport}:{self.path}{suffix}"
        return f"docker://{self.host}/{self.repository}{suffix}"

    def with_digest(self, digest: str) -> Reference:
        """The same image pinned to `digest`."""
        return Reference(self.transport, self.host, self.repository, self.path, self.tag, digest)


def parse(text: str) -> Reference:
    """Parse an image reference. Raise ReferenceInvalid with what is wrong."""
    transport, colon, rest = text.partition(":")
    by_path = {"oci": _parse_oci, "oci-archive": _parse_archive, "docker-archive": _parse_docker_archive}
    parse_path = by_path.get(transport)
    if colon and parse_path is not None and all(ord(c) >= 32 for c in text):
        return parse_path(text, rest)  # a file's name may hold blanks
    if not text or text != text.strip() or any(ord(c) < 33 for c in text):
        raise ReferenceInvalid(text, "it is empty or holds blanks")
    if colon and transport == "containerd" and not re.fullmatch(r"[0-9]{1,5}(?:/.*)?", rest):  # a host of that name
        return _parse_containerd(text, rest)
    for unsupported, way in _UNSUPPORTED.items():
        if text.startswith(unsupported):
            raise ReferenceInvalid(text, f"the transport {unsupported} is not supported", hint=way)
    rest = text
    if text.startswith("docker://"):
        rest = text[len("docker://") :]
    elif "://" in text:
        raise ReferenceInvalid(text, "unknown transport", hint=_USE)
    return _parse_docker(text, rest)


def docker_name(text: str) -> str:
    """Return the whole name, HOST/REPO:TAG or HOST/REPO@DIGEST, of an image that docker may call by a shorter one.

    Raise ReferenceInvalid for what is no such name.
    """
    full = _parse_docker(text, text)
    suffix = (f":{full.tag}" if full.tag else "") + (f"@{full.digest}" if full.digest else "")
    return f"{full.host}/{full.repository}{suffix}"


def _parse_oci(text: str, rest: str) -> Reference:
    digest, end = "", rest.rpartition("/")[2]
    if "@" in end:  # before the last slash it belongs to a directory's name
        name, digest = _split_digest(text, end)
        rest = rest[: len(rest) - len(end)] + name
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, tag = rest, ""
    elif not tag:
        raise ReferenceInvalid(text, "it ends in a colon")
    if not path:
        raise ReferenceInvalid(text, "it names no directory")
    return Reference("oci", path=path, tag=tag, digest=digest)


def _parse_archive(text: str, rest: str) -> Reference:
    """The first colon ends the path, as in other tools: names of images hold colons and slashes of their own."""
    before, _, digest = rest.rpartition("@")
    if not digests.is_digest(digest):
        before, digest = rest, ""
    path, colon, tag = before.partition(":")
    if colon and not tag:
        raise ReferenceInvalid(text, "it ends in a colon")
    if not path:
        raise ReferenceInvalid(text, "it names no file")
    return Reference("oci-archive", path=path, tag=tag, digest=digest)


def _parse_docker_archive(text: str, rest: str) -> Reference:
    found = replace(_parse_archive(text, rest), transport="docker-archive")
    if not found.tag or _INDEX.fullmatch(found.tag):
        return found
    hint = "docker-archive:FILE:REPO:TAG or docker-archive:FILE:@0; a FILE with a colon in its path needs another name"
    try:
        return replace(found, tag=docker_name(found.tag))
    except ReferenceInvalid:
        raise ReferenceInvalid(text, f"{found.tag[:100]!r} is no name that an image can have", hint=hint) from None


def _parse_containerd(text: str, rest: str) -> Reference:
    namespace, address = "", ""
    if _ADDRESS in rest:
        rest, _, address = rest.partition(_ADDRESS)
        if not address.startswith("/"):
            raise ReferenceInvalid(text, "the address is no absolute path of a socket")
    if rest.startswith("//"):
        namespace, _, rest = rest[2:].partition("/")
        if len(namespace) > 76 or not _NAMESPACE.fullmatch(namespace):
            raise ReferenceInvalid(
                text, f"{namespace[:100]!r} is not a containerd namespace", hint="containerd://NAMESPACE/NAME"
            )
    name, at, digest = rest.rpartition("@")
    if not at or not digests.is_digest(digest):  # containerd's names may hold an @ of their own
        name, digest = rest, ""
    if not name or name.startswith("/"):
        raise ReferenceInvalid(text, "it names no image", hint="the name as `ctr image ls` shows it")
    return Reference("containerd", namespace, path=address, tag=name, digest=digest)


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
