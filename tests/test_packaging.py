"""The root folders are the package, and what it needs is stated once and exactly."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import triode

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "actors", "models", "cache", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_package_is_made_of_the_root_folders(folder: str) -> None:
    link = ROOT / "src" / "triode" / folder
    assert link.is_symlink(), f"{link} must be a symbolic link: check out with core.symlinks=true"
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / folder


def test_no_folder_of_the_package_can_be_taken_for_another_project(tmp_path: Path) -> None:
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n)))"
    command = [sys.executable, "-c", code, *FOLDERS]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.split() == []


def test_kernels_is_a_namespace_and_every_other_folder_is_a_package() -> None:
    # With an __init__.py here, transformers takes `kernels` for the distribution of that name (DESIGN.md, "Packaging").
    assert list((ROOT / "kernels").rglob("__init__.py")) == []
    for folder in FOLDERS[:-1]:
        homes = {path.parent for path in (ROOT / folder).rglob("*.py")}
        assert [home for home in homes if not (home / "__init__.py").exists()] == []


def test_the_wheel_has_every_source_that_is_compiled_where_it_runs() -> None:
    packed = {path for glob in PROJECT["tool"]["setuptools"]["package-data"]["triode"] for path in ROOT.glob(glob)}
    sources = {path for suffix in ("h", "cpp", "cu") for path in (ROOT / "kernels").rglob(f"*.{suffix}")}
    assert {path.suffix for path in sources} == {".h", ".cpp", ".cu"}
    assert sources <= packed


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert not (ROOT / "conftest.py").exists()


def test_there_are_at_most_twelve_mandatory_dependencies() -> None:
    assert len(DEPENDENCIES) <= 12


def test_triton_is_needed_on_linux_only() -> None:
    (triton,) = (requirement for requirement in DEPENDENCIES if requirement.name == "triton")
    assert triton.marker is not None
    environment = {**default_environment(), "platform_system": "Darwin"}
    assert not triton.marker.evaluate({key: str(value) for key, value in environment.items()})


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = dict(line.split("==") for line in lines if line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    groups = [line for group in PROJECT["dependency-groups"].values() for line in group if isinstance(line, str)]
    extras = [line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra]
    for requirement in [*DEPENDENCIES, *map(Requirement, groups + extras)]:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_tests_install_every_optional_dependency() -> None:
    tested = {Requirement(line).name for line in PROJECT["dependency-groups"]["test"]}
    for extra in PROJECT["project"]["optional-dependencies"].values():
        assert {Requirement(line).name for line in extra} <= tested


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == triode.__version__
    assert f"## {triode.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+)`", text))
    named |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
