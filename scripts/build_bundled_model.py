"""Build the language model and the corpus that sae-train bundles.

Stages, each a subcommand, run in this order:

    corpus     documentation text  -> corpus/train.jsonl.xz, corpus/held_out.jsonl.xz
    tokenizer  training text       -> model/tokenizer.json, model/tokenizer_config.json
    train      training text       -> model/config.json, model/model.safetensors (bf16)
    evaluate   held-out text       -> bits per byte, compared with n-gram models, gzip and xz

The text is the docstrings of the running Python's standard library and, with --docs, the
reStructuredText sources of Python's documentation (folder `_sources` of Debian's package
python3.11-doc).  Contexts are packed as the harvester packs them: documents joined by EOS,
cut into pieces, each piece preceded by BOS.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import lzma
import math
import os
import random
import re
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "sae_train" / "assets" / "bundled"
SIZE_LIMIT = 9_900_000  # bytes, everything bundled together
BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_PERCENT = 4
MIN_CHARS, TARGET_CHARS, MAX_CHARS = 200, 2000, 6000
SKIPPED_PACKAGES = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
SKIPPED_DOCS = {"license", "contents", "copyright"}

# ---------------------------------------------------------------------------- corpus


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the function's parameter list as source text."""
    return f"({ast.unparse(node.args)})"


def docstring_entries(node: ast.AST, prefix: str) -> Iterator[str]:
    """Yield the docstring of a module, class or function, then the docstrings inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}"
            is_class = isinstance(child, ast.ClassDef)
            head = f"class {name}" if isinstance(child, ast.ClassDef) else name + signature(child)
            doc = ast.get_docstring(child, clean=False)
            if doc and doc.strip():
                yield f"{head}\n\n" + indent(inspect.cleandoc(doc))
            if is_class:
                yield from docstring_entries(child, name)
        elif not isinstance(child, ast.expr):  # definitions under `if` and `try`
            yield from docstring_entries(child, prefix)


def indent(text: str) -> str:
    """Return the text with four spaces before each line that is not empty."""
    return "\n".join("    " + line if line.strip() else "" for line in text.split("\n"))


def stdlib_sources() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (group, name, pieces) for each standard library module that has docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_PACKAGES & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        doc = inspect.cleandoc(ast.get_docstring(tree, clean=False) or "")
        head = f"module {name}" + (f"\n\n{doc}" if doc else "")
        pieces = [head, *docstring_entries(tree, name.rpartition(".")[2])]
        if doc or len(pieces) > 1:
            yield parts[0].strip("_"), "lib/" + "/".join(parts), pieces


def rst_sources(docs: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (group, name, sections) for each documentation source, cut before its headings."""
    heading = re.compile(r"^(?=\S[^\n]{2,}\n([=~^*#\"'+-])\1{3,}\n)", re.M)
    for path in sorted(docs.rglob("*.rst.txt")):
        parts = path.relative_to(docs).parts
        stem = path.name.removesuffix(".rst.txt")
        if stem in SKIPPED_DOCS or stem == "index":
            continue
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n").expandtabs()
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        text = re.sub(r"\n{4,}", "\n\n\n", text)
        cuts = [0, *(match.start() for match in heading.finditer(text)), len(text)]
        # A library page shares its group with the module that it describes.
        name = "/".join((*parts[:-1], stem))
        group = re.split(r"[.-]", stem)[0].strip("_") if parts[0] == "library" else name
        pieces = [text[a:b] for a, b in pairwise(cuts) if text[a:b].strip()]
        yield group, "doc/" + name, pieces


def documents(pieces: list[str]) -> Iterator[str]:
    """Yield texts of sensible length: pieces merged, or cut at blank lines."""
    small: list[str] = []
    for piece in pieces:
        piece = piece.strip("\n")
        if len(piece) <= MAX_CHARS:
            small.append(piece)
            continue
        part = ""
        for paragraph in piece.split("\n\n"):
            if part and len(part) + len(paragraph) > MAX_CHARS:
                small.append(part)
                part = ""
            part = f"{part}\n\n{paragraph}" if part else paragraph
        small.append(part)
    text = ""
    for piece in small:
        if text and len(text) + len(piece) > TARGET_CHARS:
            yield text
            text = ""
        text = f"{text}\n\n{piece}" if text else piece
    if text:
        yield text


