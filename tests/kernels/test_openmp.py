"""How long OpenMP spins: bounded in our own processes, unless the environment says something."""

import subprocess
import sys

import pytest

from triode.kernels.openmp import SPIN_COUNT, bound_spinning


@pytest.mark.parametrize("setting", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_environment_says_is_left_alone(setting: str) -> None:
    environment = {setting: "PASSIVE"}
    bound_spinning(environment)
    assert environment == {setting: "PASSIVE"}


def test_spinning_is_bounded_otherwise() -> None:
    environment: dict[str, str] = {}
    bound_spinning(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


@pytest.mark.parametrize("module", ["triode.engine.cli.main", "triode.actors.executor.worker"])
def test_our_processes_can_set_the_bound_before_torch_is_imported(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
