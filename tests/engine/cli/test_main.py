"""The command line as a whole."""

import json
import subprocess
import sys

import pytest

import triode
from triode.engine.cli.main import main


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], ["chat", "--help"], ["bench", "latency", "--help"], ["doctor", "--help"]]
)
def test_help_imports_no_torch(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from triode.engine.cli.main import main\n"
        "try:\n"
        f"    main({words})\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: triode")
    assert result.stdout.endswith("[]\n")


def test_help_keeps_the_capitals_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "Serve a model over HTTP, as OpenAI's clients expect it." in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"triode {triode.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND (see triode --help)"),
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        (["run"], "the following arguments are required: MODEL, -p/--prompt (see triode run --help)"),
        (["run", "m", "-p", "x", "--top-k", "many"], "argument --top-k: must be an integer, got 'many'"),
        (["run", "m", "-p", "x", "--dtype", "int3"], "argument --dtype: must be one of auto, float32, bfloat16"),
        (["run", "m", "-p", "x", "--speed", "9"], "unrecognized arguments: --speed 9 (see triode run --help)"),
        (
            ["bench", "latency", "m", "--percents", "3"],
            "unrecognized arguments: --percents 3 (see triode bench latency",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert error.startswith(f"triode: error: {message}")
    assert error.count("\n") == 1


def test_the_doctor_names_kernels_versions_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["kernels"]) == {"float32", "bfloat16", "float16"}
    assert "paged_attention" in report["kernels"]["float32"]
    assert report["versions"]["triode"] == triode.__version__
    assert report["models"]["smollm2-135m"].endswith(".gguf")
    assert report["processor"]["num_allowed_cores"] >= 1
    assert 0 < report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]


def test_the_doctor_tells_people_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    labels = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"versions", "CPU", "CPU features", "memory", "GPU", "device", "kernels, float32"} <= set(labels)
