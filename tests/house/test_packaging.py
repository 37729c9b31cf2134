"""What is installed: every package, every YAML, the bundled model and corpus; and from a wheel it works anywhere."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from operator import attrgetter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sae_train

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_installed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "sae_train").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"sae_train.conf"} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


FREE = {"triton"}
"""Not pinned: torch's CUDA build brings a version of its own choice."""


def test_what_is_pinned_is_what_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonical(name): version for name, version in pairs}
    project = PROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        name = canonical(requirement.name)
        assert name in FREE or requirement.specifier.contains(pins[name]), text
    assert not FREE & set(pins)
    assert pins["torch"] == "2.13.0"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_public_names_are_there() -> None:
    assert sae_train.__version__ == PROJECT["project"]["version"]
    for name in sae_train.__all__:
        assert getattr(sae_train, name) is not None
        assert name in dir(sae_train)
    with pytest.raises(AttributeError, match="nothing"):
        attrgetter("nothing")(sae_train)


def test_importing_the_package_is_cheap() -> None:
    program = "import sae_train, sys; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_a_wheel_holds_everything_and_runs_from_anywhere(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a copy: setuptools leaves a build/ folder, which a later wheel would pick up
    for folder in ("sae_train", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("sae_train", "sae_train"), ("conf", "sae_train/conf")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "conf/"))]

    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    program = "import sae_train, sys; print(sae_train.__file__); from sae_train.cli.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "dry_run=true"], cwd=empty, env={"PYTHONPATH": str(site)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(site))
    assert "mutual_choice" in done.stdout
    assert list(empty.iterdir()) == []
