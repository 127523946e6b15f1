"""`triode serve`: a model over HTTP and WebSocket, in OpenAI's shape, until a signal.

A setting comes from its flag, else from the environment (`TRIODE_PORT` for `--port`), else from the file that `--config`
names, else from its default.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Coroutine, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import trio

from triode.engine.cli.flags import add_flags, given
from triode.engine.cli.opening import add_engine_arguments, engine_settings, settle
from triode.engine.cli.progress import Records, shown_progress
from triode.engine.cli.settings import field_types, from_environment, from_file
from triode.engine.config import EngineConfig
from triode.engine.server.config import ServerConfig
from triode.engine.server.extra import require_extra
from triode.engine.server.logs import formatter
from triode.models.progress import Progress

_LOG = logging.getLogger("triode.server")
_EXAMPLES = """examples:
  triode serve smollm2-135m
  TRIODE_API_KEYS=secret triode serve ./Qwen2.5-7B-Instruct --host 0.0.0.0 --served-name qwen
  triode serve smollm2-135m --config serve.toml        # lines such as: port = 9000
  triode serve smollm2-135m --server hypercorn --max-requests-per-minute 60 --log-format json
  triode serve ./Qwen3-8B --tool-parser hermes --reasoning-parser none

  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'

The playground is at http://localhost:8000. Every flag may be given in the environment, as TRIODE_PORT=9000 for --port 9000, several API keys with commas between."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, a settings file, and a flag for every field of EngineConfig and ServerConfig."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_engine_arguments(parser)
    parser.add_argument("--config", metavar="FILE", help="a TOML file with settings by their names, as max_running = 8")
    add_flags(parser.add_argument_group("server"), ServerConfig)


def main(arguments: argparse.Namespace) -> int:
    """Check all that needs no model, take the port, then load and serve."""
    require_extra()
    from triode.engine.server.starting import check_tls, take_port
    from triode.engine.server.tracing import export_spans

    engine, server = read_settings(arguments, os.environ)
    if server.server == "hypercorn":
        require_extra("hypercorn")
    check_tls(server)
    _begin_to_log(server)
    if server.otlp_endpoint is not None:
        export_spans(server.otlp_endpoint)
    with take_port(server) as bound:
        if server.server == "uvicorn":
            _run_on_uvloop(_serve(arguments.model, engine, server, bound))
        else:
            trio.run(_serve_on_trio, arguments.model, engine, server, bound)
    return 0


def read_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> tuple[EngineConfig, ServerConfig]:
    """The settings from flags, environment and file.

    Raises:
        ValueError: for a wrong value, or a name in the file that is no setting.
    """
    types = field_types([EngineConfig, ServerConfig], omit={"model"})
    values = {} if arguments.config is None else from_file(Path(arguments.config), types)
    values |= from_environment(environment, types)
    values |= engine_settings(arguments) | given(arguments, ServerConfig)
    of_server = {name: values.pop(name) for name in ServerConfig.__struct_fields__ if name in values}
    # The structs check what the flags' and the file's types do not. A server is ready only when guides are, too.
    engine = EngineConfig(warm_guides=True).override(values)
    server = ServerConfig(**of_server)  # type: ignore[arg-type]
    if engine.executor == "auto" and has_gpu(engine.options.device):
        # The GPU's launches then wait for no client's bytes.
        engine = engine.override({"executor": "process"})
    return engine, server


def _begin_to_log(config: ServerConfig) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(config.log_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It would log every socket once more; what it has to say about itself, the start-up report says.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # uvicorn takes every refusal before a handshake for a fault; it has its own line as an answer.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "completing handshake" not in record.getMessage())


def has_gpu(device: str) -> bool:
    """Whether steps will run on a GPU, as far as that is known without torch."""
    return device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())


def _run_on_uvloop(serving: Coroutine[object, None, None]) -> None:
    # Its writes keep the interpreter's lock. asyncio's offer it to the engine's threads, and wait, for each client in turn.
    import uvloop

    uvloop.run(serving)


async def _serve(model: str, engine_config: EngineConfig, server_config: ServerConfig, bound: socket.socket) -> None:
    # Imported here: they import torch's neighbours and uvicorn, which `--help` does without.
    from triode.engine.aio import open_engine
    from triode.engine.server.running import Server, run_server

    with ExitStack() as shown:
        progress = shown.enter_context(_progress(server_config))
        async with open_engine(model, engine_config, progress=progress) as engine:
            shown.close()
            settle()
            await run_server(Server(engine, server_config, _report), bound)


async def _serve_on_trio(
    model: str, engine_config: EngineConfig, server_config: ServerConfig, bound: socket.socket
) -> None:
    from triode.engine.engine import open_engine
    from triode.engine.server.trio_running import run_until_signal

    with ExitStack() as shown:
        progress = shown.enter_context(_progress(server_config))
        async with open_engine(model, engine_config, progress=progress) as engine:
            shown.close()
            settle()
            await run_until_signal(engine, server_config, bound, _report)


def _progress(config: ServerConfig) -> AbstractContextManager[Progress]:
    # Whoever reads JSON reads nothing else, whatever stderr is.
    return nullcontext(Records(_LOG)) if config.log_format == "json" else shown_progress()


def _report(text: str) -> None:
    # A line of the log, which may be JSON.
    _LOG.info("%s", text)
