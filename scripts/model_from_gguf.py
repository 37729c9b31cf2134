"""Turn a GGUF file of a Llama-like language model into a directory in Hugging Face layout.

    python scripts/model_from_gguf.py SOURCE --out DIR

SOURCE is a .gguf file, or a directory that holds one. `transformers` reads it with the library `gguf` (`pip install
gguf`) and undoes the quantisation. The weights go into a plain LlamaForCausalLM, whose config has no entry of the
quantisation, and are saved in float32 with the tokenizer. Then `sae-train model=huggingface model.id=DIR` reads it.

The script ends with the most likely continuation of a sentence, so that a wrong conversion is seen at once.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

SENTENCE = "The capital of France is"
CONTINUATION = 8
"""Tokens of the continuation that is printed."""


def find_gguf(source: Path) -> Path:
    """Return the GGUF file that `source` is, or the only one in the directory `source` and its folders."""
    if source.is_file():
        return source
    found = sorted(source.rglob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(source)) for path in found) or "none"
        raise SystemExit(f"{source}: one .gguf file is needed, and there are {len(found)} ({names}). Name the file.")
    return found[0]


def plain_model(file: Path) -> LlamaForCausalLM:
    """Return the model of a GGUF file with float32 weights and without any trace of the quantisation."""
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if quantised.config.model_type != "llama":
        raise SystemExit(f"{file}: a model of type {quantised.config.model_type}. This script converts type llama.")
    values = quantised.config.to_dict()
    for entry in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        values.pop(entry, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values))
    model.load_state_dict(quantised.state_dict())
    return model.eval()


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the most likely continuation of SENTENCE, chosen token by token."""
    ids_BT = torch.tensor([tokenizer.encode(SENTENCE)])
    for _ in range(CONTINUATION):
        with torch.no_grad():
            next_B1 = model(ids_BT).logits[:, -1:].argmax(-1)
        ids_BT = torch.cat([ids_BT, next_B1], dim=1)
    return str(tokenizer.decode(ids_BT[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a .gguf file, or a directory that holds one")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    arguments = parser.parse_args()
    file = find_gguf(arguments.source)
    model, tokenizer = plain_model(file), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    written = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    print(f"{arguments.out}: {written.num_parameters():,} parameters, {written.config.num_hidden_layers} blocks")
    print(continuation(written.eval(), AutoTokenizer.from_pretrained(arguments.out)))


if __name__ == "__main__":
    main()
