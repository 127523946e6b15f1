"""How long OpenMP spins: bounded where Triode imports torch, unless the environment says something."""

import os
import subprocess
import sys

import pytest

from triode.kernels.openmp import SPIN_COUNT, bound_spinning, spinning_bounded


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


@pytest.mark.parametrize("before", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_a_bound_for_one_import_leaves_the_environment_as_it_was(before: dict[str, str]) -> None:
    environment = dict(before)
    with spinning_bounded(environment):
        assert environment == (before or {"GOMP_SPINCOUNT": str(SPIN_COUNT)})
    assert environment == before


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP there, which reads other variables")
def test_an_engine_that_imports_torch_bounds_its_spinning_and_leaves_no_setting_behind() -> None:
    code = """
import os, triode
with triode.LLM("random:tiny", kernels="reference", device="cpu", max_context_tokens=64):
    print(set(os.environ) & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
"""
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = unset | {"OMP_DISPLAY_ENV": "verbose"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout == "set()\n"
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in ended.stderr
