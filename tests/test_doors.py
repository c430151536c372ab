"""The doors: what listens there is real, a head's server (Ray's gcs_server) or a socket of the test's own."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autoenc.errors import InputError
from autoenc.sweep import doors

TOKEN = "0123456789abcdef" * 4
RAY = Path(find_spec("ray").origin).parent              # found, not imported: it would read its mode


def ray_env(home: Path | str, **variables: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**env, "HOME": str(home), **variables}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """A person without token, in a process without Ray. Whatever a test leaves in the environment goes with it."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with mock.patch.dict(os.environ, ray_env(tmp_path, TMPDIR=str(tmp_path)), clear=True):
        yield tmp_path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def head(**variables: str) -> Iterator[str]:
    """The server of a head that new drivers ask first, on loopback alone; its address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [RAY / "core/src/ray/gcs/gcs_server", f"--gcs_server_port={port}", "--node-ip-address=127.0.0.1",
             f"--log_dir={folder}", f"--session-dir={folder}", "--session-name=test", "--config_list=e30="],
            env=ray_env(folder, **variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def wait_for(port: int, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        time.sleep(0.05)
    raise TimeoutError(port)


@pytest.fixture(scope="module")
def closed_head() -> Iterator[str]:
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as address:
        yield address


@pytest.fixture(scope="module")
def open_head() -> Iterator[str]:
    with head(RAY_AUTH_MODE="disabled") as address:
        yield address


def refusal(address: str, **options: bool) -> str:
    """What is said to the person; in one line, and without touching Ray's mode."""
    mode = os.environ.get("RAY_AUTH_MODE")
    with pytest.raises(InputError) as error:
        doors.knock(address, **options)
    assert os.environ.get("RAY_AUTH_MODE") == mode and "\n" not in str(error.value)
    return str(error.value)


# The token of a Ray that we start -------------------------------------------------------------------------------------

def test_a_new_token_is_ours_alone_and_the_umask_stays(home):
    before = os.umask(0o022)
    try:
        doors.prepare_local()
        (home / "output.csv").write_text("")
        (home / "outputs").mkdir()
    finally:
        assert os.umask(before) == 0o022
    path = home / ".ray" / "auth_token"
    assert len(path.read_text()) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
    modes = {".ray": 0o700, ".ray/auth_token": 0o600, "output.csv": 0o644, "outputs": 0o755}
    assert {name: (home / name).stat().st_mode & 0o777 for name in modes} == modes
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]
    token = path.read_text()
    doors.prepare_local()
    assert path.read_text() == token


def test_many_at_once_agree_on_one_token(home):
    start = threading.Barrier(8)
    failed = []

    def prepare() -> None:
        start.wait()
        try:
            doors.prepare_local()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [file.name for file in (home / ".ray").iterdir()] == ["auth_token"]
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_token_that_ray_wrote_for_everybody_is_closed(home):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text(TOKEN)
    path.chmod(0o644)
    doors.prepare_local()
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == TOKEN


def test_a_file_named_by_hand_is_told_about_and_left_alone(home, closed_head):
    path = home / "shared"
    path.write_text(TOKEN)
    path.chmod(0o640)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    with pytest.raises(InputError, match=f"chmod 600 {path}"):
        doors.prepare_local()
    assert "RAY_AUTH_MODE" not in os.environ and path.stat().st_mode & 0o777 == 0o640
    assert doors.knock(closed_head) == closed_head          # a cluster may be shared by a group


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"), (b" \n", "is empty"), (b"one\ntwo", "one line"), (b"\xff\xfe", "one line"),
    (b"a\0b", "one line")])
def test_a_file_without_a_token_in_it_is_named(home, content, words, closed_head):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        doors.prepare_local()
    assert str(path) in str(error.value) and path.read_bytes() == content
    assert words in refusal(closed_head) and str(path) in refusal(closed_head)


def test_a_token_that_cannot_be_read_or_kept_is_named(home):
    path = home / ".ray" / "auth_token"
    path.mkdir(parents=True)
    with pytest.raises(InputError, match=f"{path}: .*cannot be read"):
        doors.prepare_local()
    path.rmdir()
    path.symlink_to(home / "nowhere")
    with pytest.raises(InputError, match=f"{path}: .*leads nowhere"):
        doors.prepare_local()
    os.environ["RAY_AUTH_TOKEN_PATH"] = "~/token"
    with pytest.raises(InputError, match="absolute"):
        doors.prepare_local()
    os.environ["RAY_AUTH_TOKEN"] = " "
    with pytest.raises(InputError, match=r"RAY_AUTH_TOKEN: .*is empty"):
        doors.prepare_local()


