"""Check the prose of this repository: docstrings, comments, messages, documents and the subjects of commits.

    python .ci/prose.py              # every file, and every commit since BASE
    python .ci/prose.py FILE ...     # these files alone

CONTRIBUTING.md has the rules. This script holds those that a pattern can find:

    return     in a docstring, "Return" is followed by a noun, not by "what", "which", "where", "how" or the like
               ("Return whether" is allowed)
    words      nothing says "alike" and the like: the noun is repeated instead
    subject    the subject of a commit has at most 72 characters

A line of output is a violation, `file:line: rule: text`. The exit status is 1 where there is one.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = "37eb130"
"""Subjects of commits up to this one are not checked."""
LONGEST_SUBJECT = 72
RETURN = re.compile(r"\bReturns?:?\s+(?:what|which|where|how|who|whom|whose|why|when)\b")
WORDS = re.compile(r"\b(?:alike|the\s+same\s+of|that\s+of|beside\s+it)\b", re.IGNORECASE)
FOLDERS = ("sae_train", "tests", "scripts", "conf", "slurm", "docs", ".ci")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".sbatch", ".sh", ""}
"""Kinds of files that are read; the empty suffix is `.ci/run`."""
EXEMPT = {Path(__file__).resolve()}
"""This file quotes the words that it looks for."""

Violation = tuple[str, int, str, str]
"""File, line, rule and the text that breaks the rule."""


def files() -> list[Path]:
    """Return the files of the repository that hold prose."""
    found = [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml"}]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    skipped = {"__pycache__", "corpus"}
    return sorted(path for path in found if path not in EXEMPT and not skipped & set(path.parts))


def python_passages(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield each piece of prose in Python source: its line, its text, and whether it is a docstring.

    Pieces are docstrings, other strings (messages, help texts), and runs of comments on consecutive lines.
    """
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, node in docstrings
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and token.start[0] != last + 1:
            yield start, " ".join(block), False
            block = []
        start = start if block else token.start[0]
        last = token.start[0]
        block.append(token.string.lstrip("# "))
    if block:
        yield start, " ".join(block), False


def text_passages(source: str, only_comments: bool) -> Iterator[tuple[int, str, bool]]:
    """Yield the paragraphs of a document, or the comments of a YAML, TOML or shell file, each with its line.

    Code in a document, between backticks or fences, is left out.
    """
    if not only_comments:
        source = re.sub(r"```.*?```", lambda match: "\n" * match[0].count("\n"), source, flags=re.DOTALL)
        source = re.sub(r"`[^`]*`", lambda match: "_" + "\n" * match[0].count("\n"), source)
    block: list[str] = []
    start = 0
    for number, line in enumerate([*source.splitlines(), ""], 1):
        comment = re.search(r"(?:^|\s)#+(?:\s|$)(.*)", line) if only_comments else None
        text = (comment[1] if comment else "") if only_comments else line
        if text.strip():
            start = start if block else number
            block.append(text)
        elif block:
            yield start, "\n".join(block), False
            block = []


def violations_of(name: str, source: str) -> list[Violation]:
    """Return the violations in one file's source, which is read by the kind that its name says."""
    if name.endswith(".py"):
        passages = python_passages(source)
    else:
        passages = text_passages(source, only_comments=not name.endswith(".md"))
    found = []
    for start, text, is_docstring in passages:
        rules = {"words": WORDS} | ({"return": RETURN} if is_docstring else {})
        for rule, pattern in rules.items():
            for match in pattern.finditer(text):
                line = start + text.count("\n", 0, match.start())
                found.append((name, line, rule, " ".join(match[0].split())))
    return found


def subject_violations(log: str) -> list[Violation]:
    """Return the violations in a log of `hash subject` lines."""
    commits = [line.partition(" ") for line in log.splitlines()]
    long = [(commit, subject) for commit, _, subject in commits if len(subject) > LONGEST_SUBJECT]
    return [(f"commit {commit}", 0, "subject", f"{len(subject)} characters: {subject}") for commit, subject in long]


def log_since_base() -> str | None:
    """Return the log of commits since BASE, or None, with the reason on stderr, where git cannot tell."""
    command = ["git", "log", "--no-merges", "--format=%h %s", f"{BASE}..HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return done.stdout
        reason = done.stderr.strip()
    print(f"The subjects of commits were not checked: {reason}", file=sys.stderr)
    return None


def main(names: list[str]) -> int:
    """Print the violations of the named files, or of the whole repository; return the exit status."""
    found = []
    for path in [Path(name).resolve() for name in names] or files():
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        found += violations_of(name, path.read_text(encoding="utf-8"))
    if not names:
        found += subject_violations(log_since_base() or "")
    for name, line, rule, text in found:
        print(f"{name}:{line}: {rule}: {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
