"""The worker process: it holds the weights, the KV pool and the runner, and computes what the engine sends.

    python -m triode.actors.executor.worker SOCKET_FD MODULE:FUNCTION PLACE

One plain loop, no Trio: take a plan and launch it, send a result as soon as it is there. The engine plans one step ahead,
so while a step is running the next plan comes in and is launched behind it.

The worker never outlives its engine, whatever either of them is doing: a thread sleeps until the engine's end of the
socket is gone, and on Linux the kernel kills the worker with its parent, even where an interpreter lock is never released
or a fork of the parent holds the socket open.
"""

import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import NoReturn

import msgspec
from msgspec.structs import replace

from triode.actors.channels import MAX_COMPILING
from triode.actors.executor.guides import REQUESTS_PER_CHECK, refusal
from triode.actors.executor.protocol import (
    Built,
    CheckGuide,
    Close,
    Failed,
    Frames,
    FromEngine,
    FromWorker,
    GuideChecked,
    Open,
    StageAdvanced,
    StageBegan,
    StageDone,
    Stepped,
    Wake,
    encode,
    from_engine,
)
from triode.actors.messages import ReleaseGuide
from triode.kernels.native.numa import Place, bind
from triode.kernels.openmp import bound_spinning
from triode.models.guide import Guide
from triode.models.parallel import Follower
from triode.models.progress import NullProgress, Progress
from triode.models.runner import HandsOver, Runner, Wakes
from triode.models.step import StepPlan

Opener = Callable[[Open, Progress], tuple[Runner | Follower, Built]]

POLL_S = 50e-6
"""How often a running step is asked whether it is done: about what the kernel's timers resolve."""

# Room for more is fetched from the system anew each time, which takes longer than all the rest of receiving.
_RECEIVE_BYTES = 2**16
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000
_YOUNG_OBJECTS = 50_000
"""The collector looks for cycles among new objects when there are so many."""


def main() -> NoReturn:
    """Serve one engine, then leave. The interpreter is not torn down: the kernel takes back memory and devices faster."""
    # Ctrl-C reaches every process of the terminal; it is the engine that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    bound_spinning(os.environ)
    socket_fd, opener, place = sys.argv[1:]
    # The lowest free number, because select() takes none above 1023 and the engine may have that many files open.
    connection = Connection(socket.socket(fileno=os.dup(int(socket_fd))))
    os.close(int(socket_fd))
    _die_with(connection)
    os._exit(0 if _serve(connection, opener, msgspec.json.decode(place, type=Place | None)) else 1)


class Connection:
    """The worker's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self._frames = Frames()

    def fileno(self) -> int:
        """The socket's number."""
        return self._socket.fileno()

    def send(self, message: FromWorker) -> None:
        """Send, from any thread; waits while the engine is behind."""
        data = encode(message)
        with self._sending:
            self._socket.sendall(data)

    def has_news(self) -> bool:
        """Whether there is something to receive."""
        return self._frames.holds_some or bool(select.select([self], [], [], 0)[0])

    def receive(self, wait_s: float | None = None) -> FromEngine | None:
        """The next message; None if none is complete within `wait_s` (None: wait for ever).

        Raises:
            EOFError: if the engine is gone.
        """
        while (body := self._frames.take()) is None:
            if wait_s is not None and not select.select([self], [], [], wait_s)[0]:
                return None
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise EOFError("the engine is gone")
            self._frames.feed(data)
        return from_engine.decode(body)


class RemoteProgress:
    """Has the engine show the progress."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Sent on."""
        self._connection.send(StageBegan(name, total, unit))

    def advance(self, amount: int) -> None:
        """Sent on."""
        self._connection.send(StageAdvanced(amount))

    def done(self) -> None:
        """Sent on."""
        self._connection.send(StageDone())


