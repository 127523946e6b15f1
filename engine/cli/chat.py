"""`triode chat`: a conversation in the terminal.

What waits, and what ends the wait:

    the prompt   input() in a thread of its own, so that line editing and history work and the engine's loop goes on;
                 Ctrl-D, /exit or Ctrl-C leaves the chat
    a reply      its stream; Ctrl-C cancels the request, keeps what has been said and asks for the next message

Both run in a cancel scope, and Ctrl-C cancels whichever is innermost. A thread that sits in input() cannot be woken: on
leaving it is abandoned (it is a daemon) and the terminal is set back to how it was found.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

import trio

from triode.engine.cli.flags import add_flags, with_flags
from triode.engine.cli.interrupt import on_interrupt
from triode.engine.cli.opening import add_engine_arguments, opened_engine
from triode.engine.cli.reply import read_reply
from triode.engine.engine import Engine
from triode.models.sampling import SamplingParams

_HELP = """\
/reset   forget the conversation
/help    show this
/exit    leave; so do Ctrl-D, and Ctrl-C at the prompt
Ctrl-C   cancel the reply that is being written"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the system message and the sampling parameters."""
    add_engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    # A chat shows one sample, as text.
    unused = {"guide", "n", "logprobs", "prompt_logprobs"}
    add_flags(parser.add_argument_group("how tokens are chosen"), SamplingParams, omit=unused)


def main(arguments: argparse.Namespace) -> int:
    """Check the parameters, then talk."""
    with_flags(arguments, SamplingParams())
    with _terminal_kept():
        return trio.run(_main, arguments)


async def _main(arguments: argparse.Namespace) -> int:
    with trio.CancelScope() as opening, on_interrupt(opening.cancel):
        async with opened_engine(arguments) as engine:
            print(f"{engine.report.model} in {engine.report.dtype}; /help lists the commands", file=sys.stderr)
            chat = Chat(engine, with_flags(arguments, SamplingParams()), arguments.system)
            with on_interrupt(chat.interrupt):
                await chat.run()
    return 130 if opening.cancelled_caught else 0


class Chat:
    """The conversation so far, and what Ctrl-C cancels now."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._waiting = trio.CancelScope()
        self._read_line = _line_reader()

    def interrupt(self) -> None:
        """Cancel what is being waited for."""
        self._waiting.cancel()

    async def run(self) -> None:
        """Ask, reply, and so on until the user leaves."""
        while (text := await self._ask()) is not None:
            match text.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/help":
                    print(_HELP)
                case "/reset":
                    self._messages = list(self._opening)
                    print("The conversation is forgotten.")
                case command if command.startswith("/") and " " not in command:
                    print(f"There is no command {command}.\n{_HELP}")
                case _:
                    await self._reply(text)

    async def _ask(self) -> str | None:
        """The next message; None when the user leaves."""
        with trio.CancelScope() as self._waiting:
            return await trio.to_thread.run_sync(self._read_line, abandon_on_cancel=True)
        print()
        return None

    async def _reply(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        said = ""
        try:
            with trio.CancelScope() as self._waiting:
                async with self._engine.submit(messages, self._params) as stream:
                    try:
                        await read_reply(stream, perf_counter(), show=True)
                    finally:
                        said = stream.completion.text
        except ValueError as error:
            # The conversation has outgrown the context, and still fits it without this message.
            print(f"triode: error: {error}; /reset begins a new conversation", file=sys.stderr)
            return
        print()
        if said:
            self._messages = [*messages, {"role": "assistant", "content": said}]


def _line_reader() -> Callable[[], str | None]:
    """A function that waits for the next line of stdin and returns None at its end. It may never return."""
    if sys.stdin.isatty():
        return _prompt
    # A file of our own: the interpreter waits at exit for the lock of sys.stdin, which an abandoned thread would hold.
    file = open(sys.stdin.fileno(), encoding=sys.stdin.encoding, closefd=False)  # noqa: SIM115
    return lambda: file.readline() or None


def _prompt() -> str | None:
    try:
        return input(">>> ")
    except EOFError:
        return None


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """Line editing on a terminal, and the terminal's settings as they were once the block ends."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    with suppress(ImportError):
        # Its import is what gives input() line editing and history.
        import readline  # noqa: F401
    settings = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
