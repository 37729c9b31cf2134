"""Settings of where activations come from: model, text, how they are harvested, and at which site."""

from dataclasses import dataclass
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


ATTENTION_KERNELS = ("eager", "sdpa", "flash_attention_2")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which language model."""

    name: str
    """Short name used in the run's name."""
    id: str
    """Hub id, local directory in Hugging Face layout, or 'bundled'."""
    revision: str | None
    """Hub revision; null is the newest."""
    dtype: str
    """Number format of the forward pass: float32, bfloat16 or float16."""
    attention: str
    """Attention kernel: eager, sdpa or flash_attention_2."""
    remote_code: bool
    """Whether Python code that comes with the checkpoint may be run."""

    def problems(self) -> list[str]:
        found = []
        if self.dtype not in DTYPES:
            found.append(f"model.dtype={self.dtype}: not a number format. Choose {', '.join(DTYPES)}.")
        if self.attention not in ATTENTION_KERNELS:
            found.append(f"model.attention={self.attention}: no such kernel. Choose {', '.join(ATTENTION_KERNELS)}.")
        return found


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which text."""

    name: str
    """Short name."""
    id: str
    """Hub id of a dataset, a local file or directory (.txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, or one that
    `datasets` saved), or 'bundled'."""
    subset: str | None
    """The dataset's configuration on the hub, where it has several."""
    split: str
    """Split to train on (hub datasets, saved ones)."""
    held_out_split: str | None
    """Split that is never trained on; null holds out 2% of documents by a hash of their text."""
    text_column: str
    """Column or JSON key that holds the text."""
    seed: int
    """Draws the order of the stream; `seed` draws the SAE."""
    repeat: bool
    """Whether a lane that has read its text starts its next epoch; false stops the run there (exit 2)."""
    strict: bool
    """Whether a document that is empty, damaged or not text is an error; false counts it and goes on without it."""

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class HarvestConfig:
    """Where activations come from; see the subclasses."""

    source: str
    calibration_tokens: int
    """Tokens from which centre, scale and outlier limit are fixed, once."""
    prefetch: int | None
    """Batches harvested beside the step, ahead of it, rounded up to whole forward passes of each lane; 0: none; null:
    on a GPU 2 from files and half of pool_batches from a model (not measured yet), none on a CPU (takes its cores)."""

    def problems(self) -> list[str]:
        found = []
        if self.calibration_tokens < 1:
            found.append(f"harvest.calibration_tokens={self.calibration_tokens}: must be at least 1.")
        if self.prefetch is not None and self.prefetch < 0:
            found.append(f"harvest.prefetch={self.prefetch}: must not be negative. 0 harvests nothing ahead.")
        return found


@dataclass(kw_only=True, slots=True)
class LiveHarvestConfig(HarvestConfig):
    """Run the language model while training."""

    context_length: int
    """Tokens a context, the beginning-of-sequence token included."""
    lanes: int | None
    """Independent readers of the text. The number of ranks divides it, and it divides batch_tokens. Default: the
    largest divisor of batch_tokens up to 64."""
    contexts_per_forward: int | None
    """Contexts of one lane that pass the language model together. Default: 8, or as many as fit twice into its pool."""
    pool_batches: int | None
    """Size of the shuffling pool, in batches. Default: 64, or what two forward passes of each lane take."""

    def problems(self) -> list[str]:
        found = HarvestConfig.problems(self)
        for key, least in (("context_length", 4), ("lanes", 1), ("contexts_per_forward", 1), ("pool_batches", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                found.append(f"harvest.{key}={value}: must be at least {least}.")
        return found


@dataclass(kw_only=True, slots=True)
class TensorsHarvestConfig(HarvestConfig):
    """Read activations from `*.safetensors` files with a tensor `activations` [n, d_model].

    sparsifier=gradient reads `gradients` of the same shape beside it, but for `held_out`.
    """

    path: str
    """Directory of the files."""
    held_out: str | None
    """Directory of held-out files; null keeps the last 5% of the rows (at most 100k) out of training."""


@dataclass(kw_only=True, slots=True)
class LayerConfig:
    """At which site the activations are taken; see the subclasses."""

    kind: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class BlockLayerConfig(LayerConfig):
    """A site named by its block: residual, mlp or attention."""

    index: Any
    """Block, from 0; negative counts from the end; 'middle' is n_blocks // 2."""

    def problems(self) -> list[str]:
        index = self.index
        if isinstance(index, list | tuple):
            return [f"layer.index={list(index)}: several sites in one run are not built yet. Give one block."]
        if index != "middle" and (isinstance(index, bool) or not isinstance(index, int)):
            return [f"layer.index={index}: not a block. Give an integer (negative counts from the end) or 'middle'."]
        return []


@dataclass(kw_only=True, slots=True)
class ModuleLayerConfig(LayerConfig):
    """Any module of the language model, by its dotted name."""

    path: str
    """Dotted name as in `model.named_modules()`."""
    side: str
    """Which tensor of the module: output or input."""

    def problems(self) -> list[str]:
        return (
            []
            if self.side in ("output", "input")
            else [f"layer.side={self.side}: not a side of a module. Choose output or input."]
        )