@pytest.mark.parametrize("where", ["home is a file", ".ray is a file"])
def test_without_a_home_the_token_is_for_this_run(home, where):
    file = home / ("home" if where.startswith("home") else ".ray")
    file.write_text("in the way")
    os.environ["HOME"] = str(file if where.startswith("home") else home)
    doors.prepare_local()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
    assert file.read_text() == "in the way" and list(home.iterdir()) == [file]


@pytest.mark.parametrize("mode", ["disabled", "tokne"])        # Ray takes the second for the first
def test_only_insecure_turns_the_token_off(home, mode, closed_head):
    os.environ["RAY_AUTH_MODE"] = mode
    with pytest.raises(InputError, match=f"RAY_AUTH_MODE={mode} .*--insecure"):
        doors.prepare_local()
    assert f"RAY_AUTH_MODE={mode}" in refusal(closed_head)
    doors.prepare_local(insecure=True)
    assert os.environ["RAY_AUTH_MODE"] == mode and not (home / ".ray").exists()
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    assert doors.knock(closed_head, insecure=True) == closed_head and os.environ["RAY_AUTH_MODE"] == "token"


def test_nothing_is_switched_once_ray_is_there(monkeypatch, open_head):
    monkeypatch.setitem(sys.modules, "ray", sys)
    doors.prepare_local()
    doors.knock(open_head, insecure=True)
    assert "RAY_AUTH_MODE" not in os.environ


