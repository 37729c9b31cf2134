"""Families of language models: in which modules an architecture keeps its blocks and their parts.

`residual` is a block's output, before any final norm. `mlp` is the tensor that a block adds to the residual stream.
`attention` is the heads' output before its projection. A family is one line of `FAMILIES`.
"""

from typing import Any, NamedTuple

from torch import nn


class Family(NamedTuple):
    """The names of an architecture's sites, relative to the module that holds the list of blocks.

    `FAMILIES` lists them, and `layers.py` reads them.
    """

    blocks: str
    mlp: str | None
    """Module of a block whose output is added to the residual stream. None where the output is scaled first."""
    attention: str | None
    """Module of a block whose input is the heads' output. None where blocks differ."""


_LLAMA = Family("layers", "mlp", "self_attn.o_proj")
_PHI = Family("layers", "mlp", "self_attn.dense")
_POST_NORM = Family("layers", "post_feedforward_layernorm", "self_attn.o_proj")
_GPTJ = Family("h", "mlp", "attn.out_proj")
_BERT = Family("encoder.layer", "output.dense", "attention.output.dense")
_SCALED = _LLAMA._replace(mlp=None)
FAMILIES = {
    "gpt2": Family("h", "mlp", "attn.c_proj"),
    "gpt_neox": Family("layers", "mlp", "attention.dense"),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi3", "olmo", "olmoe",
         "smollm3", "starcoder2", "stablelm", "cohere", "cohere2", "nemotron", "helium", "glm", "deepseek_v3",
         "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        _LLAMA,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _POST_NORM),
    **dict.fromkeys(("granite", "granitemoe"), _SCALED),
    "glm4": _LLAMA._replace(mlp="post_mlp_layernorm"),
    "phi": _PHI,
    "persimmon": _PHI,
    "gpt_neo": Family("h", "mlp", "attn.attention.out_proj"),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_bigcode": Family("h", "mlp", "attn.c_proj"),
    "opt": Family("layers", "fc2", "self_attn.out_proj"),
    "bloom": Family("h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "falcon": Family("h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "mpt": Family("blocks", "ffn.down_proj", "attn.out_proj"),
    "modernbert": Family("layers", "mlp", "attn.Wo"),
    "distilbert": Family("layer", "ffn.lin2", "attention.out_lin"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT),
}  # fmt: skip
"""By `model_type` of the text part."""


def text_part(settings: Any) -> Any:
    """Return the configuration of the part that reads text, or the whole one where there is no other part."""
    return settings.get_text_config(decoder=True) if hasattr(settings, "get_text_config") else settings


def blocks_name(model: nn.Module, settings: Any) -> str | None:
    """Return the name of the list of the text part's blocks, or None for an unknown family."""
    kind = text_part(settings).model_type
    family = FAMILIES.get(kind)
    if family is None:
        return None
    for name, part in model.named_modules():
        if name.endswith(family.blocks) and isinstance(part, nn.ModuleList):
            parent = model.get_submodule(name.removesuffix(family.blocks).removesuffix("."))
            if getattr(getattr(parent, "config", None), "model_type", kind) == kind:
                return str(name)
    return None
