"""Sites: where in a language model activations are taken, and where that is in each family's code.

`residual` is a block's output (before any final norm), `mlp` what is added to the residual stream, `attention`
the heads' output before its projection, `module` the output or input of any module. A family is one line of
`FAMILIES`. Facts come from running the architecture on tensors without storage, so no weight is ever read.
Letters: B contexts, T positions, D width of the site.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils.import_utils import is_flash_attn_2_available

from sae_train.assets import model_directory
from sae_train.config import BlockLayerConfig, ModelConfig, ModuleLayerConfig, RunConfig
from sae_train.errors import ConfigError, DataError, suggest
from sae_train.harvest.hub import hub_error, local_path


class Family(NamedTuple):
    """Where an architecture keeps its sites; names are relative to the model below its head."""

    blocks: str
    mlp: str
    """Module of a block whose output is added to the residual stream."""
    attention: str
    """Module of a block whose input is the heads' output."""
    causal: bool = True
    """Whether it predicts the next token, so that a loss is defined."""
    spare_positions: int = 0
    """Rows of the position table that no position uses."""


_LLAMA = Family("layers", "mlp", "self_attn.o_proj")
_GEMMA = Family("layers", "post_feedforward_layernorm", "self_attn.o_proj")
_BERT = Family("encoder.layer", "output.dense", "attention.output.dense", causal=False)
FAMILIES = {
    "gpt2": Family("h", "mlp", "attn.c_proj"),
    "gpt_neox": Family("layers", "mlp", "attention.dense"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "bert": _BERT,
    "roberta": _BERT._replace(spare_positions=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """One site of one language model."""

    d_model: int
    """Width of the site's activations."""
    n_blocks: int | None
    """Blocks of the model; None for a family that is not known."""
    index: int | None
    """Block of the site; None for a module."""
    module: str
    """Dotted name of the hooked module."""
    side: str
    """'output' or 'input' of that module."""
    label: str
    """Short name: 'residual2', 'module.transformer.h.1.mlp'."""
    max_positions: int | None
    """Longest context the model takes, where it says so."""
    flops_per_token: int
    """Operations of the weight products that run before the site is reached, for one token; where gradients are
    harvested those of the whole forward pass and of the backward pass down to the site."""
    has_loss: bool
    """Whether the model predicts the next token."""
    logits: int
    """How many a token has, where gradients are harvested; else 0: nothing computes them."""
    revision: str | None
    """Commit of the hub's model; None for a local one."""
    whole_flops_per_token: int = 0
    """Operations of the weight products of a whole forward pass, for one token; all experts count."""


class Reached(Exception):
    """Raised by our hook to end a forward pass at its site; only the call that raised it catches it."""


def site_facts(config: RunConfig) -> SiteFacts:
    """Return what is known of the config's site without weights.

    Raises:
        ConfigError: the model has no such site, or no such attention kernel.
        DataError: the model cannot be found.
    """
    settings = read_model_config(config.model)
    mode = FakeTensorMode()
    with mode:
        model = _without_weights(config.model, settings)
    module, side, index, label = _find(config, model, settings)
    width, flops, logits = _probe(model, module, side, mode, config)
    family = FAMILIES.get(settings.model_type)
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and family is not None:
        positions -= family.spare_positions
    return SiteFacts(
        d_model=width,
        n_blocks=len(_blocks(model, family)) if family else None,
        index=index,
        module=module,
        side=side,
        label=label,
        max_positions=positions,
        flops_per_token=flops,
        has_loss=loader_of(settings) is AutoModelForCausalLM,
        logits=logits,
        revision=getattr(settings, "_commit_hash", None),
        whole_flops_per_token=2 * sum(map(_product_weights, model.modules())),
    )


def source_of(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` is called with: a path or id, and where it may look."""
    if model.id == "bundled":
        return str(model_directory()), {"local_files_only": True}
    path = local_path(model.id)
    if path is None:
        return model.id, {"revision": model.revision} if model.revision else {}
    if not path.is_dir():
        raise DataError(f"model.id={model.id}: no such directory. Give a directory in Hugging Face layout or a hub id.")
    return str(path), {"local_files_only": True}


def read_model_config(model: ModelConfig) -> Any:
    """Return the model's Hugging Face configuration."""
    name, options = source_of(model)
    try:
        return AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        if "local_files_only" in options:
            raise DataError(f"model.id={model.id}: no readable config.json there. "
                            "Give a directory in Hugging Face layout.") from error  # fmt: skip
        raise hub_error("model.id", model.id, error) from error
    except ValueError as error:
        raise DataError(f"model.id={model.id}: {str(error).splitlines()[0]}") from error


def loader_of(settings: Any) -> Any:
    """Return the auto class to load with: the causal model where the checkpoint is one, else the bare model."""
    family = FAMILIES.get(settings.model_type)
    names = settings.architectures or []
    has_head = any("CausalLM" in name or "LMHead" in name for name in names) if names else True
    causal = family.causal if family else type(settings) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal and has_head else AutoModel


@contextmanager
def hooked(model: nn.Module, module: str, side: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the site's tensor when it is first computed; what it returns goes on instead.

    The hook is removed by its handle however the block ends.
    """
    calls: list[bool] = []

    def once(tensor: Tensor) -> Tensor | None:
        if calls:
            return None
        calls.append(True)
        return function(tensor)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return once(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            replaced = once(output[0])
            return None if replaced is None else (replaced, *output[1:])
        raise ConfigError(f"layer.path={module}: its output is a {type(output).__name__}, not a tensor. "
                          "Choose a module inside it.")  # fmt: skip

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            replaced = once(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                replaced = once(value)
                return None if replaced is None else (args, {**kwargs, key: replaced})
        raise ConfigError(f"layer.path={module}: it takes no tensor. Choose a module inside it.")

    target = model.get_submodule(module)
    if side == "output":
        handle = target.register_forward_hook(after)
    else:
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_until(model: nn.Module, module: str, side: str, ids_BT: Tensor) -> Tensor | None:
    """Return the site's tensor, leaving the rest of the forward pass out; None when the site never ran."""
    captured: list[Tensor] = []
    reached = Reached()

    def take(tensor: Tensor) -> Tensor | None:
        captured.append(tensor)
        raise reached

    try:
        with hooked(model, module, side, take):
            model(ids_BT)
    except Reached as caught:
        if caught is not reached:
            raise
    return captured[0] if captured else None


def _without_weights(model: ModelConfig, settings: Any) -> nn.Module:
    kernel = model.attention
    if kernel == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ConfigError("model.attention=flash_attention_2: flash_attn or its GPU is missing here. "
                              "Choose sdpa or eager.")  # fmt: skip
        kernel = "eager"  # shapes are the same, and flash attention has no storage-free twin
    if kernel == "sdpa" and getattr(settings, "attn_logit_softcapping", None):
        # some versions of transformers take it and leave the softcapping out
        raise ConfigError(f"model.attention=sdpa: not available for {settings.model_type}, whose logits are capped. "
                          "Choose model.attention=eager.")  # fmt: skip
    try:
        built: nn.Module = loader_of(settings).from_config(settings, attn_implementation=kernel)
    except ValueError as error:
        if "attention" not in str(error):
            raise DataError(f"model.id={model.id}: {str(error).splitlines()[0]}") from error
        raise ConfigError(f"model.attention={model.attention}: not available for {settings.model_type}. "
                          "Choose model.attention=eager.") from error  # fmt: skip
    settings.use_cache = False
    return built.eval()


def _find(config: RunConfig, model: nn.Module, settings: Any) -> tuple[str, str, int | None, str]:
    """Return module, side, block and label of the config's site."""
    layer = config.layer
    if isinstance(layer, ModuleLayerConfig):
        names = [name for name, _ in model.named_modules() if name]
        if layer.path not in names:
            hint = suggest(layer.path, names) or f" One is named {names[len(names) // 2]!r}."
            raise ConfigError(f"layer.path={layer.path}: no such module in {config.model.id}.{hint}")
        label = f"module.{layer.path}" + (".input" if layer.side == "input" else "")
        return layer.path, layer.side, None, label
    if not isinstance(layer, BlockLayerConfig):
        raise ConfigError(f"layer={layer.kind}: no such kind of site. Choose residual, mlp, attention or module.")
    family = FAMILIES.get(settings.model_type)
    if family is None:
        raise ConfigError(f"layer={layer.kind}: not known for models of type {settings.model_type!r}, only for "
                          f"{', '.join(FAMILIES)}. Choose layer=module with layer.path=NAME.")  # fmt: skip
    n_blocks = len(_blocks(model, family))
    index = n_blocks // 2 if layer.index == "middle" else int(layer.index)
    if not -n_blocks <= index < n_blocks:
        raise ConfigError(f"layer.index={layer.index}: {config.model.id} has {n_blocks} blocks. "
                          f"Choose {-n_blocks} to {n_blocks - 1}, or 'middle'.")  # fmt: skip
    index %= n_blocks
    block = f"{_prefix(model)}{family.blocks}.{index}"
    module, side = {
        "residual": (block, "output"),
        "mlp": (f"{block}.{family.mlp}", "output"),
        "attention": (f"{block}.{family.attention}", "input"),
    }[layer.kind]
    return module, side, index, f"{layer.kind}{index}"


def _prefix(model: nn.Module) -> str:
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and hasattr(model, base) else ""


def _blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    blocks = model.get_submodule(_prefix(model) + family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _product_weights(part: nn.Module) -> int:
    """Return how many weights of its own a module multiplies activations by."""
    if isinstance(part, nn.Embedding):
        return 0
    return sum(weight.numel() for weight in part.parameters(recurse=False) if weight.ndim == 2)


def _probe(model: nn.Module, module: str, side: str, mode: FakeTensorMode, config: RunConfig) -> tuple[int, int, int]:
    """Run the architecture without storage; return the site's width, and the operations and logits of a token."""
    weights = 0

    def count(part: nn.Module, _args: Any) -> None:
        nonlocal weights
        weights += _product_weights(part)

    for part in model.modules():
        part.register_forward_pre_hook(count)  # the model is thrown away with its hooks
    with mode, torch.no_grad():
        site = run_until(model, module, side, torch.zeros(2, 4, dtype=torch.long))
    given = f"layer.path={module}" if isinstance(config.layer, ModuleLayerConfig) else f"layer={config.layer.kind}"
    if site is None:
        raise ConfigError(f"{given}: this module never runs in a forward pass. Choose one inside it.")
    shaped = site.shape[:-1] in ((2, 4), (8,))  # some modules see all tokens in one row
    if not shaped or not site.is_floating_point():
        raise ConfigError(f"{given}: its {side} has shape {list(site.shape)}, not [contexts, positions, width]. "
                          "Choose another module.")  # fmt: skip
    before_site = weights
    if not config.reads_gradients:
        return site.shape[-1], 2 * before_site, 0
    weights = 0
    with mode, torch.no_grad():
        logits = getattr(model(torch.zeros(2, 4, dtype=torch.long)), "logits", None)
    flops = 2 * weights + 2 * (weights - before_site)  # frozen weights cost no gradient of their own
    return site.shape[-1], flops, 0 if logits is None else logits.shape[-1]
