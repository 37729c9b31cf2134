"""Settings of where activations come from: model, text, how they are harvested, and at which site."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from sae_train.config.ranges import Range, Settings

HELD_OUT_BLOCK = 256
"""Rows of files that are held out together."""

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION_KERNELS = ("eager", "sdpa", "flash_attention_2")


@dataclass(kw_only=True, slots=True)
class ModelConfig(Settings):
    """The language model whose activations are harvested."""

    name: str
    """Short name of the model, for the run's name."""
    id: str
    """Hub id, local directory in Hugging Face layout, or 'bundled'."""
    revision: str | None
    """Revision on the Hub. Default: the newest."""
    dtype: Annotated[str, Range(choices=DTYPES, noun="number format")]
    """Number format of the forward pass."""
    attention: Annotated[str, Range(choices=ATTENTION_KERNELS, noun="kernel")]
    """Attention kernel of the forward pass."""
    remote_code: bool
    """Allow Python code that comes with the checkpoint to run."""


@dataclass(kw_only=True, slots=True)
class DataConfig(Settings):
    """The text that the language model reads."""

    name: str
    """Short name of the text."""
    id: str
    """Hub id of a dataset; a local file or directory (.txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet, or one that
    `datasets` saved); or 'bundled'."""
    subset: str | None
    """The dataset's configuration on the Hub. Default: its only one."""
    split: str
    """Split to train on (Hub datasets and saved ones)."""
    held_out_split: str | None
    """Split that is never trained on. Default: 2% of the documents, chosen by a hash of their text."""
    text_column: str
    """Column or JSON key that holds the text."""
    seed: Annotated[int, Range(at_least=0)]
    """Seed of the order of the stream. `seed` is the SAE's own."""
    repeat: bool
    """Start a lane's next epoch at the end of its text. false stops the run there (exit status 2)."""
    strict: bool
    """Refuse documents that are empty, damaged or not text. false counts and skips them."""


@dataclass(kw_only=True, slots=True)
class HarvestConfig(Settings):
    """Where activations come from; see the subclasses."""

    source: str
    calibration_tokens: Annotated[int, Range(at_least=1)]
    """Tokens from which centre, scale and outlier limit are set, once."""
    prefetch: Annotated[int | None, Range(at_least=0, advice="0 harvests nothing ahead.")]
    """Batches that are harvested ahead in a background thread, rounded up to whole forward passes of each lane. 0 turns
    it off. Default: on a GPU 2 from files and half of pool_batches from a model (not measured yet), on a CPU 0."""

    @property
    def runs_model(self) -> bool:
        """Whether activations come from a language model that runs while training."""
        return False

    @property
    def held_out_unit(self) -> int:
        """Tokens that are held out together."""
        return HELD_OUT_BLOCK


@dataclass(kw_only=True, slots=True)
class LiveHarvestConfig(HarvestConfig):
    """Run the language model while training."""

    context_length: Annotated[int, Range(at_least=4)]
    """Tokens a context, the beginning-of-sequence token included."""
    lanes: Annotated[int | None, Range(at_least=1)]
    """Independent readers of the text. The number of ranks divides it, and it divides batch_tokens. Default: the
    largest divisor of batch_tokens up to 64."""
    contexts_per_forward: Annotated[int | None, Range(at_least=1)]
    """Contexts of one lane in a forward pass. Default: 8, or as many as fit twice into the lane's pool."""
    pool_batches: Annotated[int | None, Range(at_least=2)]
    """Size of the shuffling pool, in batches. Default: 64, or two forward passes of each lane if that is more."""

    @property
    def runs_model(self) -> bool:
        return True

    @property
    def held_out_unit(self) -> int:
        return self.context_length


@dataclass(kw_only=True, slots=True)
class TensorsHarvestConfig(HarvestConfig):
    """Read activations from `*.safetensors` files with a tensor `activations` [n, d_model].

    sparsifier=gradient also reads a tensor `gradients` of the same shape, except from `held_out`.
    """

    path: str
    """Directory of the files."""
    held_out: str | None
    """Directory of held-out files. Default: the last 5% of the rows, at most 100k, which are then not trained on."""


@dataclass(kw_only=True, slots=True)
class LayerConfig(Settings):
    """The site where activations are taken; see the subclasses."""

    kind: str

    @property
    def names_several(self) -> bool:
        """Whether it stands for the sites of several blocks, which only the model shows."""
        return False


@dataclass(kw_only=True, slots=True)
class BlockLayerConfig(LayerConfig):
    """A site named by its block: residual, mlp or attention."""

    index: Any
    """Block, from 0. A negative number counts from the end; 'middle' is n_blocks // 2. In a grid also all, or "every=4"
    for blocks 3, 7, 11 and so on."""

    @property
    def stride(self) -> int | None:
        """N where `index` is 'every=N', 1 where it is 'all', and None where it is one block."""
        found = re.fullmatch(r"all|every=([1-9][0-9]*)", self.index) if isinstance(self.index, str) else None
        return int(found[1] or 1) if found else None

    @property
    def names_several(self) -> bool:
        return self.stride is not None

    def conflicts(self) -> list[str]:
        index = self.index
        if isinstance(index, list | tuple):
            blocks = ",".join(map(str, index))
            said = f"layer.index=[{blocks}]: several blocks, which only a grid takes. Write "
            return [f"{said}'grid={{layer.index:[{blocks}]}}'."]
        is_block = index == "middle" or (isinstance(index, int) and not isinstance(index, bool))
        if not is_block and self.stride is None:
            return [
                f"layer.index={index}: not a block. Give an integer (negative counts from the end) or 'middle'; in a "
                "grid also 'all' or 'every=N'."
            ]
        return []


@dataclass(kw_only=True, slots=True)
class ModuleLayerConfig(LayerConfig):
    """Any module of the language model, by its dotted name."""

    path: str
    """Dotted name as in `model.named_modules()`."""
    side: Annotated[str, Range(choices=("output", "input"), noun="side of a module")]
    """Tensor of the module that is taken."""
