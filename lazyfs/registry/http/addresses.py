"""Where a registry must not send us: the host's own services, link-local ones, and the clouds' metadata. Pure.

A registry's redirects and token addresses are its word, not the user's; and who follows them stands inside the user's
network. What the user has configured is not looked at here.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Served to whoever runs in a cloud, credentials included: names that clouds resolve to such addresses, and addresses
# that are not link-local but serve it all the same (Alibaba, Oracle, Azure, AWS and Google over IPv6).
_METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")
)
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))  # RFC 6052, RFC 8215
_NETLOC = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~%-]+)?\])(?::[0-9]*)?")


def split_named(url: str) -> SplitResult:
    """Return the parts of a URL that a registry named, user information still in it.

    Raise ValueError unless it has a host and a port that all readers of URLs agree on: what was looked at here must be
    what is asked, by whatever library or proxy.
    """
    parts = urlsplit(url)
    if not _NETLOC.fullmatch(parts.netloc.rpartition("@")[2]) or parts.port == 0:
        raise ValueError("no host")
    return parts


def refusal(address: str, *, loopback: bool) -> str:
    """Return why a connection to `address` (numeric) must not be made, "" when it may.

    `loopback`: the registry lies on loopback itself and may lead there. An IPv4 address inside an IPv6 one counts as
    what it is.
    """
    try:
        found: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "is no address"
    plain = _inner(found)
    if plain in _METADATA:
        return "is a cloud's metadata service"
    if plain.is_unspecified or plain.is_multicast:
        return "is no address of a host"
    if isinstance(plain, ipaddress.IPv4Address) and plain in ipaddress.ip_network("0.0.0.0/8"):
        return "is no address of a host"
    if plain.is_link_local:
        return "is link-local, where clouds keep their metadata"
    if plain.is_loopback and not loopback:
        return "is this machine itself"
    return ""


def name_refusal(host: str, *, loopback: bool) -> str:
    """Return why a host as written in a URL must not be asked, "" when nothing speaks against it before it is resolved.

    Numbers count in every form that resolvers take: decimal, octal, hexadecimal, short.
    """
    name = host.rstrip(".").lower()
    if name in _METADATA_NAMES:
        return "is a cloud's metadata service"
    if name == "localhost" or name.endswith(".localhost"):
        return refusal("127.0.0.1", loopback=loopback)
    number = numeric(name)
    return refusal(number, loopback=loopback) if number else ""


def numeric(host: str) -> str:
    """Return the address that `host` writes down in whatever form, "" when it is a name."""
    try:
        return str(ipaddress.ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeError, ValueError):
        return ""


def is_loopback(host: str) -> bool:
    """Tell whether a host as written is this machine."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    number = numeric(name)
    return bool(number) and _inner(ipaddress.ip_address(number)).is_loopback


def _inner(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        number = int(address)
        deprecated = number >> 32 == 0 and number > 1  # "::a.b.c.d"
        if deprecated or any(address in network for network in _NAT64):
            return ipaddress.IPv4Address(number & 0xFFFFFFFF)
    return address
