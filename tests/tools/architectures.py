"""Tiny random models of many architectures, each with the module that holds its residual stream after block 1."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tools.tiny_models import GROUPED, SMALL, save_tokenizer


class Architecture(NamedTuple):
    """One class of transformers, and what is expected of it."""

    model: str
    sizes: dict[str, Any]
    block: str
    """The module that is hooked by hand."""
    has_family: bool = True
    has_loss: bool = True
    attention: str = "eager"


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_H = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_KV = SMALL | {"num_key_value_heads": 1}
_TEXT = GROUPED | {"head_dim": 16}
_SEQ = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64}  # fmt: skip
_ENCODER = SMALL | {"max_position_embeddings": 66}
_LAYERS, _TEXT_LAYERS = "model.layers.1", "model.language_model.layers.1"


def _encoder(model: str, sizes: dict[str, Any], block: str = "encoder.layer.1", *, known: bool = True) -> Architecture:
    return Architecture(model, sizes, block, has_family=known, has_loss=False)


def _other(model: str, sizes: dict[str, Any], block: str = _LAYERS) -> Architecture:
    return Architecture(model, sizes, block, has_family=False)


def _seeing(model: str, text: dict[str, Any], vision: dict[str, Any], **rest: Any) -> Architecture:
    return Architecture(model, {"text_config": text, "vision_config": vision, **rest}, _TEXT_LAYERS)


ARCHITECTURES = {
    "gemma": Architecture("GemmaForCausalLM", GROUPED, _LAYERS),
    "phi": Architecture("PhiForCausalLM", SMALL, _LAYERS),
    "phi3": Architecture("Phi3ForCausalLM", SMALL, _LAYERS),
    "olmo": Architecture("OlmoForCausalLM", SMALL, _LAYERS),
    "olmo2": Architecture("Olmo2ForCausalLM", SMALL, _LAYERS),
    "olmo3": Architecture("Olmo3ForCausalLM", SMALL, _LAYERS),
    "olmoe": Architecture("OlmoeForCausalLM", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}, _LAYERS),
    "stablelm": Architecture("StableLmForCausalLM", _KV, _LAYERS),
    "starcoder2": Architecture("Starcoder2ForCausalLM", SMALL, _LAYERS),
    "smollm3": Architecture("SmolLM3ForCausalLM", _KV, _LAYERS),
    "gpt_neo": Architecture("GPTNeoForCausalLM", {"hidden_size": 32, "num_layers": 3, "num_heads": 2,
        "max_position_embeddings": 64, "attention_types": [[["global", "local", "global"], 1]]},
        "transformer.h.1"),
    "gptj": Architecture("GPTJForCausalLM", _H | {"rotary_dim": 8}, "transformer.h.1"),
    "codegen": Architecture("CodeGenForCausalLM", _H | {"n_head": 4, "rotary_dim": 4, "n_ctx": 64}, "transformer.h.1"),
    "gpt_bigcode": Architecture("GPTBigCodeForCausalLM", _H, "transformer.h.1"),
    "opt": Architecture("OPTForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, "model.decoder.layers.1"),
    "bloom": Architecture("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 2}, "transformer.h.1"),
    "falcon": Architecture("FalconForCausalLM", SMALL, "transformer.h.1"),
    "mpt": Architecture("MptForCausalLM", {"d_model": 32, "n_layers": 3, "n_heads": 2, "max_seq_len": 64},
                        "transformer.blocks.1"),
    "cohere": Architecture("CohereForCausalLM", SMALL, _LAYERS),
    "cohere2": Architecture("Cohere2ForCausalLM", SMALL, _LAYERS),
    "granite": Architecture("GraniteForCausalLM", SMALL | {"residual_multiplier": 0.5}, _LAYERS),
    "granitemoe": Architecture("GraniteMoeForCausalLM", SMALL | {"num_local_experts": 4}, _LAYERS),
    "nemotron": Architecture("NemotronForCausalLM", _KV | {"head_dim": 16}, _LAYERS),
    "helium": Architecture("HeliumForCausalLM", GROUPED | {"head_dim": 16}, _LAYERS),
    "glm": Architecture("GlmForCausalLM", _TEXT, _LAYERS),
    "glm4": Architecture("Glm4ForCausalLM", _TEXT, _LAYERS),
    "persimmon": Architecture("PersimmonForCausalLM", SMALL, _LAYERS),
    "exaone4": Architecture("Exaone4ForCausalLM", GROUPED, _LAYERS),
    "mixtral": Architecture("MixtralForCausalLM", SMALL | {"num_local_experts": 4, "num_key_value_heads": 1}, _LAYERS),
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", SMALL | _MOE | {"num_key_value_heads": 1,
        "shared_expert_intermediate_size": 16}, _LAYERS),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", GROUPED | _MOE, _LAYERS),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", SMALL | {"moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1,
        "num_key_value_heads": 2}, _LAYERS),
    "modernbert": _encoder("ModernBertModel", SMALL, "layers.1"),
    "distilbert": _encoder("DistilBertForMaskedLM", {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48,
        "max_position_embeddings": 64}, "transformer.layer.1"),
    "xlm-roberta": _encoder("XLMRobertaForMaskedLM", _ENCODER),
    "camembert": _encoder("CamembertModel", _ENCODER),
    "electra": _encoder("ElectraForPreTraining", SMALL | {"embedding_size": 16}),
    "deberta": _encoder("DebertaModel", SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": _encoder("DebertaV2Model", SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False}),
    "gemma3": _seeing("Gemma3ForConditionalGeneration", _TEXT, _VISION, mm_tokens_per_image=4),
    "paligemma": _seeing("PaliGemmaForConditionalGeneration", _TEXT, _VISION | {"projection_dim": 32},
        projection_dim=32),
    "llava": _seeing("LlavaForConditionalGeneration", SMALL | {"model_type": "llama"},
        _VISION | {"model_type": "clip_vision_model"}),
    "qwen2_vl": _seeing("Qwen2VLForConditionalGeneration", SMALL | {"num_key_value_heads": 1, "rope_parameters": _ROPE},
        _QWEN_VISION),
    "idefics3": Architecture("Idefics3ForConditionalGeneration", {"text_config": SMALL | {"model_type": "llama"},
        "vision_config": _VISION}, "model.text_model.layers.1"),
    "albert": _encoder("AlbertModel", SMALL | {"embedding_size": 16}, "encoder.albert_layer_groups.0", known=False),
    "mpnet": _encoder("MPNetModel", _ENCODER, known=False),
    "t5": _encoder("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3,
        "num_heads": 2}, "encoder.block.1", known=False),
    "bart": _encoder("BartForConditionalGeneration", _SEQ, "encoder.layers.1", known=False),
    "bart_decoder": _other("BartForCausalLM", _SEQ, "model.decoder.layers.1"),
    "xglm": _other("XGLMForCausalLM", {"d_model": 32, "num_layers": 3, "attention_heads": 2, "ffn_dim": 48,
        "max_position_embeddings": 64}),
    "mamba": _other("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
                    "backbone.layers.1"),
    "rwkv": _other("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "context_length": 64,
        "attention_hidden_size": 32}, "rwkv.blocks.1"),
    "ctrl": _other("CTRLLMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 2, "dff": 48, "n_positions": 64},
                   "transformer.h.1"),
    "gpt_oss": _other("GptOssForCausalLM", _TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "recurrent_gemma": _other("RecurrentGemmaForCausalLM", SMALL | {"lru_width": 32}),
    "jetmoe": _other("JetMoeForCausalLM", {"hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "kv_channels": 8, "intermediate_size": 48, "max_position_embeddings": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2}),
}  # fmt: skip


def save_architecture(folder: Path, name: str) -> Any:
    """Write a tiny random model beside its tokenizer; return the class that loads it by hand."""
    architecture = ARCHITECTURES[name]
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    vocab = save_tokenizer(folder, **special)
    model_class = getattr(transformers, architecture.model)
    sizes, ids = dict(architecture.sizes), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if "text_config" in sizes:
        sizes["text_config"] = sizes["text_config"] | ids | {"vocab_size": vocab + 8}
        sizes |= {"image_token_id": vocab, "video_token_id": vocab + 1}
    else:
        sizes |= ids | {"vocab_size": vocab}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # so that blocks differ from the identity
    model.save_pretrained(folder)
    return model_class
