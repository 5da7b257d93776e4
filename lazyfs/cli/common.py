"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from lazyfs.errors import UsageError
from lazyfs.limits import MAX_LOGIN_LINE
from lazyfs.units import MiB

if TYPE_CHECKING:
    from lazyfs.config import Settings
    from lazyfs.reference import Reference
    from lazyfs.registry.config.access import Access, Login
    from lazyfs.registry.hops import Hop
    from lazyfs.registry.open import OpenOptions
    from lazyfs.registry.repository import Repository

_SIDES = {"src": "SRC", "dest": "DST"}
IMAGE_HELP = (
    "docker://HOST/REPO:TAG, HOST/REPO:TAG, HOST/REPO@sha256:…, oci:DIR[:REF], oci-archive:FILE[:REF], "
    "docker-archive:FILE[:REPO:TAG], or containerd:NAME"
)


def add_image(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the positional IMAGE (`args.image`, a string; None when optional and absent)."""
    parser.add_argument("image", metavar="IMAGE", nargs="?" if optional else None, help=IMAGE_HELP)


def add_platform(parser: argparse._ActionsContainer) -> None:
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


def add_registry(parser: argparse.ArgumentParser, *sides: str) -> None:
    """Add what every command that talks to a registry takes: --plain-http, logins and certificates.

    `sides`: prefixes for a command with several registries, each with a login of its own ("src", "dest").
    """
    add_plain_http(parser)
    add = parser.add_argument_group("registry options").add_argument
    for side in sides or ("",):
        name, of = (f"--{side}-creds", f" for {_SIDES[side]}") if side else ("--creds", "")
        variable = _creds_variable(side)
        hidden = "other users see arguments: prefer the next one"
        add(name, metavar="USER:PASSWORD", help=f"the login{of}; {hidden}")
        add(f"{name}-file", metavar="FILE", help=f"a file with USER:PASSWORD{of}, - for standard input; or ${variable}")
    add("--authfile", metavar="FILE", help="logins as podman and docker write them, instead of the usual files")
    add("--tls-ca", metavar="FILE", action="append", default=[], help="trust these authorities, too (PEM; repeatable)")
    add("--tls-cert", metavar="FILE", help="our client certificate (PEM)")
    add("--tls-key", metavar="FILE", help="its key; otherwise in the same file")
    add("--insecure-skip-verify", action="store_true", help="don't check the registry's certificate")
    add("--containerd-address", metavar="SOCKET", help="of containerd:NAME; or $CONTAINERD_ADDRESS")
    add("--containerd-namespace", metavar="NAME", help="of containerd:NAME; or $CONTAINERD_NAMESPACE")


def add_pull(parser: argparse.ArgumentParser) -> None:
    """Add --pull (`args.pull`) and --offline, which is --pull=never."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--pull",
        choices=("newer", "always", "missing", "never"),
        default=None,
        help="ask what a tag is now: and without an answer take what it was (newer, the default), or fail (always); "
        "only for unknown tags (missing); ask for nothing at all (never)",
    )
    group.add_argument(
        "--offline", dest="pull", action="store_const", const="never", help="ask no registry: the image must be here"
    )


def add_driver(parser: argparse.ArgumentParser) -> None:
    """Add --driver (`args.driver`)."""
    parser.add_argument(
        "--driver",
        choices=("auto", "erofs", "fuse"),
        default=None,
        help="how the files reach the kernel: erofs where a self-test passes, else fuse (auto, the default)",
    )


def driver(args: argparse.Namespace, settings: Settings) -> str | None:
    """Return the driver asked for; a daemon that runs already may have been started with another setting."""
    return args.driver or (settings.driver if settings.driver != "auto" else None)


def pull(args: argparse.Namespace, settings: Settings) -> str | None:
    """Return when to ask the registry; a daemon that runs already may have been started with another `offline`."""
    return "never" if settings.offline else args.pull


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json (`args.json`)."""
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def add_usual(parser: argparse.ArgumentParser) -> None:
    """Add what most commands take that ask an image's registry: --platform, those of `add_registry`, --json."""
    add_platform(parser)
    add_registry(parser)
    add_json(parser)


def daemon_image(args: argparse.Namespace) -> str:
    """Return `args.image` as the daemon understands it, which has another directory and another environment.

    Raise ReferenceInvalid, UsageError.
    """
    import dataclasses
    import os

    from lazyfs import reference

    image = str(args.image)
    if image.partition(":")[0] not in reference.LOCAL:
        return image
    parsed = reference.parse(image)
    if parsed.transport == "docker":
        return image
    if parsed.transport == "containerd":
        from lazyfs.containerd.address import namespace_name, socket_path

        address = socket_path(parsed.path or getattr(args, "containerd_address", None) or "")
        namespace = namespace_name(parsed.host or getattr(args, "containerd_namespace", None) or "")
        return str(dataclasses.replace(parsed, path=address, host=namespace))
    whole = dataclasses.replace(parsed, path=os.path.abspath(parsed.path))
    if reference.parse(str(whole)) != whole:  # the directory that we are in counts, too
        raise UsageError(f"the path {whole.path!r} has a colon, and can't be told from an image's name behind it")
    return str(whole)


