"""The five floors: every import points down, and what is called pure loads neither Trio nor torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "cache", "models", "actors", "engine")
ANYWHERE = ("triode.ids", "triode.errors")
ACTORS = {"tokenizer", "scheduler", "cache", "executor", "detokenizer"}
ACTORS_VOCABULARY = {
    f"triode.actors.{name}" for name in ("messages", "channels", "mailbox", "transcript", "statistics")
}

# What decides, in each floor. In actors/ and cache/ everything does but for these.
NOT_PURE = {"triode.actors.channels", "triode.actors.mailbox", "triode.cache.pool"}
PURE_ELSEWHERE = {
    "triode.ids",
    "triode.errors",
    "triode.engine.config",
    "triode.engine.statistics",
    "triode.engine.server.replies.reader",
    "triode.engine.server.responses.history",
    "triode.engine.server.responses.output",
    "triode.engine.server.tools.plan",
    "triode.kernels.native.numa",
    "triode.models.config",
    "triode.models.parallel",
    "triode.models.rank_link",
    "triode.models.runner",
    "triode.models.sampling",
    "triode.models.step",
}


def module_name(path: Path) -> str:
    return ".".join(("triode", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}


def imported_modules(path: Path) -> Iterator[str]:
    """Everything imported anywhere in the file: at the top, in functions, for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # A name may be a module: `from triode import errors`. One that is none is harmless here.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_upwards(module: str, imported: str) -> bool:
    own_floor, *_ = module.split(".")[1:]
    if imported.split(".")[0] != "triode" or imported.startswith(ANYWHERE):
        return False
    lower_floors = FLOORS[: FLOORS.index(own_floor) + 1]
    return own_floor != "engine" and not imported.startswith(tuple(f"triode.{floor}." for floor in lower_floors))


def imports_another_actor(module: str, imported: str) -> bool:
    if not module.startswith("triode.actors.") or not imported.startswith("triode.actors."):
        return False
    own_folder, folder = module.split(".")[2], imported.split(".")[2]
    in_own_folder = own_folder in ACTORS and folder == own_folder
    return not (in_own_folder or any(imported.startswith(name) for name in ACTORS_VOCABULARY))


def test_every_import_points_down() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imported_modules(path)
        if imports_upwards(module, imported)
    ]
    assert upwards == []


def test_no_actor_imports_another() -> None:
    across = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imported_modules(path)
        if imports_another_actor(module, imported)
    ]
    assert across == []


def test_only_gpu_kernels_import_triton() -> None:
    importers = {
        module.removeprefix("triode.")
        for module, path in MODULES.items()
        if any(imported.split(".")[0] == "triton" for imported in imported_modules(path))
    }
    assert {name for name in importers if not name.startswith("kernels.")} == set()


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("triode.models.runner", "triode.actors.messages"),
        ("triode.kernels.linear.reference", "triode.models.quant"),
        ("triode.cache.manager", "triode"),
        ("triode.cache.manager", "triode.Engine"),
    ],
)
def test_an_upward_import_would_be_seen(module: str, imported: str) -> None:
    assert imports_upwards(module, imported)


def test_an_import_of_another_actor_would_be_seen() -> None:
    assert imports_another_actor("triode.actors.scheduler.policy", "triode.actors.cache.actor")
    assert imports_another_actor("triode.actors.messages", "triode.actors.scheduler.request")
    assert not imports_another_actor("triode.actors.cache.actor", "triode.actors.messages.Match")


def pure_modules() -> list[str]:
    in_pure_folders = {
        module
        for module in MODULES
        if module.startswith(("triode.actors.", "triode.cache."))
        and (not module.startswith("triode.actors.executor.") or module.endswith(".protocol"))
        and not module.endswith(".actor")
    }
    return sorted((in_pure_folders - NOT_PURE) | PURE_ELSEWHERE)


def run_python(code: str, *arguments: str) -> str:
    """Run in a fresh interpreter, away from the checkout; returns what it prints."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


LOADED = "print(*sorted({'trio', 'torch', 'triton', 'transformers'} & set(sys.modules)))"


def test_what_decides_loads_neither_trio_nor_torch() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n" + LOADED
    assert run_python(code, *pure_modules()).split() == []


def test_importing_triode_loads_no_dependency() -> None:
    assert run_python("import sys, triode\n" + LOADED).split() == []


def test_importing_the_engine_loads_no_numpy() -> None:
    assert run_python("import sys, triode.engine.engine; print('numpy' in sys.modules)").split() == ["False"]


def test_help_loads_no_torch() -> None:
    code = """
import sys
from triode.engine.cli.main import main
sys.argv = ["triode", "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
print()
"""
    *_, loaded = run_python(code + LOADED).splitlines()
    assert "torch" not in loaded


def test_a_cpu_engine_runs_where_triton_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["triton"] = None
import trio, triode

async def main():
    async with triode.open_engine("random:tiny", device="cpu") as engine:
        stream = await engine.submit((1, 2, 3), triode.SamplingParams(max_tokens=2, ignore_eos=True))
        async for delta in stream:
            pass
        print(stream.completion.finish_reason)

trio.run(main)
"""
    assert run_python(code).strip() == "length"
