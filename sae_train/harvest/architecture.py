"""The architecture of a language model without its weights, as transformers builds it from a configuration."""

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public way to run without weights
from transformers import PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights
from transformers.utils.import_utils import is_flash_attn_2_available

from sae_train.config import ModelConfig
from sae_train.errors import ConfigError, UserError
from sae_train.harvest.checkpoints import DTYPES, load_error, loader_of
from sae_train.sites.families import text_part


def without_weights(model: ModelConfig, settings: Any, *, real: bool = False) -> nn.Module:
    """Return the architecture in `model.dtype`. Its weights have no storage, or arbitrary values where `real`.

    Raises:
        ConfigError: there is no such attention kernel here.
        DataError: the architecture cannot be built.
    """
    settings = deepcopy(settings)
    for part in (settings, text_part(settings)):
        part.use_cache = False
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if not real:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(meta_device_safe_creation_ops())
        try:
            built: PreTrainedModel = loader_of(settings).from_config(
                settings,
                dtype=DTYPES[model.dtype],
                attn_implementation=_kernel(model, settings),
                experts_implementation="batched_mm",  # the others look at values, or take some dtypes only
                trust_remote_code=model.remote_code,
            )
        except UserError:
            raise
        except Exception as error:  # the checkpoint's own code may raise anything
            if isinstance(error, ValueError) and "attention" in str(error):
                raise ConfigError(f"model.attention={model.attention}: not available for {settings.model_type}. "
                                  "Choose model.attention=eager.") from error  # fmt: skip
            raise load_error(model, error, part=f"architecture {settings.model_type!r}") from error
    if not real:
        with FakeTensorMode(allow_non_fake_inputs=True):
            built.to_empty(device="cpu")
        built.tie_weights()  # the line above gives every name a weight of its own
    built.eval()
    return built


def _kernel(model: ModelConfig, settings: Any) -> str:
    """Return the attention kernel to build with."""
    if model.attention == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ConfigError("model.attention=flash_attention_2: flash_attn or its GPU is missing here. "
                              "Choose sdpa or eager.")  # fmt: skip
        return "eager"  # shapes are the same, and flash attention has no storage-free twin
    if model.attention == "sdpa" and getattr(text_part(settings), "attn_logit_softcapping", None):
        # some versions of transformers take it and leave the softcapping out
        raise ConfigError(f"model.attention=sdpa: not available for {settings.model_type}, whose logits are capped. "
                          "Choose model.attention=eager.")  # fmt: skip
    return model.attention
