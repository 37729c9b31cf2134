"""What the documents name exists: files, links, tests; and the README keeps its size."""

import re
from pathlib import Path

import pytest

from sae_train.sites.families import FAMILIES

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").glob("*.md")])


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def tables(text: str) -> list[str]:
    return [line for line in without_code(text).splitlines() if line.startswith("|")]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_the_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])(?:conf|sae_train|scripts|slurm|tests|docs|\.ci)/[\w./-]*\w", text))
    assert sorted(name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_the_tests_that_a_document_names_exist(document: Path) -> None:
    """A test is named by its function, with a `*` where several are meant, after the file that it is in."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    file = ""
    for name, suffix in re.findall(r"\b(test_\w+)(\.py|\*)?", document.read_text(encoding="utf-8")):
        if suffix == ".py":
            file = f"{name}.py"
            assert file in sources, file
        else:
            assert f"def {name}" + ("" if suffix else "(") in sources[file], f"{name} in {file}"


def test_the_readme_keeps_its_size() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 100] == []
    assert [line for line in tables(text) if line.count("|") > 6] == []


def test_the_readme_shows_a_picture() -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown != []
    assert all((ROOT / path).is_file() for path in shown)


def test_the_tree_of_the_readme_is_the_package() -> None:
    """Each room has a line, and each file that a line names is in its room."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = dict(re.findall(r"^  (\w+)/ +(\S.*)$", text, flags=re.MULTILINE))
    rooms = {path.name for path in (ROOT / "sae_train").iterdir() if (path / "__init__.py").exists()}
    assert set(tree) == rooms
    named = {f"{room}/{file}" for room, line in tree.items() for file in re.findall(r"\w+\.py", line)}
    assert {name for name in named if not (ROOT / "sae_train" / name).exists()} == set()


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_a_document_counts_the_model_types(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert re.findall(r"(\d+) model\s+types", text) == [str(len(FAMILIES))]


def test_the_help_of_the_learning_rate_names_a_document() -> None:
    source = (ROOT / "sae_train" / "config" / "optimizer.py").read_text(encoding="utf-8")
    named = re.findall(r"docs/[\w/]+\.md", source)
    assert named
    assert all((ROOT / name).exists() for name in named)
