"""No test reaches beyond this machine, nor does anything that a test starts."""

import multiprocessing
import socket
import subprocess
import sys

import pytest

AWAY = ("192.0.2.1", 80)
SCRIPT = f"""
import socket
sock = socket.socket()
sock.settimeout(0.1)
sock.connect({AWAY})
"""


@pytest.fixture(scope="module")
def before_any_test():
    """What a connection beyond this machine meets with in a fixture of a module."""
    return refusal("connect")


def refusal(name):
    with socket.socket() as sock:
        sock.settimeout(0.1)
        try:
            return getattr(sock, name)(AWAY)
        except OSError as error:
            return str(error)


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
def test_a_connection_beyond_this_machine_is_refused(connect):
    assert refusal(connect) == f"tests are offline, got a connection to {AWAY}"


def test_a_fixture_of_a_module_is_refused_as_well(before_any_test):
    assert "tests are offline" in before_any_test


def test_a_connection_within_this_machine_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_a_process_that_a_test_starts_is_refused():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=60)
    assert f"OSError: tests are offline, got a connection to {AWAY}" in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_of_multiprocessing_is_refused(method):
    """A sweep's runs are started by a fork server."""
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert "tests are offline" in pool.apply(refusal, ["connect"])


def test_what_such_a_process_starts_is_refused():
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SCRIPT!r}])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "tests are offline" in done.stderr
