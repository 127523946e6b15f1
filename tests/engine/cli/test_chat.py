"""`triode chat` in a real terminal: what Ctrl-C and Ctrl-D do there, and what pipes do."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

COMMAND = [sys.executable, "-m", "triode.engine.cli.main", "chat", "random:tiny", "--dtype", "float32"]
# Replies run until the context is full: nothing but Ctrl-C ends them in the time of a test.
ENDLESS = ["--ignore-eos", "--kv-cache-bytes", "100000000"]
DEADLINE_S = 60.0


class Terminal:
    """A chat whose stdin, stdout and stderr are one pseudo-terminal."""

    def __init__(self, *flags: str) -> None:
        self.fd, inner = pty.openpty()
        self.settings = termios.tcgetattr(self.fd)
        self._process = subprocess.Popen(
            [*COMMAND, *flags],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            # Its own session with this terminal, so that the terminal turns Ctrl-C into a signal for it.
            preexec_fn=_take_terminal,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        )
        os.close(inner)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` is on the screen; returns what came before it."""
        deadline_s = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self._seen)) is None:
            self._read(deadline_s)
        before, self._seen = self._seen[: match.start()], self._seen[match.end() :]
        return before

    def wait_for_end(self) -> tuple[int, str]:
        """The exit status, and all that came before it."""
        status = self._process.wait(DEADLINE_S)
        while select.select([self.fd], [], [], 0)[0]:
            try:
                self._read(time.monotonic() + DEADLINE_S)
            except OSError:
                break
        return status, self._seen

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self.fd)

    def _read(self, deadline_s: float) -> None:
        ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, f"nothing came after {self._seen!r}"
        self._seen += os.read(self.fd, 65536).decode(errors="replace")


def _take_terminal() -> None:
    os.setsid()
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def endless() -> Iterator[Terminal]:
    terminal = Terminal(*ENDLESS)
    yield terminal
    terminal.close()


def test_ctrl_c_cancels_the_reply_and_keeps_the_chat_until_it_comes_at_the_prompt(endless: Terminal) -> None:
    endless.wait_for(">>> ")
    endless.type("Hello\n")
    endless.wait_for(r"Hello\r\n[^\r\n>]")
    endless.type("\x03")
    endless.wait_for(">>> ")
    endless.type("/help\n")
    endless.wait_for("/reset +forget the conversation")
    endless.wait_for(">>> ")
    endless.type("half a message\x03")
    status, rest = endless.wait_for_end()
    assert status == 0
    assert "Traceback" not in rest
    assert "Fatal" not in rest
    assert termios.tcgetattr(endless.fd) == endless.settings


def test_ctrl_d_leaves_and_reset_forgets(endless: Terminal) -> None:
    endless.wait_for(">>> ")
    endless.type("/reset\n")
    endless.wait_for("The conversation is forgotten.")
    endless.wait_for(">>> ")
    endless.type("/bogus\n")
    endless.wait_for("There is no command /bogus.")
    endless.wait_for(">>> ")
    endless.type("\x04")
    status, rest = endless.wait_for_end()
    assert status == 0
    assert "Traceback" not in rest


def test_without_a_terminal_each_line_is_a_message_and_one_that_outgrows_the_context_is_left_out() -> None:
    flags = ["--max-tokens", "3", "--kv-cache-bytes", "4000000", "--temperature", "0", "--max-context-tokens", "128"]
    result = subprocess.run(
        [*COMMAND, *flags],
        input="Hello\n\n" + "Hello " * 200 + "\nHello\n/exit\nnever read\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("; /reset begins a new conversation")


def test_ctrl_c_ends_a_wait_for_a_pipe() -> None:
    with subprocess.Popen(
        [*COMMAND, "--kv-cache-bytes", "4000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "lists the commands" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) in (0, 130)
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "Fatal" not in errors
