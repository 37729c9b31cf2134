"""The language model, tokenizer and corpus that ship with the package (see bundled/LICENSE)."""

from pathlib import Path

_BUNDLED = Path(__file__).resolve().parent / "bundled"


def model_directory() -> Path:
    """Return the bundled causal language model and its tokenizer, in Hugging Face layout."""
    return _BUNDLED / "model"


def training_corpus() -> Path:
    """Return the bundled corpus: JSON lines {"text": ...}, xz-compressed."""
    return _BUNDLED / "corpus" / "train.jsonl.xz"


def held_out_corpus() -> Path:
    """Return the bundled corpus's held-out split, in the same format."""
    return _BUNDLED / "corpus" / "held_out.jsonl.xz"