def run_steps(connection: Connection, runner: Runner) -> None:
    """Compute plans until told to close. A result that is there goes out before anything else is begun."""
    num_in_flight = 0

    def hand_over() -> None:
        nonlocal num_in_flight
        while num_in_flight and runner.is_ready():
            connection.send(Stepped(runner.collect(), runner.statistics()))
            num_in_flight -= 1

    if isinstance(runner, HandsOver):
        runner.hand_over = hand_over
    sleeper = runner if isinstance(runner, Wakes) else None
    compiling = ThreadPoolExecutor(MAX_COMPILING, thread_name_prefix="triode-guides")
    while True:
        hand_over()
        match connection.receive(POLL_S if num_in_flight else None):
            case StepPlan() as plan:
                runner.launch(plan)
                num_in_flight += 1
            case CheckGuide(number, guide):
                compiling.submit(_answer, connection, runner, number, guide)
            case ReleaseGuide(guide):
                runner.release_guide(guide, REQUESTS_PER_CHECK)
            case Wake():
                if sleeper is not None and not num_in_flight:
                    sleeper.wake(connection.has_news)
            case Close():
                return


def _answer(connection: Connection, runner: Runner, number: int, guide: Guide) -> None:
    try:
        connection.send(GuideChecked(number, refusal(runner, guide, REQUESTS_PER_CHECK)))
    except ConnectionError:
        # The engine is gone, which the loop learns by itself.
        return
    except BaseException as error:  # whatever it is, the engine must learn it
        connection.send(Failed(type(error).__name__, str(error), traceback.format_exc()))


def follow(connection: Connection, follower: Follower) -> None:
    """Do what rank 0 says until the engine says Close, which it does when rank 0 has left."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(follower, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == connection.fileno():
                message = connection.receive()
                assert isinstance(message, Close), f"a rank that follows takes no plans, got {message}"
                return
            if not follower.obey():
                poll.unregister(follower)


def _serve(connection: Connection, opener: str, place: Place | None) -> bool:
    """Everything from Open to Close. Returns whether it went well; if not, the engine has been told."""
    try:
        if place is not None:
            # Before any thread is started, and before there is anything in memory that is to be near.
            bind(place)
        # Before the Open is read: importing torch takes seconds, in which the engine reads its tokenizer.
        open_runner = _find(opener)
        order = connection.receive()
        assert isinstance(order, Open), f"the first message must be Open, got {order}"
        connection.send(StageDone())
        follows = order.ranks is not None and order.ranks.rank > 0
        runner, built = open_runner(order, NullProgress() if follows else RemoteProgress(connection))
        # What loading leaves behind, torch above all, stays to the end. Looking through it for garbage holds up a step
        # for a tenth of a second.
        gc.collect()
        gc.freeze()
        # What a step leaves behind is freed without the collector, and looking through it holds up the launch.
        gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
        if built.device != "cpu":
            # A CPU's step needs itself the time that looking more often takes.
            sleep_exactly()
        connection.send(replace(built, wakes=isinstance(runner, Wakes)))
        if isinstance(runner, Follower):
            follow(connection, runner)
            return True
        run_steps(connection, runner)
        runner.close()
    except (EOFError, ConnectionError):
        return False
    except BaseException as error:  # whatever it is, the engine must learn it
        connection.send(Failed(type(error).__name__, str(error), traceback.format_exc()))
        return False
    return True


def sleep_exactly() -> None:
    """Have this thread wake when it has asked to: Linux lets it oversleep by 50 µs, as much again as POLL_S."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


def _find(path: str) -> Opener:
    module, _, name = path.partition(":")
    opener: Opener = getattr(import_module(module), name)
    return opener


def _die_with(connection: Connection) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_at_hangup, args=(connection,), name="triode-hangup", daemon=True).start()


def _leave_at_hangup(connection: Connection) -> None:
    poll = select.poll()
    # No event but those that are always reported: the other end hung up, or the socket failed.
    poll.register(connection, 0)
    poll.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