def settings(args: argparse.Namespace) -> Settings:
    """Return the settings in force with the global flags applied. Blocking (one file). Raise UsageError."""
    from lazyfs import config

    return config.load({"root": getattr(args, "root", None)})


def platform(args: argparse.Namespace) -> str:
    """Return the platform asked for, or this machine's."""
    from lazyfs import oci

    return getattr(args, "platform", None) or oci.host_platform()


def open_options(
    args: argparse.Namespace, chosen: Settings, on_hop: Callable[[Hop], None] | None = None, *, side: str = ""
) -> OpenOptions:
    """Return the registry options of a command: access and transport from the flags, timeouts from the settings.

    `side` is one of those given to `add_registry`. Blocking. Raise UsageError.
    """
    from lazyfs.registry.open import OpenOptions

    return OpenOptions(
        plain_http=getattr(args, "plain_http", None),
        on_hop=on_hop,
        connect_timeout=chosen.connect_timeout,
        answer_timeout=chosen.answer_timeout,
        access=access(args, chosen, side),
        containerd_address=getattr(args, "containerd_address", None) or "",
        containerd_namespace=getattr(args, "containerd_namespace", None) or "",
    )


def opened(
    args: argparse.Namespace, image: Reference, chosen: Settings, on_hop: Callable[[Hop], None] | None = None
) -> closing[Repository]:
    """Return an image's repository for a `with`, which closes it. Blocking. Raise UsageError, RegistryError."""
    from lazyfs.registry.open import open_repository

    return closing(open_repository(image, open_options(args, chosen, on_hop)))


def access(args: argparse.Namespace, chosen: Settings, side: str = "") -> Access:
    """Return what flags and environment say of logins, certificates and registries' files. Blocking. Raise UsageError.

    `side` is one of those given to `add_registry`.
    """
    import dataclasses
    from pathlib import Path

    from lazyfs.registry.config import access as accesses

    def existing(flag: str, value: str) -> Path:
        path = Path(value).expanduser().absolute()
        if not path.exists():
            raise UsageError(f"--{flag} {value}: there is no such file")
        return path

    def path(name: str) -> Path | None:
        value = getattr(args, name, None)
        return existing(name.replace("_", "-"), value) if value else None

    found = accesses.from_environment(certs_dir=chosen.certs_dir)
    authfile, certificate, key = path("authfile"), path("tls_cert"), path("tls_key")
    if key is not None and certificate is None:
        raise UsageError("--tls-key needs --tls-cert")
    if authfile is not None:
        found = dataclasses.replace(found, auth_files=(authfile,), auth_file_given=True)
    return dataclasses.replace(
        found,
        login=_login(args, side),
        ca=tuple(existing("tls-ca", one) for one in getattr(args, "tls_ca", ())),
        client=(certificate, key) if certificate is not None else None,
        skip_verify=bool(getattr(args, "insecure_skip_verify", False)),
    )


def fetch_bytes(repository: Repository, digest: str, blob_offset: int, size: int) -> bytes:
    """Return a range of a blob, whole and not verified. Blocking. Raise RegistryError."""
    parts = []
    with repository.fetch(digest, blob_offset, size) as stream:
        while size > 0 and (data := stream.read(min(size, MiB))):
            parts.append(data)
            size -= len(data)
    return b"".join(parts)


def _creds_variable(side: str) -> str:
    return f"LAZYFS_{side.upper()}_CREDS" if side else "LAZYFS_CREDS"


def _login(args: argparse.Namespace, side: str) -> Login | None:
    """Return the login given by flag, file or environment variable, in this order."""
    import os

    from lazyfs.registry.config.access import parse_login

    name = f"{side}_creds" if side else "creds"
    flag = f"--{name.replace('_', '-')}"
    given, file = getattr(args, name, None), getattr(args, f"{name}_file", None)
    if given is not None and file is not None:
        raise UsageError(f"{flag} and {flag}-file exclude each other")
    if given is not None:
        return parse_login(given, flag)
    if file is not None:
        return parse_login(_first_line(file, f"{flag}-file"), f"{flag}-file {file}")
    variable = os.environ.get(_creds_variable(side))
    return parse_login(variable, f"${_creds_variable(side)}") if variable else None


def _first_line(path: str, flag: str) -> str:
    import os

    try:
        with open(0 if path == "-" else os.path.expanduser(path), "rb", closefd=path != "-") as file:
            return file.readline(MAX_LOGIN_LINE).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{flag} {path} can't be read: {reason}") from None


def _platform(text: str) -> str:
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(part and part.replace("-", "").replace(".", "").isalnum() for part in parts):
        raise UsageError(f"{text!r} is not a platform", hint="write linux/amd64 or linux/arm/v7")
    return text
