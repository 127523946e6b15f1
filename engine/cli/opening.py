"""Opens the engine that a command line asks for, with everything slow about it shown."""

import argparse
import gc
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from triode.engine.cli.flags import add_flags, given
from triode.engine.cli.progress import shown_progress
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine, open_engine

_YOUNG_OBJECTS = 50_000
"""The collector looks for cycles among new objects when there are so many."""
# It has an argument of its own.
_NOT_FLAGS = {"model"}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and a flag for every field of `EngineConfig`."""
    # The list of all flags is below; nobody reads it twice.
    parser.usage = f"{parser.prog} MODEL [flags]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a .gguf file, a Hugging Face id, a built-in model (smollm2-135m) or random:NAME",
    )
    add_flags(parser.add_argument_group("engine"), EngineConfig, _NOT_FLAGS)


def engine_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """What the flags set, by the names that `open_engine` takes."""
    return given(arguments, EngineConfig, _NOT_FLAGS)


def settle() -> None:
    """Keep the garbage collector off what opening an engine has left, torch above all.

    It stays to the end, and looking through it holds up every request for a tenth of a second. What requests hold is
    looked through less often, too: nearly all of it is freed without the collector, which held up every other step of 256
    requests for a millisecond. Only a process of our own may say so: what a host program holds is not ours to freeze.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


@asynccontextmanager
async def opened_engine(arguments: argparse.Namespace, **overrides: object) -> AsyncIterator[Engine]:
    """The engine that the command line asks for; `overrides` hold where it says nothing."""
    with ExitStack() as shown:
        progress = shown.enter_context(shown_progress())
        config = EngineConfig().override(overrides | engine_settings(arguments))
        async with open_engine(arguments.model, config, progress=progress) as engine:
            shown.close()
            yield engine
