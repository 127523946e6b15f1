"""The worker process as the engine sees it: how it starts, what it says, and how it ends.

It is a fresh interpreter, not a fork: a fork of a process with threads, CUDA or an event loop inherits what it cannot
use. Nor does `multiprocessing` start it, which would run the user's main module again.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import trio

from triode.actors.executor.protocol import Frames, FromEngine, FromWorker, encode, from_worker
from triode.errors import EngineFault
from triode.kernels.native.numa import Place
from triode.models.parallel import RankOrder

_LOG = logging.getLogger("triode.worker")
_RECEIVE_BYTES = 2**16
_OUTPUT_CHARACTERS = 2000
_POLL_EXIT_S = 0.01
_DEATH_DEADLINE_S = 0.5
"""How long a worker that has hung up may take to end, and its output to arrive."""
_KILL_DEADLINE_S = 5.0
"""How long the kernel may take to free what a killed worker held. What sleeps in a driver for longer is left to it."""


class Child:
    """One worker process. Everything here belongs to the Trio thread that made it."""

    def __init__(self, opener: str, ranks: RankOrder | None = None, place: Place | None = None) -> None:
        """Start the process. It gets ready by itself; the first message to send is `Open`.

        Args:
            opener: where it finds the function that makes its runner.
            ranks: its place among the ranks of a model, whose file descriptors it gets.
            place: where it runs.
        """
        self.ranks = ranks
        """Its place among the ranks of a model."""
        self._frames = Frames()
        self._unsent = bytearray()
        self._is_sending = False
        self._output = ""
        self._output_scope = trio.CancelScope()
        self._output_ended = trio.Event()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        output_fd, their_output_fd = os.pipe()
        try:
            self._process = _start(theirs.fileno(), their_output_fd, opener, ranks, place)
        except BaseException:
            self._socket.close()
            os.close(output_fd)
            raise
        finally:
            theirs.close()
            os.close(their_output_fd)
        trio.lowlevel.spawn_system_task(self._read_output, output_fd, name="triode worker's output")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def post(self, message: FromEngine) -> None:
        """Send without waiting. What the socket has no room for follows when it has.

        A worker that is gone takes no messages; that it is gone, `receive` tells.
        """
        self._unsent += encode(message)
        if not self._is_sending:
            self._flush()
            if self._unsent:
                self._is_sending = True
                trio.lowlevel.spawn_system_task(self._send_rest, name="triode worker's plans")

    async def receive(self) -> FromWorker | None:
        """The next message; None when there will be no more."""
        while (body := self._frames.take()) is None:
            try:
                await trio.lowlevel.wait_readable(self._socket)
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except (ConnectionError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._frames.feed(data)
        return from_worker.decode(body)

    async def death(self) -> EngineFault:
        """Why the worker hung up, told after its end."""
        has_ended = await self.end(_DEATH_DEADLINE_S)
        how = _describe(self._process.returncode) if has_ended else "hung up without an end, and was killed"
        output = f"; its last words were:\n{self._output.strip()}" if self._output.strip() else ""
        rank = f" (rank {self.ranks.rank} of {self.ranks.num_ranks})" if self.ranks else ""
        return EngineFault(f"the worker process {self.pid}{rank} {how}{output}")

    def kill(self) -> None:
        """End the process, whatever it does, without waiting."""
        if self._process.poll() is None:
            self._process.kill()

    async def end(self, deadline_s: float) -> bool:
        """Wait for the process to end, and kill it at the deadline. Returns whether it ended by itself."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(deadline_s) as in_time:
                await self._exited()
            if in_time.cancelled_caught:
                self._process.kill()
                with trio.move_on_after(_KILL_DEADLINE_S):
                    await self._exited()
            # A grandchild may hold the pipe open.
            with trio.move_on_after(_DEATH_DEADLINE_S):
                await self._output_ended.wait()
        self._output_scope.cancel()
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        return not in_time.cancelled_caught

    async def _exited(self) -> None:
        # No event tells of a process's end everywhere that Unix sockets exist, and this is waited for once.
        while self._process.poll() is None:  # noqa: ASYNC110
            await trio.sleep(_POLL_EXIT_S)

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    async def _send_rest(self) -> None:
        try:
            while self._unsent:
                await trio.lowlevel.wait_writable(self._socket)
                self._flush()
        except trio.ClosedResourceError:
            self._unsent.clear()
        finally:
            self._is_sending = False

    async def _read_output(self, output_fd: int) -> None:
        """Log what the worker's libraries print, and keep the end of it for `death`."""
        try:
            with self._output_scope:
                async with trio.lowlevel.FdStream(output_fd) as stream:
                    async for data in stream:
                        text = data.decode(errors="replace")
                        self._output = (self._output + text)[-_OUTPUT_CHARACTERS:]
                        _LOG.warning("%s", text.rstrip())
        finally:
            self._output_ended.set()


def _start(
    socket_fd: int, output_fd: int, opener: str, ranks: RankOrder | None, place: Place | None
) -> "subprocess.Popen[bytes]":
    """Start the worker from this thread.

    Not from one of Trio's worker threads, as `trio.run_process` does: Linux takes the end of the thread that started a
    process for the end of its parent.
    """
    # The worker finds the packages that this process has found.
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    ties = [ranks.memory_fd, *ranks.links] if ranks else []
    arguments = [str(socket_fd), opener, msgspec.json.encode(place).decode()]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "triode.actors.executor.worker", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        pass_fds=[socket_fd, *ties],
        env={**os.environ, "PYTHONPATH": path},
    )


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in signal.valid_signals() else f"signal {-returncode}"
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
