"""A language model's checkpoint: its place, its configuration, the class that loads it, and its requirements."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
    set_tqdm_hook,
)

from sae_train.assets import model_directory
from sae_train.config import ModelConfig
from sae_train.errors import DataError
from sae_train.hub import hub_error, is_installed, local_path, missing_library, needs_library
from sae_train.phases import Phases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FOREIGN = {
    "*.gguf": "GGUF files, which are not read. Give the checkpoint that they were made from.",
    "adapter_config.json": "an adapter (PEFT) without its base model. Merge it into the model and save that.",
    "params.json": "a checkpoint in its maker's own layout. Convert it to Hugging Face layout.",
    "tf_model.h5": "weights of TensorFlow, which are not read. Save them as safetensors.",
    "flax_model.msgpack": "weights of Flax, which are not read. Save them as safetensors.",
}
"""Files of other layouts than Hugging Face's, and the message for each."""


def source_of(model: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the arguments of `from_pretrained`: a path or id, and options.

    The options always hold `trust_remote_code`. Without it, transformers prompts on the terminal.
    """
    options: dict[str, Any] = {"trust_remote_code": model.remote_code}
    if model.id == "bundled":
        return str(model_directory()), options | {"local_files_only": True}
    path = local_path(model.id)
    if path is None:
        return model.id, options | ({"revision": model.revision} if model.revision else {})
    if not path.is_dir():
        raise DataError(f"model.id={model.id}: no such directory. Give a directory in Hugging Face layout or a hub id.")
    return str(path), options | {"local_files_only": True}


def read_model_config(model: ModelConfig) -> Any:
    """Return the model's Hugging Face configuration.

    Raises:
        DataError: it cannot be found or read, or needs code or a library that is missing.
    """
    name, options = source_of(model)
    is_local = "local_files_only" in options
    unreadable = f"model.id={model.id}: no readable config.json there. Give a directory in Hugging Face layout."
    if is_local and not (Path(name) / "config.json").is_file():
        foreign = _foreign_files(Path(name))
        raise DataError(f"model.id={model.id}: {foreign}" if foreign else unreadable)
    try:
        return AutoConfig.from_pretrained(name, **options)
    except OSError as error:
        raise (DataError(unreadable) if is_local else hub_error("model.id", model.id, error)) from error
    except Exception as error:  # its configuration is foreign, and so may be its code
        raise load_error(model, error, part="configuration") from error


def load_error(model: ModelConfig, error: Exception, *, part: str) -> DataError:
    """Return the message for a checkpoint whose `part` raised `error` in a library or in the checkpoint's own code."""
    given = f"model.id={model.id}"
    if not model.remote_code and "trust_remote_code" in str(error):
        return DataError(f"{given}: its {part} needs Python code that comes with the checkpoint, and that code is not "
                         "run unasked. Read it, then set model.remote_code=true.")  # fmt: skip
    library = missing_library(error)
    if library == "tiktoken" and not is_installed("sentencepiece"):
        library = "sentencepiece tiktoken"  # one file may be of either, and transformers tries both
    if library is not None:
        return DataError(f"{given}: its {part} {needs_library(library)}")
    if "ignore_mismatched_sizes" in str(error):
        return DataError(f"{given}: its weights have other shapes than its config.json says. Fetch or save it again.")
    said = " ".join(str(error).split())[:300]
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return DataError(f"{given}: its {part} cannot be read: {kind}{said}")


def loader_of(settings: Any) -> Any:
    """Return the auto class that loads the checkpoint with the head that predicts the next token, if it has one.

    A multimodal checkpoint is loaded whole, because the names of its weights belong to the whole model. Masked language
    models and encoder-decoders are loaded without a head.
    """
    if getattr(settings, "is_encoder_decoder", False):
        return AutoModel
    if type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(settings, "is_decoder", False):
        return AutoModel
    names = settings.architectures or []
    code = getattr(settings, "auto_map", None) or {}
    loaders = [
        (AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForMultimodalLM, transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ]
    fitting = [(loader, mapping) for loader, mapping in loaders
               if type(settings) in mapping or loader.__name__ in code]  # fmt: skip
    for loader, mapping in fitting:
        if type(settings) in mapping and getattr(mapping[type(settings)], "__name__", None) in names:
            return loader
    is_headed = not names or any("CausalLM" in name or "LMHead" in name or "Conditional" in name for name in names)
    return fitting[0][0] if fitting and is_headed else AutoModel


def check_quantised(model: ModelConfig, settings: Any) -> bool:
    """Return whether the weights are quantised.

    Raises:
        DataError: this machine lacks the library or the processor that they need.
    """
    given = getattr(settings, "quantization_config", None)
    given = given or getattr(settings.get_text_config(decoder=True), "quantization_config", None)
    if not given:
        return False
    given = copy.deepcopy(given if isinstance(given, dict) else given.to_dict())
    is_bits = given.get("load_in_4bit") or given.get("load_in_8bit")
    method = given.get("quant_method") or ("bitsandbytes" if is_bits else "by a method that is not named")
    start = f"model.id={model.id}: its weights are quantised ({method}), and "
    end = "Give a checkpoint that is not quantised."
    try:
        if not AutoHfQuantizer.supports_quant_method(given):
            raise DataError(f"{start}the installed transformers does not know this method. {end}")
        AutoHfQuantizer.from_config(given, pre_quantized=True).validate_environment(device_map=None, weights_only=None)
    except DataError:
        raise
    except Exception as error:  # each method has its own checks, and raises as it likes
        library = missing_library(error)
        if library is not None:
            raise DataError(f"{start}this {needs_library(library)} Or give one that is not quantised.") from error
        said = " ".join(str(error).split())[:300].removesuffix(".")
        raise DataError(f"{start}they cannot be loaded here: {said}. {end}") from error
    return True


def check_weights(model: ModelConfig) -> None:
    """Refuse a local directory that lacks weights, or a file that its index names."""
    folder = local_path(model.id)
    if model.id == "bundled" or folder is None:
        return
    if not (folder / "config.json").is_file() or any((folder / each).is_file() for each in _WEIGHTS):
        return  # without a configuration that is the finding
    for index in _INDICES:
        if (folder / index).is_file():
            files = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(each for each in files if not (folder / each).is_file())
            if missing:
                raise DataError(f"model.id={model.id}: {index} names {len(files)} files of weights, and {missing[0]} "
                                "is not there. Fetch or save the model again.")  # fmt: skip
            return
    foreign = _foreign_files(folder) or "no weights there (model.safetensors). Fetch or save the model again."
    raise DataError(f"model.id={model.id}: {foreign}")


def _foreign_files(folder: Path) -> str | None:
    """Return a sentence about the files of another layout that the directory holds."""
    found = [meaning for pattern, meaning in _FOREIGN.items() if any(folder.glob(pattern))]
    return f"this directory holds {found[0]}" if found else None


def load_weights(model: ModelConfig, settings: Any, *, is_quantised: bool, device: torch.device,
                 phases: Phases) -> Any:  # fmt: skip
    """Return the Hugging Face module on a device. A signal to stop ends the loading between two weights.

    Args:
        model: names the checkpoint.
        settings: from `read_model_config`.
        is_quantised: from `check_quantised`.
        device: where the model runs.
        phases: shows the progress.

    Raises:
        DataError: the weights cannot be read, or some are missing.
    """
    name, options = source_of(model)
    if is_quantised:
        options["device_map"] = {"": device}  # such weights cannot be moved afterwards
    try:
        with _reported(phases, is_local="local_files_only" in options):
            loaded, report = loader_of(settings).from_pretrained(
                name, dtype=DTYPES[model.dtype], attn_implementation=model.attention, output_loading_info=True,
                **options,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files of any kind, and the checkpoint's own code
        if missing_library(error) or "trust_remote_code" in str(error):
            raise load_error(model, error, part="architecture") from error
        if "local_files_only" in options:
            raise load_error(model, error, part="weights") from error
        raise hub_error("model.id", model.id, error) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise DataError(f"model.id={model.id}: its files lack {len(missing)} of its weights, {missing[0]} among them, "
                        "which would be random numbers. Fetch or save it again.")  # fmt: skip
    if not is_quantised:
        return loaded.to(device)
    if getattr(loaded.config, "quantization_config", None) is None:  # expanded on loading: no GPU here takes FP8
        for weight in loaded.parameters():  # no buffers: rotary frequencies stay fp32
            weight.data = weight.data.to(DTYPES[model.dtype])
    return loaded


@contextmanager
def _reported(phases: Phases, *, is_local: bool) -> Iterator[None]:
    """Show how many weights are loaded; hide transformers' own bars, which are for downloads, where there is none."""

    def counted(items: Iterable[Any], total: int) -> Iterator[Any]:
        with phases.of("loading the language model", total=total, unit="weight"):
            for item in items:
                phases.advance(1)
                yield item

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        items = args[0] if args else None
        if options.get("desc") != "Loading weights" or not isinstance(items, Sized):
            return factory(*args, **options)
        return counted(cast("Iterable[Any]", items), len(items))

    hides = is_local and is_progress_bar_enabled()
    before = set_tqdm_hook(bar)
    if hides:
        disable_progress_bar()
    try:
        yield
    finally:
        set_tqdm_hook(before)
        if hides:
            enable_progress_bar()
