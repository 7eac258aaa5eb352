"""How a client reaches its service: the proxy and the certificates that the environment names.

The variables are those of curl and requests: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case, and
SSL_CERT_FILE and SSL_CERT_DIR. What one connection does not need is not looked at: this machine itself needs no proxy,
and an http URL no certificates.
"""

from __future__ import annotations

import os
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.request import getproxies

import httpx

from carso.client.errors import UnusableVariable

_SCHEMES = ("http", "https", "socks5", "socks5h")
_PORTS = {"http": 80, "https": 443}
_ENTRY = re.compile(r"(?:\w+://)?(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:]*|.*:.*:.*))(?::(?P<port>\d+))?")


@dataclass(frozen=True)
class Route:
    """How requests to one URL travel."""

    verify: ssl.SSLContext | bool  # for httpx; False where no TLS is spoken
    proxy: httpx.Proxy | None = None
    via: str = ""  # the proxy in words, without its password, for error messages


def route_to(url: httpx.URL) -> Route:
    """Return the route to a service. Raises UnusableVariable."""
    found = _proxy_for(url)
    if found is None:
        return Route(_certificates() if url.scheme == "https" else False)
    variable, proxy = found
    via = f"through the proxy {proxy.copy_with(username=None, password=None)}, which {variable} names"
    context = _certificates() if "https" in (url.scheme, proxy.scheme) else None
    spoken = httpx.Proxy(proxy, ssl_context=context if proxy.scheme == "https" else None)
    return Route(context or False, spoken, via)


def _proxy_for(url: httpx.URL) -> tuple[str, httpx.URL] | None:
    """Return the proxy for a URL and the variable that names it; None: go there directly."""
    if _is_loopback(url.host):
        return None
    proxies = getproxies()  # on macOS and Windows also those of the system's settings
    for scheme in (url.scheme, "all"):
        value = proxies.get(scheme)
        if not value:
            continue
        if _is_excepted(url, proxies.get("no", "")):
            return None
        variable = _variable(f"{scheme}_proxy")
        return variable, _checked_proxy(variable, value)
    return None


def _checked_proxy(variable: str, value: str) -> httpx.URL:
    # A proxy's URL may hold a password: no message shows it.
    try:
        proxy = httpx.URL(value if "://" in value else f"http://{value}")
    except httpx.InvalidURL as e:
        raise UnusableVariable(f"{variable} is not the URL of a proxy ({e}): mend it, or unset it") from None
    if proxy.scheme not in _SCHEMES or not proxy.host:
        raise UnusableVariable(
            f"{variable} names a proxy {proxy.scheme}://{proxy.host}, and a proxy's URL begins with one of "
            f"{', '.join(_SCHEMES)} and has a host: mend it, or unset it"
        )
    return proxy


def _certificates() -> ssl.SSLContext:
    """Trust what SSL_CERT_FILE or SSL_CERT_DIR holds, otherwise what certifi does."""
    if file := os.environ.get("SSL_CERT_FILE"):
        try:
            return ssl.create_default_context(cafile=file)
        except OSError as e:  # ssl.SSLError is one
            reason = e.strerror or e
            raise UnusableVariable(
                f"SSL_CERT_FILE: {file!r} holds no certificates that can be read ({reason}): name a PEM file, or unset "
                "it"
            ) from None
    if folder := os.environ.get("SSL_CERT_DIR"):
        if not Path(folder).is_dir():
            raise UnusableVariable(f"SSL_CERT_DIR: {folder!r} is not a folder: name one, or unset it")
        return ssl.create_default_context(capath=folder)
    return httpx.create_ssl_context(trust_env=False)


def _is_excepted(url: httpx.URL, exceptions: str) -> bool:
    """Tell whether NO_PROXY covers a URL.

    An entry is `*`, a host, which covers its subdomains too, an address, with or without brackets, or a network such as
    10.0.0.0/8. A host and an address may have a port.
    """
    address = _address(url.host)
    port = url.port or _PORTS[url.scheme]
    for entry in re.split(r"[,\s]+", exceptions):
        if entry == "*":
            return True
        if address is not None and "/" in entry:
            with suppress(ValueError):
                if address in ip_network(entry, strict=False):
                    return True
        if not (parts := _ENTRY.fullmatch(entry)) or (parts["port"] and int(parts["port"]) != port):
            continue
        host = (parts["v6"] or parts["host"] or "").lower()
        if address is not None:
            if _address(host) == address:
                return True
        elif host and f".{url.host}".endswith(f".{host.lstrip('*').lstrip('.')}"):
            return True
    return False


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address else host == "localhost" or host.endswith(".localhost")


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _variable(name: str) -> str:
    """Return the name under which the environment holds a variable: in lower case, which wins, or in upper case."""
    return name if os.environ.get(name) else name.upper()