def is_held_out(group: str) -> bool:
    """Return whether the sources of this group are held out, by a hash of the group's name."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def long_lines(text: str) -> list[str]:
    """Return the lines that are long enough to tell a copy from a coincidence."""
    return [line for line in (raw.strip() for raw in text.split("\n")) if len(line) >= 20]


def build_corpus(args: argparse.Namespace) -> None:
    """Write both splits; no source is in both, nor a document that train mostly contains."""
    train: dict[str, None] = {}
    held_out: dict[str, None] = {}
    sources = list(stdlib_sources())
    for docs in args.docs:
        found = list(rst_sources(docs))
        if not found:
            raise SystemExit(f"no *.rst.txt under {docs}")
        sources += found
    for group, _, pieces in sources:
        split = held_out if is_held_out(group) else train
        split.update(dict.fromkeys(d for d in documents(pieces) if len(d) >= MIN_CHARS))
    known = {line for text in train for line in long_lines(text)}
    kept = []
    for text in held_out:
        lines = long_lines(text)
        copied = sum(len(line) for line in lines if line in known)
        if copied <= 0.3 * sum(map(len, lines)):
            kept.append(text)
    for name, texts in (("train", list(train)), ("held_out", kept)):
        random.Random(args.seed).shuffle(texts)
        path = args.out / "corpus" / f"{name}.jsonl.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path.write_bytes(lzma.compress(rows.encode(), preset=9 | lzma.PRESET_EXTREME))
        print(
            f"{name}: {len(texts)} documents, {sum(map(len, texts))} characters, {path.stat().st_size} bytes compressed"
        )
    print(f"{len(sources)} sources; {len(held_out) - len(kept)} copies left out of held_out")


def read_corpus(out: Path, split: str) -> list[str]:
    """Return the documents of one split."""
    with lzma.open(out / "corpus" / f"{split}.jsonl.xz", "rt", encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]


# ------------------------------------------------------------------------- tokenizer


def build_tokenizer(args: argparse.Namespace) -> None:
    """Train a byte-level BPE tokenizer on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = read_corpus(args.out, "train")
    tokenizer.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    fast = wrapper(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(args.out / "model")
    path = args.out / "model" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), "utf-8")
    path = args.out / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("model_max_length", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # known to older releases too
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    size, count = len("".join(texts).encode()), sum(map(len, encode(fast, texts)))
    print(f"{len(fast)} tokens, {size / count:.2f} bytes each")


def load_tokenizer(out: Path) -> Any:
    """Return the bundled tokenizer, as users load it."""
    return AutoTokenizer.from_pretrained(out / "model")


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return each document's tokens, with EOS at the end."""
    return [
        [*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    ]


# ----------------------------------------------------------------------------- train


def pack(docs: list[list[int]], context: int, bos: int, keep_rest: bool = False) -> list[list[int]]:
    """Return contexts of BOS and context - 1 tokens of the joined documents."""
    stream = [token for doc in docs for token in doc]
    step = context - 1
    end = len(stream) if keep_rest else len(stream) - len(stream) % step
    return [[bos, *stream[i : min(i + step, end)]] for i in range(0, end, step)]


def epoch_contexts(docs: list[list[int]], context: int, bos: int, seed: int) -> torch.Tensor:
    """Return the contexts of one pass over the documents, in an order drawn by the seed."""
    rng = random.Random(seed)
    order = rng.sample(docs, len(docs))
    contexts = pack(order, context, bos)
    rng.shuffle(contexts)
    return torch.tensor(contexts)


def loss_function(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the mean next-token loss of a batch, with products in bfloat16."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(batch, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return loss


def publish(model: Any, out: Path) -> None:
    """Put the weights, rounded to bfloat16, and the configuration in place."""
    rounded: Any = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    rounded.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        rounded.to(torch.bfloat16).save_pretrained(temporary)
        for name in ("model.safetensors", "config.json"):
            (Path(temporary) / name).chmod(0o644)
            os.replace(Path(temporary) / name, out / "model" / name)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate: linear warm-up, the peak, and linear decay to zero in the second half.

    As long as the decay has not begun, a resumed run may change the number of steps and is
    still the run that it would have been with that number from the start.
    """
    return peak * min(1.0, (step + 1) / warmup, 2 * (steps - step) / steps)


def train(args: argparse.Namespace) -> None:
    """Train from scratch, or resume from the checkpoint, and publish the model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out)
    docs = encode(tokenizer, read_corpus(args.out, "train"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    steps = args.tokens // (args.batch * args.context)
    per_epoch = sum(map(len, docs)) // (args.context - 1) // args.batch
    step, seconds = 0, 0.0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, steps {step} to {steps}, {per_epoch} an epoch", flush=True)

    def save() -> None:
        publish(model, args.out)
        if args.checkpoint:
            part = args.checkpoint.with_suffix(".part")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step, "seconds": seconds}, part)
            os.replace(part, args.checkpoint)

    loss_of = loss_function(model)
    if args.compile:
        loss_of = torch.compile(loss_of)
    contexts, loaded, started, recent = torch.empty(0), -1, time.monotonic() - seconds, 0.0
    while step < steps:
        epoch, index = divmod(step, per_epoch)
        if epoch != loaded:
            contexts = epoch_contexts(docs, args.context, tokenizer.bos_token_id, args.seed + epoch)
            loaded = epoch
        loss: Any = loss_of(contexts[index * args.batch : (index + 1) * args.batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent += loss.item()
        seconds = time.monotonic() - started
        if step % args.log_every == 0:
            print(f"step {step} loss {recent / args.log_every:.4f} {seconds:.0f} s", flush=True)
            recent = 0.0
        if step % args.save_every == 0:
            save()
    save()


# -------------------------------------------------------------------------- evaluate


def model_nats(out: Path, contexts: list[list[int]], dtype: torch.dtype) -> float:
    """Return the total nats of the contexts' tokens under the bundled model."""
    model: Any = AutoModelForCausalLM.from_pretrained(out / "model", dtype=dtype)
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for context in contexts:
            ids = torch.tensor([context])
            logits = model(ids).logits[0, :-1].float()
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return total


def ngram_nats(train_contexts: list[list[int]], contexts: list[list[int]], vocab: int, priors: list[float]) -> float:
    """Return the total nats under an n-gram model, each order smoothed towards the next lower one.

    p_n(b | a) = (count(a b) + prior_n * p_(n-1)(b)) / (count(a) + prior_n), and p_0 is
    uniform; n - 1 priors above the unigram's make the order.
    """
    order = len(priors)
    joint: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    totals: list[defaultdict[tuple[int, ...], int]] = [defaultdict(int) for _ in range(order)]
    for tokens in train_contexts:
        for i in range(1, len(tokens)):
            for n in range(min(order, i + 1)):
                gram = tuple(tokens[i - n : i + 1])
                joint[n][gram] += 1
                totals[n][gram[:-1]] += 1
    total = 0.0
    for tokens in contexts:
        for i in range(1, len(tokens)):
            p = 1 / vocab
            for n in range(min(order, i + 1)):
                gram = tuple(tokens[i - n : i + 1])
                p = (joint[n][gram] + priors[n] * p) / (totals[n][gram[:-1]] + priors[n])
            total -= math.log(p)
    return total


def evaluate(args: argparse.Namespace) -> None:
    """Print sizes and bits per byte of the held-out text."""
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.out)
    texts = {split: read_corpus(args.out, split) for split in ("train", "held_out")}
    docs = {split: encode(tokenizer, texts[split]) for split in texts}
    contexts = {split: pack(docs[split], args.context, tokenizer.bos_token_id, keep_rest=True) for split in texts}
    raw = {split: "\n".join(texts[split]).encode() for split in texts}
    for split in texts:
        print(
            f"{split}: {len(texts[split])} documents, {sum(map(len, texts[split]))} characters,"
            f" {len(raw[split])} bytes, {sum(map(len, docs[split]))} tokens"
        )
    size = len(raw["held_out"])

    def show(name: str, bits: float) -> None:
        print(f"{name:<58}{bits / size:.4f} bits per byte", flush=True)

    for dtype in (torch.float32, torch.bfloat16):
        nats = model_nats(args.out, contexts["held_out"], dtype)
        label = str(dtype).removeprefix("torch.")
        show(f"model, weights bfloat16, arithmetic {label}", nats / math.log(2))
        tokens = sum(len(context) - 1 for context in contexts["held_out"])
        print(f"{'':<58}{nats / tokens:.4f} nats per token")
    part = contexts["train"][:: max(1, len(contexts["train"]) // len(contexts["held_out"]))]
    nats = model_nats(args.out, part, torch.float32)
    part_size = sum(len(tokenizer.decode(context[1:]).encode()) for context in part)
    print(f"{'the same on a part of the training text':<58}{nats / math.log(2) / part_size:.4f} bits per byte")
    candidates = {
        "token unigram": [[1.0]],
        "token bigram": [[1.0, m] for m in (10.0, 30.0, 60.0, 100.0, 200.0)],
        "token trigram": [[1.0, m, k] for m in (100.0, 150.0) for k in (40.0, 60.0)],
    }
    for name, choices in candidates.items():
        results = [
            (ngram_nats(contexts["train"], contexts["held_out"], len(tokenizer), priors), priors) for priors in choices
        ]
        nats, priors = min(results)
        show(f"{name} (priors {priors}, the best here)", nats / math.log(2))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    show("gzip -9", 8 * len(squeeze.compress(raw["held_out"]) + squeeze.flush()))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=raw["train"][-32768:])
    show(
        "deflate -9, 32 KiB of train as dictionary",
        8 * len(squeeze.compress(raw["held_out"]) + squeeze.flush()),
    )
    preset = 9 | lzma.PRESET_EXTREME
    show("xz -9e", 8 * len(lzma.compress(raw["held_out"], preset=preset)))
    both, alone = (lzma.compress(text, preset=preset) for text in (raw["train"] + raw["held_out"], raw["train"]))
    show("xz -9e, train before it", 8 * (len(both) - len(alone)))
    files = {path: path.stat().st_size for path in sorted(args.out.rglob("*")) if path.is_file()}
    for path, length in files.items():
        print(f"{length:>10} {path.relative_to(args.out)}")
    print(f"{sum(files.values()):>10} in all, of {SIZE_LIMIT}")
    if sum(files.values()) > SIZE_LIMIT:
        raise SystemExit("the bundle is too large")


def sample(args: argparse.Namespace) -> None:
    """Print the model's continuation of a prompt."""
    tokenizer = load_tokenizer(args.out)
    model: Any = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    torch.manual_seed(args.seed)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(args.prompt)]])
    written = model.generate(ids, do_sample=True, temperature=args.temperature, max_length=args.context)
    print(tokenizer.decode(written[0, 1:]))


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the bundle")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--context", type=int, default=256, help="tokens, BOS included")
    shared.add_argument("--threads", type=int, default=1)
    stages = parser.add_subparsers(required=True, metavar="stage")

    stage = stages.add_parser("corpus", parents=[shared], help="gather both splits")
    stage.add_argument("--docs", type=Path, action="append", default=[], help="*.rst.txt folder")
    stage.set_defaults(run=build_corpus)

    stage = stages.add_parser("tokenizer", parents=[shared], help="train the tokenizer")
    stage.add_argument("--vocab", type=int, default=3072)
    stage.set_defaults(run=build_tokenizer)

    stage = stages.add_parser("train", parents=[shared], help="train the model, or go on")
    stage.add_argument("--hidden", type=int, default=256)
    stage.add_argument("--intermediate", type=int, default=512)
    stage.add_argument("--layers", type=int, default=4)
    stage.add_argument("--heads", type=int, default=4)
    stage.add_argument("--tokens", type=int, default=18_432_000)
    stage.add_argument("--batch", type=int, default=8, help="contexts a step")
    stage.add_argument("--lr", type=float, default=2e-3)
    stage.add_argument("--warmup", type=int, default=300, help="steps")
    stage.add_argument("--weight-decay", type=float, default=0.1)
    stage.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    stage.add_argument("--checkpoint", type=Path, help="written now and then; resumed if there")
    stage.add_argument("--save-every", type=int, default=500, help="steps")
    stage.add_argument("--log-every", type=int, default=50, help="steps")
    stage.set_defaults(run=train)

    stage = stages.add_parser("evaluate", parents=[shared], help="print sizes and bits per byte")
    stage.set_defaults(run=evaluate)

    stage = stages.add_parser("sample", parents=[shared], help="print what the model writes")
    stage.add_argument("prompt")
    stage.add_argument("--temperature", type=float, default=0.8)
    stage.set_defaults(run=sample)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
