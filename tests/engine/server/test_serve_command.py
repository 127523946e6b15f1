"""`triode serve` as an operator uses it: settings, the start, signals and the end."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from servers import SERVERS, WIDE
from triode.engine.cli.main import main
from triode.engine.cli.serve import add_arguments, read_settings
from triode.engine.server import extra
from triode.engine.server.config import ServerConfig

TINY = ["random:tiny", "--dtype", "float32", "--kv-cache-bytes", "16000000", "--port", "0"]
SOME = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}


def settings(*words: str, environment: dict[str, str] | None = None) -> ServerConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_settings(parser.parse_args(["random:tiny", *words]), environment or {})[1]


@contextmanager
def serving(*words: str, said: list[str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address. What it has `said` until it serves is appended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "triode.engine.cli.main", "serve", *TINY, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if said is not None:
                    said.append(line)
                if found := re.search(r" at (http://\S+) ", line):
                    yield process, found.group(1)
                    break
            else:
                pytest.fail("the server did not start")
        finally:
            process.kill()


def test_a_server_that_logs_json_says_nothing_else() -> None:
    said: list[str] = []
    with serving("--log-format", "json", said=said) as (process, address):
        httpx.get(f"{address}/health")
        process.terminate()
        assert process.stderr is not None
        lines = process.stderr.readlines()
    assert lines
    records = [json.loads(line) for line in (*said, *lines)]
    assert all(record["logger"].startswith("triode") for record in records)
    assert "Loading weights ..." in {record["message"] for record in records}


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nserved_name = "file"\ndrain_s = 3.5\nmax_running = 8\n')
    environment = {"TRIODE_PORT": "2", "TRIODE_SERVED_NAME": "environment", "TRIODE_API_KEYS": "a,b"}
    config = settings("--config", str(file), "--port", "3", environment=environment)
    assert (config.port, config.served_name, config.drain_s) == (3, "environment", 3.5)
    assert config.api_keys == ("a", "b")
    assert settings(environment={"TRIODE_LOG_REQUESTS": "false"}).log_requests is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", "settings must be among .*, got prot"),
        ('port = "1"', "port must be of the setting's type: expected `int`, got `str`"),
        ("port = 70000", "port must be an integer >= 0 and < 65536, got 70000"),
        ("max_running = 0", "max_running must be an integer >= 1, got 0"),
        ("port = ", "--config must be a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        settings("--config", str(file))


def test_a_missing_file_is_refused_by_flag_and_name() -> None:
    reason = "^--config must name a file that can be read, got '/no/such': No such file or directory$"
    with pytest.raises(ValueError, match=reason):
        settings("--config", "/no/such")


def test_a_wrong_variable_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValueError, match="TRIODE_PORT must be of the setting's type") as caught:
        settings(environment={"TRIODE_PORT": "hidden"})
    assert "hidden" not in str(caught.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", *TINY]) == 1
    assert "serving needs uvicorn: pip install 'triode[serve]'" in capsys.readouterr().err


def test_a_port_in_use_is_known_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 1
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_wrong_certificates_are_known_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ["--tls-certificate", str(tmp_path / "none.pem"), "--tls-key", str(tmp_path / "none.key")]
    assert main(["serve", "no-such-model", *missing]) == 2
    assert "must be PEM files that belong together" in capsys.readouterr().err
    assert main(["serve", "no-such-model", *missing[:2]]) == 2
    assert "tls_certificate and tls_key must be given together" in capsys.readouterr().err


def test_help_shows_examples_and_imports_no_server() -> None:
    code = (
        "import sys; from triode.engine.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: print(*{'torch', 'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules), 'end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triode serve smollm2-135m" in done.stdout
    assert done.stdout.splitlines()[-1] == "end"


def is_listening(url: str) -> bool:
    try:
        httpx.get(f"{url}/ready")
    except httpx.TransportError:
        return False
    return True


@pytest.mark.parametrize("kind", SERVERS)
def test_a_signal_drains_and_the_process_ends_well(kind: str) -> None:
    with serving("--server", kind) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=SOME) as stream:
            parts = stream.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            while is_listening(url):
                pass
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        assert process.wait(timeout=20) == 0


# A process takes seconds to start: where one server shows as much, the other is shown by the slow tests.
@pytest.mark.parametrize("kind", ["uvicorn", pytest.param("hypercorn", marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once(kind: str) -> None:
    with (
        serving("--server", kind) as (process, url),
        # More than the buffers between here and there hold: it cannot end before it is read.
        httpx.stream("POST", f"{url}/v1/chat/completions", json=WIDE, timeout=60) as stream,
    ):
        parts = stream.iter_bytes()
        next(parts)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            while True:
                httpx.get(f"{url}/health")
        # It takes no more requests, and goes on with this one.
        assert next(parts)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        # Only what ends at once has this status, whatever else the machine does meanwhile.
        assert process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("kind", ["hypercorn", pytest.param("uvicorn", marks=pytest.mark.slow)])
def test_a_stuck_reader_does_not_hold_the_end_up(kind: str) -> None:
    with serving("--server", kind, "--drain-s", "0.1", "--write-timeout-s", "600") as (process, url):
        address = httpx.URL(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((address.host, address.port or 80))
            body = json.dumps(WIDE).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            while scraped(url, "vllm:num_requests_running") == 0:
                pass
            process.send_signal(signal.SIGTERM)
            # 0.1 s to drain and 2 s to close: long before the write is given up.
            assert process.wait(timeout=60) == 0


def scraped(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_on_a_gpu_the_model_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def executor(*words: str) -> str:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return read_settings(parser.parse_args(["random:tiny", *words]), {})[0].executor

    assert executor("--device", "cuda") == "process"
    assert executor("--device", "cuda", "--executor", "thread") == "thread"
    assert executor("--device", "cpu") == "auto"
    for has_driver, expected in ((True, "process"), (False, "auto")):
        monkeypatch.setattr(Path, "exists", lambda path, found=has_driver: found)
        assert executor() == expected


def test_hypercorns_extra_is_asked_for_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "hypercorn" else object())
    assert main(["serve", *TINY, "--server", "hypercorn"]) == 1
    assert "serving needs hypercorn: pip install 'triode[serve,hypercorn]'" in capsys.readouterr().err