def test_neither_ray_nor_torch_is_imported(closed_head):
    code = ("import sys; from autoenc.sweep import doors; doors.prepare_local(); doors.knock(sys.argv[1]); "
            "print({'ray', 'torch'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code, closed_head], env={**os.environ, "RAY_AUTH_TOKEN": TOKEN},
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


# A cluster that we join -----------------------------------------------------------------------------------------------

def test_a_head_that_demands_a_token(home, closed_head):
    for options in ({}, {"insecure": True}):
        assert str(home / ".ray" / "auth_token") in refusal(closed_head, **options)
        os.environ["RAY_AUTH_TOKEN"] = TOKEN[::-1]
        assert "refuses the token in RAY_AUTH_TOKEN" in refusal(closed_head, **options)
        os.environ["RAY_AUTH_TOKEN"] = f" {TOKEN}\n"
        began = time.monotonic()
        assert doors.knock(closed_head, **options) == closed_head and time.monotonic() - began < 3
        assert os.environ.pop("RAY_AUTH_MODE") == "token"
        del os.environ["RAY_AUTH_TOKEN"]
    path = home / "token"
    path.write_text(TOKEN[1:])
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    assert f"refuses the token in {path}" in refusal(closed_head)
    path.write_text(TOKEN + "\n")
    assert doors.knock(closed_head.replace("127.0.0.1", "localhost")) and os.environ["RAY_AUTH_MODE"] == "token"


def test_an_open_head_is_joined_only_on_demand(open_head):
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    said = refusal(open_head)
    assert all(word in said for word in ("CVE-2023-48022", "ray get-auth-token --generate", "--insecure"))
    assert doors.knock(open_head, insecure=True) == open_head and os.environ["RAY_AUTH_MODE"] == "disabled"


def test_a_proxy_is_not_asked(closed_head):
    os.environ |= {"http_proxy": f"http://127.0.0.1:{free_port()}", "RAY_AUTH_TOKEN": TOKEN}
    assert doors.knock(closed_head) == closed_head


def test_this_machines_cluster(home, closed_head):
    os.environ |= {"RAY_TMPDIR": str(home), "RAY_AUTH_TOKEN": TOKEN}
    written = home / "ray" / "ray_current_cluster"
    assert str(written) in refusal("auto")
    written.parent.mkdir()
    written.write_text(closed_head)
    assert doors.knock("auto") == closed_head
    written.write_text(f"127.0.0.1:{free_port()}")
    assert "nobody listens" in refusal("auto") and str(written) in refusal("auto")
    os.environ["RAY_ADDRESS"] = closed_head
    assert doors.knock("auto") == closed_head
    os.environ["RAY_ADDRESS"] = "ray://127.0.0.1:10001"
    assert "RAY_ADDRESS" in refusal("auto") and "ray://" in refusal("auto")
    os.environ["RAY_ADDRESS"] = "auto"
    written.write_bytes(b"\xff\xff")
    assert str(written) in refusal("auto")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_the_cluster_that_somebody_else_wrote_down_is_not_sent_our_token(home, closed_head):
    os.environ |= {"RAY_TMPDIR": str(home), "RAY_AUTH_TOKEN": TOKEN}
    written = home / "ray" / "ray_current_cluster"
    written.parent.mkdir()
    written.write_text(closed_head)
    os.chown(written, 12345, 12345)
    assert "another user's" in refusal("auto") and closed_head in refusal("auto")


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A socket that accepts; it says nothing for None, else that, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    kept.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("answer", [None, b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 1000],
                         ids=["silent", "leaves", "ssh", "zeros"])
def test_what_is_no_head_is_told_in_seconds(answer, monkeypatch):
    monkeypatch.setattr(doors, "SECONDS", 1.0)
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    with listening(answer) as address:
        began = time.monotonic()
        assert "no Ray head" in refusal(address, insecure=True)
        assert time.monotonic() - began < 4


def test_a_web_server_and_a_closed_port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert "8265" in refusal(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert "nobody listens" in refusal(f"127.0.0.1:{free_port()}")
    assert "nobody listens" in refusal(f"[::1]:{free_port()}")


def test_tls_is_rays_matter_but_the_token_is_ours():
    os.environ["RAY_USE_TLS"] = "1"
    assert "nobody listens" in refusal(f"127.0.0.1:{free_port()}")
    with listening(None) as address:
        assert "a token is needed" in refusal(address)
        assert doors.knock(address, insecure=True) == address and os.environ["RAY_AUTH_MODE"] == "disabled"
        os.environ |= {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": ""}
        assert doors.knock(address) == address and os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("address", [
    "", "nowhere", ":6379", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:６３７９", "127.0.0.1:²",
    "::1:6379", "http://127.0.0.1:8265", "127.0.0.1:6379/", "127.0.0.1:6379 ", "user@127.0.0.1:6379",
    "[127.0.0.1:6379", "a b:1"])
def test_what_is_no_address(address):
    assert f"--address {address}: should be HOST:PORT" in refusal(address)


def test_ray_client_is_told_apart():
    said = refusal("ray://127.0.0.1:10001")
    assert "Ray Client" in said and "HOST:PORT" in said and "auto" in said


def asks_a_name_server(text: str) -> bool:
    return re.match(r"[\w.-]+:", text, re.ASCII) is not None


@settings(max_examples=150, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.text().filter(lambda text: not asks_a_name_server(text)),
    st.builds("{}:{}".format, st.text(max_size=8), st.integers()).filter(lambda text: not asks_a_name_server(text)),
    st.builds("[{}]:1".format, st.text(":01[]", max_size=20)),
    st.builds("127.0.{}.1:1{}".format, st.integers(0, 300), st.text(max_size=2))))
@example("a" * 64 + ".invalid:1")
@example("a..b:1")
@example("0:1")
@example("[::]:1")
@example("[:]:1")
def test_no_text_raises_anything_else(address):
    with pytest.raises(InputError):
        doors.knock(address)


# A whole head ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets: their paths may not be long."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


JOIN = """
import sys
from autoenc.sweep import doors
address = doors.knock(sys.argv[1], insecure=sys.argv[2] == "True")
import ray
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
print(ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))
"""


@pytest.mark.slow
@pytest.mark.parametrize("demands", [True, False])
def test_ray_itself_joins_what_was_looked_at(home, ray_folder, demands):
    port = free_port()
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} if demands else {"RAY_AUTH_MODE": "disabled"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=1",
             "--include-dashboard=false", f"--temp-dir={ray_folder / 'ray'}", "--block"],
            env=ray_env(home, **mode), stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "Ray runtime started" not in (home / "log").read_text() and time.monotonic() < end:
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.2)
        for address in (f"127.0.0.1:{port}", "auto"):
            done = subprocess.run(
                [sys.executable, "-c", JOIN, address, str(not demands)], capture_output=True, text=True, timeout=120,
                env=ray_env(home, RAY_TMPDIR=str(ray_folder), RAY_AUTH_TOKEN=TOKEN))
            assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)          # what it started, where it did not get to that itself
    with pytest.raises(InputError, match="nobody listens"):
        doors.knock(f"127.0.0.1:{port}")
