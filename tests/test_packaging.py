"""What is installed is what is in the repository, floors keep their order, and `--help` stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import sctconv

ROOT = Path(__file__).parent.parent
FLOORS = {"sctconv": ROOT / "sctconv", "sctconv.formats": ROOT / "formats", "sctconv.runtime": ROOT / "runtime"}


def _packages() -> set[str]:
    found = set()
    for name, top in FLOORS.items():
        for directory, folders, files in os.walk(top):  # does not follow the two links
            folders[:] = [folder for folder in folders if folder != "__pycache__"]
            if "__init__.py" in files:
                relative = Path(directory).relative_to(top)
                found.add(".".join([name, *relative.parts]))
    return found


def _modules() -> list[Path]:
    return [path for top in FLOORS.values() for path in top.rglob("*.py") if not path.is_relative_to(top / "formats")
            and not path.is_relative_to(top / "runtime")]  # fmt: skip


def test_every_package_is_declared() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == _packages()


def test_every_dependency_has_a_range_and_a_constraint() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for requirement in project["dependencies"]:
        name, _, bounds = requirement.partition(">=")
        assert "," in bounds and "<" in bounds, f"{requirement}: give a lower and an upper bound"
        assert name in pinned, f"{name} is not in constraints.txt"


def test_the_wheel_has_every_module_and_the_specification(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in _modules()}
    expected = {name if name.startswith("sctconv/") else f"sctconv/{name}" for name in expected}
    assert expected <= names
    assert {"sctconv/formats/SPEC.md", "sctconv/py.typed"} <= names
    assert not any(name.startswith(("formats/", "runtime/", "tests/")) for name in names), "nothing generic at the top"


def test_floors_are_imported_by_their_own_name() -> None:
    """A bare `import formats` would make a second copy of its classes."""
    for path in [*_modules(), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            assert not {name.split(".")[0] for name in names} & {"formats", "runtime"}, path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("sctconv", {"torch", "transformers", "numpy"}),
        ("sctconv.cli", {"torch", "transformers", "numpy", "gguf", "safetensors"}),
        ("sctconv.formats.reader", {"torch", "transformers", "safetensors"}),
        ("sctconv.formats.writer", {"torch", "transformers", "safetensors"}),
        ("sctconv.formats.safetensors_dir", {"torch", "transformers"}),
    ],
)
def test_light_imports(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not forbidden & set(loaded.split())


def test_import_contract() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names_resolve_and_are_sorted() -> None:
    assert sctconv.__all__ == sorted(sctconv.__all__)
    for name in sctconv.__all__:
        assert getattr(sctconv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sctconv.nonsense  # noqa: B018


def test_the_changelog_knows_this_version() -> None:
    assert f"## {sctconv.__version__}" in (ROOT / "CHANGELOG.md").read_text()
