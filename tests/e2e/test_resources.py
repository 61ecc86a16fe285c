"""A hub that does not answer, in its three ways, costs seconds, and the message says what to do."""
import socket
import subprocess
import sys
import time

import pytest

from fengshen.utils.resources import fetch, reachable
from tests.training_runs import environment, flags, here

NAME = "IDEA-CCNL/not-in-any-cache"
SECONDS = 10
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
ASK = """
import sys, time
import huggingface_hub.file_download
from fengshen.utils.resources import fetch
started = time.monotonic()
try:
    fetch(sys.argv[1])
except ValueError as e:
    print(time.monotonic() - started, e)
    sys.exit(2)
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    "No cached model, no proxy, no offline switch of this machine."
    import huggingface_hub.constants as constants

    for name in (*PROXIES, "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def closed():
    "The address of a port nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def silent():
    "The address of a port that takes no connection: its queue is full and nobody accepts."
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(server.getsockname())
            waiting.append(s)
        time.sleep(0.1)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for s in waiting:
            s.close()


@pytest.fixture
def mute():
    "The address of a port that takes every connection and never says a word."
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refused(**options):
    "The message `fetch` refuses the model with; it has to come in time."
    started = time.monotonic()
    with pytest.raises(ValueError) as e:
        fetch(NAME, **options)
    assert time.monotonic() - started < SECONDS
    return str(e.value)


def test_a_closed_port(closed, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed)
    message = refused()
    assert NAME in message and closed in message and f"hf download {NAME}" in message and "HF_ENDPOINT" in message


def test_a_port_that_takes_no_connection(silent, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", silent)
    message = refused()
    assert silent in message and "hf download" in message


def test_a_host_whose_name_means_nothing(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    message = refused()
    assert "hub.invalid" in message and "hf download" in message


def test_a_name_that_is_never_resolved(monkeypatch):
    "A resolver may hang for minutes and cannot be told to stop: it is left behind."
    def hang(*words, **settings):
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.monotonic()
    assert reachable("https://huggingface.co", seconds=0.3) is False
    assert time.monotonic() - started < 2


@pytest.mark.timeout(120)
def test_a_server_that_takes_the_connection_and_never_answers(mute, tmp_path):
    "In a process of its own: the address of the hub is read when its package is imported."
    env = environment(HF_ENDPOINT=mute, HF_HOME=str(tmp_path), HF_HUB_OFFLINE=None, **dict.fromkeys(PROXIES))
    try:
        done = subprocess.run([sys.executable, "-c", ASK, NAME], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.fail("no answer after half a minute")
    assert done.returncode == 2, done.stderr[-1500:]
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < SECONDS and f"hf download {NAME}" in message


def test_offline_by_wish_does_not_knock(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("fengshen.utils.resources.reachable", lambda *a: pytest.fail("knocked at the hub"))
    started = time.monotonic()
    message = refused()
    assert time.monotonic() - started < 2
    assert "HF_HUB_OFFLINE" in message and f"hf download {NAME}" in message


def test_modelscope(closed, monkeypatch):
    monkeypatch.setattr("fengshen.utils.resources.reachable", lambda url, seconds=0.2: reachable(closed, seconds))
    message = refused(hub="modelscope")
    assert "modelscope" in message and NAME in message and "folder" in message


def test_the_command_line_says_it_in_a_line(closed, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", closed)
    started = time.monotonic()
    status, out, err = here("generate", NAME, "--prompt", "你好")
    assert status == 2 and "hf download" in err and "Traceback" not in err
    settings = {"run_dir": str(tmp_path / "run"), "model.path": NAME, "model.config": None, "trainer.strategy": "auto", "trainer.max_steps": 1}
    status, out, err = here("fit", "-c", "demo", *flags(settings))
    assert status == 2 and "hf download" in err and NAME in err and "Traceback" not in err
    assert time.monotonic() - started < 30


def test_a_folder_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("fengshen.utils.resources.reachable", lambda *a: pytest.fail("knocked at the hub"))
    assert fetch(tmp_path) == tmp_path
    assert fetch("fengshen:tokenizer_demo").is_dir()
    with pytest.raises(ValueError, match="no such file or folder"):
        fetch(tmp_path / "nowhere")
