"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from lazyfs.errors import UsageError
from lazyfs.units import MiB

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.registry.hops import Hop
    from lazyfs.registry.open import OpenOptions
    from lazyfs.registry.repository import Repository

IMAGE_HELP = "docker://HOST/REPO:TAG, HOST/REPO:TAG, HOST/REPO@sha256:…, or oci:DIR[:REF]"


def add_image(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the positional IMAGE (`args.image`, a string; None when optional and absent)."""
    parser.add_argument("image", metavar="IMAGE", nargs="?" if optional else None, help=IMAGE_HELP)


def add_platform(parser: argparse.ArgumentParser) -> None:
    """Add --platform (`args.platform`: "os/arch[/variant]", None for this machine's)."""
    parser.add_argument("--platform", metavar="OS/ARCH", type=_platform, help="instead of this machine's platform")


def add_plain_http(parser: argparse.ArgumentParser) -> None:
    """Add --plain-http and --no-plain-http (`args.plain_http`: True, False, or None for "loopback only")."""
    parser.add_argument(
        "--plain-http",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="talk to the registry without TLS, or never; otherwise only to this machine's own address",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json (`args.json`)."""
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def daemon_image(text: str) -> str:
    """Return IMAGE as the daemon understands it, which works in another directory. Raise ReferenceInvalid."""
    if not text.startswith("oci:"):
        return text
    import dataclasses
    import os

    from lazyfs import reference

    parsed = reference.parse(text)
    return str(dataclasses.replace(parsed, path=os.path.abspath(parsed.path)))


def settings(args: argparse.Namespace) -> Settings:
    """Return the settings in force with the global flags applied. Blocking (one file). Raise UsageError."""
    from lazyfs import config

    return config.load({"root": getattr(args, "root", None)})


def platform(args: argparse.Namespace) -> str:
    """Return the platform asked for, or this machine's."""
    from lazyfs import oci

    return getattr(args, "platform", None) or oci.host_platform()


def open_options(
    args: argparse.Namespace, chosen: Settings, on_hop: Callable[[Hop], None] | None = None
) -> OpenOptions:
    """Return the registry options of a command: transport from the flags, timeouts from the settings."""
    from lazyfs.registry.open import OpenOptions

    return OpenOptions(
        plain_http=getattr(args, "plain_http", None),
        on_hop=on_hop,
        connect_timeout=chosen.connect_timeout,
        answer_timeout=chosen.answer_timeout,
    )


def fetch_bytes(repository: Repository, digest: str, blob_offset: int, size: int) -> bytes:
    """Return a range of a blob, whole and not verified. Blocking. Raise RegistryError."""
    parts = []
    with repository.fetch(digest, blob_offset, size) as stream:
        while size > 0 and (data := stream.read(min(size, MiB))):
            parts.append(data)
            size -= len(data)
    return b"".join(parts)


def _platform(text: str) -> str:
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(part and part.replace("-", "").replace(".", "").isalnum() for part in parts):
        raise UsageError(f"{text!r} is not a platform", hint="write linux/amd64 or linux/arm/v7")
    return text
