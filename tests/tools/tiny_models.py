"""Tiny language models of every family, with tokenizers, in Hugging Face layout; and configurations that use them."""

import json
import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_train import config as schema
from sae_train.config import RunConfig
from tools.small_runs import run_config

WORDS = ["the", "a", "of", "river", "stone", "tree", "and", "to", "sees", "under", "old", "green", "runs", "light",
         "over", "water", "quiet", "bird", "sings"]  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    "llama": ("LlamaForCausalLM", SMALL),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", SMALL | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", GROUPED),
    "gemma3_text": ("Gemma3ForCausalLM", GROUPED),
    "bert": ("BertModel", SMALL),
    "roberta": ("RobertaModel", SMALL | {"max_position_embeddings": 66}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 48,
                               "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "xglm": ("XGLMForCausalLM", {"d_model": 32, "num_layers": 3, "attention_heads": 2, "ffn_dim": 48,
                                 "max_position_embeddings": 64}),
}  # fmt: skip
"""A model whose modules see all tokens in one row, and one of a family that is not known."""


def sentences(n: int, *, seed: int = 0, words: int = 40) -> list[str]:
    """Return n different documents of made-up sentences."""
    draw = random.Random(seed)
    return [f"{index} " + " ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))) for index in range(n)]


def save_tokenizer(folder: Path, **special: str) -> int:
    """Write a byte-level BPE tokenizer with these special tokens; return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=sorted(set(special.values())), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_model(folder: Path, kind: str = "llama", **special: str) -> Path:
    """Write a tiny random model of a family, or one of OTHERS, beside its tokenizer."""
    architecture, sizes = FAMILIES.get(kind) or OTHERS[kind]
    if not special:
        encoder = kind in ("bert", "roberta")
        special = ({"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>"} if encoder
                   else {"bos_token": "<bos>", "eos_token": "<eos>"})  # fmt: skip
    vocab = save_tokenizer(folder, **special)
    model_class = getattr(transformers, architecture)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1 if kind == "roberta" else None}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(vocab_size=vocab, **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that blocks differ from the identity
    model.save_pretrained(folder)
    return folder


def save_loud_model(model: Path, folder: Path, *, factor: float) -> int:
    """Write a copy of a tiny llama in which the token of ' river' has a huge embedding; return that token."""
    copy = transformers.LlamaForCausalLM.from_pretrained(model)
    copy.save_pretrained(folder)
    save_tokenizer(folder, bos_token="<bos>", eos_token="<eos>")
    loud: int = transformers.AutoTokenizer.from_pretrained(folder)("old river", add_special_tokens=False)["input_ids"][
        -1
    ]
    with torch.no_grad():
        copy.model.embed_tokens.weight[loud] *= factor
    copy.save_pretrained(folder)
    return loud


def live_config(model: Path | str = "bundled", data: Path | str = "bundled", *, attention: str = "sdpa",
                layer: schema.LayerConfig | None = None, repeat: bool = True, data_seed: int = 0, strict: bool = False,
                held_out: Path | None = None, text_column: str = "text", dtype: str = "float32",
                harvest: dict[str, Any] | None = None, **dials: Any) -> RunConfig:  # fmt: skip
    """Return a configuration that harvests while training, small by default."""
    settings = {"calibration_tokens": 256, "context_length": 16, "lanes": 4, "contexts_per_forward": 2,
                "pool_batches": 8, "prefetch": 0} | (harvest or {})  # fmt: skip
    base = run_config(**{"batch_tokens": 64, "tokens": 640} | dials)
    return replace(
        base,
        model=replace(base.model, id=str(model), attention=attention, dtype=dtype),
        data=replace(base.data, id=str(data), repeat=repeat, seed=data_seed, text_column=text_column, strict=strict,
                     held_out_split=None if held_out is None else str(held_out)),
        harvest=schema.LiveHarvestConfig(source="live", **settings),
        layer=layer or schema.BlockLayerConfig(kind="residual", index="middle"),
    )  # fmt: skip


def save_sentences(folder: Path, n: int, *, seed: int = 0) -> Path:
    """Write `sentences(n)` as documents to a.jsonl in a folder; return the file's path."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in sentences(n, seed=seed)))
    return path


@cache
def _little_text() -> "tempfile.TemporaryDirectory[str]":
    folder = tempfile.TemporaryDirectory()
    save_sentences(Path(folder.name), 400)
    return folder


def planned_config(model: Path | str, data: Path | str | None = None, **dials: Any) -> RunConfig:
    """Return `live_config` on a little text: a plan measures it in a hundredth of the bundled corpus's time."""
    return live_config(model, data or Path(_little_text().name) / "a.jsonl", **dials)


def tensors_config(path: Path, *, held_out: Path | None = None, repeat: bool = True, data_seed: int = 0,
                   calibration_tokens: int = 1024, prefetch: int = 0, **dials: Any) -> RunConfig:  # fmt: skip
    """Return a configuration that reads ready-made activations."""
    base = run_config(**{"batch_tokens": 64, "tokens": 640} | dials)
    harvest = schema.TensorsHarvestConfig(
        source="tensors", calibration_tokens=calibration_tokens, prefetch=prefetch, path=str(path),
        held_out=None if held_out is None else str(held_out),
    )  # fmt: skip
    return replace(base, data=replace(base.data, repeat=repeat, seed=data_seed), harvest=harvest)
