"""A run opens its text, tokenizer, architecture and files once: `check_stream` hands them on to the stream."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from sae_train.cli.train import run_command
from sae_train.harvest import corpus, model_facts, row_plan
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from tools.tiny_models import planned_config
from tools.tiny_runs import rows_run, tiny_run

Opens = Counter[str]
OPENERS: dict[str, tuple[Any, str]] = {
    "text": (corpus, "open_text"),
    "tokenizer": (transformers.AutoTokenizer, "from_pretrained"),
    "configuration": (model_facts, "read_model_config"),
    "architecture": (model_facts, "without_weights"),
    "headers": (row_plan, "read_headers"),
}


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Opens:
    """Return the number of calls of each of `OPENERS` so far."""
    seen: Opens = Counter()

    def count(name: str, opener: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            return opener(*args, **options)

        return counted

    for name, (owner, attribute) in OPENERS.items():
        monkeypatch.setattr(owner, attribute, count(name, getattr(owner, attribute)))
    return seen


def test_a_run_on_a_language_model(tmp_path: Path, opens: Opens) -> None:
    assert run_command(tiny_run(tmp_path)) == 0
    assert opens == {"text": 1, "tokenizer": 1, "configuration": 1, "architecture": 1}


def test_a_run_on_files(tmp_path: Path, opens: Opens) -> None:
    assert run_command(rows_run(tmp_path)) == 0
    assert opens == {"headers": 1}


def test_a_stream_that_is_built_without_facts_opens_once_too(opens: Opens) -> None:
    source = planned_config("bundled").source
    build_stream(source, ranks=Solo()).close()
    once = dict(opens)
    build_stream(source, ranks=Solo(), facts=check_stream(source, n_ranks=1)).close()
    assert once == {"text": 1, "tokenizer": 1, "configuration": 1, "architecture": 1}
    assert opens == {name: 2 * count for name, count in once.items()}
