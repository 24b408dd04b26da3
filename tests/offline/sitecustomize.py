"""Python imports this at the start of every process that the tests start: no connection leaves this machine."""

import ipaddress
import socket
from typing import Any


def is_local(host: str) -> bool:
    """Whether a host is this machine, by one of its own addresses."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def guarded(connect: Any) -> Any:
    def call(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and not is_local(address[0]):
            raise OSError(f"tests are offline, got a connection to {address}")
        return connect(self, address)

    return call


socket.socket.connect = guarded(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = guarded(socket.socket.connect_ex)  # type: ignore[method-assign]
