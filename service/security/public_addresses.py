"""Which addresses a webhook may go to: the public internet, and nothing that leads elsewhere.

References:
    IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and its successors).
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from bitquota.errors import InvalidInput

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REFUSED_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
"""This network, private, carrier-grade NAT, loopback, link-local, protocol assignments (some of
which the standard library calls global), documentation, 6to4 relays, benchmarking, multicast,
reserved."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Networks without IPv4 reach it through these; the last 32 bits are where it really goes."""

_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
"""All that is assigned for global unicast. Outside lie loopback, IPv4-mapped and IPv4-compatible
addresses (``::/96``), local NAT64 (``64:ff9b:1::/48``), unique and link-local, multicast."""

_REFUSED_6 = tuple(
    ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
"""Protocol assignments with Teredo and benchmarking, documentation, 6to4, documentation again."""

_HTTPS = 443
_FIRST_FREE_PORT = 1024


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet, for one host, and not a tunnel."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in _REFUSED_4)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return (
        address in _GLOBAL_6
        and address.is_global
        and not any(address in network for network in _REFUSED_6)
    )


def check_url(url: str, *, allow_private: bool) -> None:
    """Check what can be said of a webhook's address without asking the network.

    Args:
        url: As it was submitted.
        allow_private: Whether any address and port will do, and plain http.

    Raises:
        InvalidInput: Not https, or it names a user, another port than 443 or one from 1024, or an
            address that is not public or not written in the usual way.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as err:
        msg = f"a webhook must be a URL; got '{url}': {err}"
        raise InvalidInput(msg, url=url) from err
    schemes = {"https", "http"} if allow_private else {"https"}
    if parts.scheme not in schemes or not host_of(parts) or parts.username or parts.password:
        msg = (
            f"a webhook must be an {' or '.join(sorted(schemes))} URL with a host and without a "
            f"user; got '{url}'"
        )
        raise InvalidInput(msg, url=url)
    if allow_private:
        return
    if port is not None and port != _HTTPS and port < _FIRST_FREE_PORT:
        msg = f"a webhook must go to port {_HTTPS} or one from {_FIRST_FREE_PORT} on; got {port}"
        raise InvalidInput(msg, port=port)
    host = host_of(parts)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if _is_odd_address(host):
            msg = (
                "an IPv4 address must be written as four decimal numbers without leading zeros; "
                f"got '{host}'"
            )
            raise InvalidInput(msg, host=host) from None
        return  # a name: it is resolved and checked for every delivery
    if "%" in host or not is_public(address):
        raise _not_public(host)


def host_of(parts: SplitResult) -> str:
    """Return the host of a URL without the dot that may end a full name."""
    return (parts.hostname or "").removesuffix(".")


def _is_odd_address(host: str) -> bool:
    """Return whether the C library takes a host for an IPv4 address: ``0x7f.1``, ``017700000001``.

    It reads octal, hexadecimal, and one to four numbers.
    """
    try:
        socket.inet_aton(host)
    except (OSError, UnicodeError):
        return False
    return True


def resolve(host: str, port: int, *, allow_private: bool) -> str:
    """Return the address to connect to; the caller must use this very one.

    Resolving again later would let a name point to the public for the check and to this machine
    for the call.  May take as long as the system's resolver does.

    Raises:
        InvalidInput: The name cannot be resolved, or one of its addresses is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        msg = f"the host of a webhook must be found; '{host}' is not: {err}"
        raise InvalidInput(msg, host=host) from err
    texts = (str(entry[4][0]).partition("%")[0] for entry in found)
    addresses = [ipaddress.ip_address(text) for text in texts]
    if not addresses:
        msg = f"the host of a webhook must have an address; '{host}' has none"
        raise InvalidInput(msg, host=host)
    if not allow_private and not all(is_public(address) for address in addresses):
        raise _not_public(host)
    return str(addresses[0])


def _not_public(host: str) -> InvalidInput:
    msg = (
        f"a webhook must go to a public address; '{host}' is not one: use another, or have the "
        "operator set BITQUOTA_WEBHOOK_ALLOW_PRIVATE"
    )
    return InvalidInput(msg, host=host)
