"""No test reaches beyond this machine."""

import socket

import pytest


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
def test_a_connection_beyond_this_machine_is_refused(connect):
    with socket.socket() as sock:
        sock.settimeout(0.1)
        with pytest.raises(OSError, match="tests are offline"):
            getattr(sock, connect)(("192.0.2.1", 80))


def test_a_connection_within_this_machine_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
