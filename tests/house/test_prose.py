"""The prose of the repository keeps the rules that `.ci/prose.py` can check, and the check finds what breaks them."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
ALIKE = "ali" + "ke"  # in two parts, because the check reads this file, too
THAT_OF = "that" + " of"


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prose", ROOT / ".ci" / "prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_repository_keeps_the_rules(prose: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = prose.main([])
    assert (status, capsys.readouterr().out) == (0, "")


@pytest.mark.parametrize(
    ("name", "source", "line", "rule"),
    [
        ("a.py", '"""A module."""\ndef f():\n    """Return what was found."""\n', 3, "return"),
        ("a.py", 'def f():\n    """Do a thing.\n\n    Return which of\n    them."""\n', 4, "return"),
        ("a.py", 'class A:\n    """A class.\n\n    Returns how it went.\n    """\n', 4, "return"),
        ("a.py", 'X = 1\n"""Return where it lies."""\n', 2, "return"),
        ("a.py", f'def f():\n    """Return two sums, made {ALIKE}."""\n', 2, "words"),
        ("a.py", f"x = 1\n# One comment whose {THAT_OF[:4]}\n# {THAT_OF[5:]} two lines.\n", 2, "words"),
        ("a.py", "x = 1  # the same" + " of y\n", 1, "words"),
        ("a.py", f'raise ValueError(f"{{x}} and y are {ALIKE}")\n', 1, "words"),
        ("a.py", f'parser.add_argument("--x", help="All are {ALIKE.title()}")\n', 1, "words"),
        ("README.md", "# Title\n\nA rate beside" + " it.\n", 3, "words"),
        ("README.md", f"A rate like {THAT_OF[:4]}\n{THAT_OF[5:]} others.\n", 1, "words"),
        ("conf/a.yaml", f"k: 1\nx: 2 # {ALIKE}\n", 2, "words"),
        (".ci/run", f"set -e # {ALIKE}\n", 1, "words"),
    ],
)
def test_a_bad_member_is_found(prose: ModuleType, name: str, source: str, line: int, rule: str) -> None:
    assert [(found[0], found[1], found[2]) for found in prose.violations_of(name, source)] == [(name, line, rule)]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", 'def f():\n    """Return whether x is above the cut."""\n'),
        ("a.py", 'def f():\n    """Return the part of the code that is decoded."""\n'),
        ("a.py", '# Return what was typed: a comment, not a docstring.\nx = "Return what you borrowed."\n'),
        ("a.py", f"from sae_train import {ALIKE}\n"),
        ("README.md", f"Call `{ALIKE}()`.\n\n```\n{ALIKE}\n```\n"),
        ("conf/a.yaml", f"{ALIKE}: 1\n"),
    ],
)
def test_good_members_pass(prose: ModuleType, name: str, source: str) -> None:
    assert prose.violations_of(name, source) == []


def test_a_long_subject_is_found(prose: ModuleType) -> None:
    log = f"1234567 {'a' * 72}\n89abcde {'b' * 73}\n"
    assert [found[:3] for found in prose.subject_violations(log)] == [("commit 89abcde", 0, "subject")]


def test_subjects_are_skipped_with_a_reason_where_there_is_no_git(
    prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert prose.log_since_base() is None
    assert "were not checked: fatal: not a git repository" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prose.log_since_base() is None
    assert "were not checked: [Errno 2]" in capsys.readouterr().err


def test_subjects_since_the_base_are_read(
    prose: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "o" * 80)  # the base itself is not checked
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    monkeypatch.setattr(prose, "BASE", git("rev-parse", "HEAD"))
    git("commit", "--quiet", "--allow-empty", "-m", "n" * 73)
    assert prose.main([]) == 1
    assert "subject: 73 characters" in capsys.readouterr().out
