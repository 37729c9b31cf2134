"""Train one peer on precomputed activations and write it in our file layout; runs inside the peer's own environment.

Used by bench_quality.py. Writes DIR/sae.safetensors (W_enc, b_enc, W_dec, b_dec, threshold: see `sae_train.load`) and
DIR/sae.json. The shift of a peer's input is folded into b_enc, which is exact. The
folded model is compared with the peer's own forward pass on a batch before it is written.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want CUDA tensors; read on import
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def read_rows(directory: Path, n_rows: int) -> Tensor:
    """Return the first n_rows (or all, if there are fewer) [n, d_model] fp32 of the directory's files."""
    parts, n = [], 0
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)["activations"][: n_rows - n].float()
        parts.append(part)
        n += len(part)
        if n == n_rows:
            break
    return torch.cat(parts)


def batches(rows_ND: Tensor, batch: int) -> Iterator[Tensor]:
    """Yield batches for ever: the first epoch in the files' order, later ones shuffled."""
    order = torch.arange(len(rows_ND))
    while True:
        for start in range(0, len(rows_ND) - batch + 1, batch):
            yield rows_ND[order[start : start + batch]]
        order = torch.randperm(len(rows_ND))


def sparsify(args: argparse.Namespace, rows_ND: Tensor) -> tuple[Weights, str]:
    """eai-sparsify's TopK: SignSGD without a schedule (its default), or Adam at --lr."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SaeConfig, SparseCoder
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(
        rows_ND.shape[1], SaeConfig(num_latents=args.n_features, k=args.k), device="cpu", dtype=torch.float32
    )
    sae.b_dec.data = rows_ND[: args.batch].mean(0)
    steps, schedule = args.tokens // args.batch, None
    if args.lr is None:
        default = 5e-3 / (args.n_features / 2**14) ** 0.5
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=default), momentum=0.95)
        optimizer.train()
    else:
        optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
        warmup = max(1, min(1000, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(1, steps - warmup))
        )
    stream = batches(rows_ND, args.batch)
    for _ in range(steps):
        sae.set_decoder_norm_to_unit_norm()
        sae(next(stream)).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    if args.lr is None:
        optimizer.eval()
    x_ND = rows_ND[: args.batch]
    with torch.no_grad():
        expected = sae(x_ND).sae_out
    weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return check(fold(weights, shifted=True), x_ND, expected, rule="topk", k=args.k), "topk"


def sae_lens(args: argparse.Namespace, rows_ND: Tensor) -> tuple[Weights, str]:
    """SAELens' TopK or BatchTopK at its constant learning rate (default 3e-4) or --lr."""
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        LoggingConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig

    pooled = args.method.endswith("batch_topk")
    model, config = (
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig) if pooled else (TopKTrainingSAE, TopKTrainingSAEConfig)
    )
    sae = model(config(d_in=rows_ND.shape[1], d_sae=args.n_features, k=args.k, device="cpu"))
    lr = args.lr if args.lr is not None else 3e-4
    trainer = SAETrainerConfig(
        total_training_samples=args.tokens // args.batch * args.batch,
        train_batch_size_samples=args.batch,
        lr=lr,
        lr_end=lr / 10,  # has to be given; unread by the constant schedule
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=trainer, sae=sae, data_provider=batches(rows_ND, args.batch)).fit()
    with tempfile.TemporaryDirectory() as directory:
        sae.save_inference_model(directory)
        exported = SAE.load_from_disk(directory)
    x_ND = rows_ND[: args.batch]
    with torch.no_grad():
        expected = exported(x_ND)
    weights = {name: getattr(exported, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if pooled:
        weights["threshold"] = exported.threshold
    shifted = bool(exported.cfg.apply_b_dec_to_input)
    rule = "threshold" if pooled else "topk"
    return check(fold(weights, shifted=shifted), x_ND, expected, rule=rule, k=args.k), rule


def dictionary_learning(args: argparse.Namespace, rows_ND: Tensor) -> tuple[Weights, str]:
    """dictionary_learning's TopK or BatchTopK with its learning-rate law or --lr; warm-up a tenth of a short run."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    pooled = args.method.endswith("batch_topk")
    steps = args.tokens // args.batch
    config = {
        "trainer": BatchTopKTrainer if pooled else TopKTrainer,
        "dict_class": BatchTopKSAE if pooled else AutoEncoderTopK,
        "activation_dim": rows_ND.shape[1],
        "dict_size": args.n_features,
        "k": args.k,
        "lr": args.lr,
        "device": "cpu",
        "steps": steps,
        "layer": 0,
        "lm_name": "none",
        "warmup_steps": min(1000, steps // 10),
        "threshold_start_step": min(1000, steps // 10),
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as directory:
        trainSAE(
            data=batches(rows_ND, args.batch),
            trainer_configs=[config],
            steps=steps,
            save_dir=directory,
            device="cpu",
            autocast_dtype=torch.float32,
        )
        sae, _ = load_dictionary(f"{directory}/trainer_0", device="cpu")
    x_ND = rows_ND[: args.batch]
    with torch.no_grad():
        expected = sae.decode(sae.encode(x_ND))
    weights = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.decoder.weight.T,
        "b_dec": sae.b_dec,
    }
    if pooled:
        weights["threshold"] = sae.threshold.clamp(min=0).expand(args.n_features)
    rule = "threshold" if pooled else "topk"
    return check(fold(weights, shifted=True), x_ND, expected, rule=rule, k=args.k), rule


def fold(weights: Weights, *, shifted: bool) -> Weights:
    """Return the weights for raw inputs; `shifted`: the encoder saw x - b_dec.

    Decoder norms stay as they are: per-token selection may depend on them (sparsify's averaged rows are not unit).
    """
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    if shifted:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    w.setdefault("threshold", torch.zeros_like(w["b_enc"]))
    return {name: tensor.float().contiguous() for name, tensor in w.items()}


def check(w: Weights, x_ND: Tensor, expected_ND: Tensor, *, rule: str, k: int) -> Weights:
    """Return w; raise if its forward pass differs from the peer's by more than rounding can explain."""
    pre_NF = x_ND @ w["W_enc"] + w["b_enc"]
    if rule == "topk":
        value, feature = pre_NF.relu().topk(k, dim=1)
        code_NF = torch.zeros_like(pre_NF).scatter_(1, feature, value)
    else:
        code_NF = pre_NF * (pre_NF > w["threshold"])
    got_ND = code_NF @ w["W_dec"] + w["b_dec"]
    # Rounding may flip pairs at the cut, which changes their rows by a few percent; a wrong fold changes all rows.
    difference = float(((got_ND - expected_ND).norm(dim=1) / expected_ND.norm(dim=1)).median())
    if difference > 1e-4:
        raise SystemExit(f"the folded model differs from the peer's own forward pass by {difference:.2e}")
    return w


PEERS = {"sparsify": sparsify, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, help="PEER.topk or PEER.batch_topk")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, help="learning rate; without it the peer's default recipe")
    for name in ("n-features", "k", "tokens", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows_ND = read_rows(args.train, args.tokens)
    started = time.perf_counter()
    weights, rule = PEERS[args.method.split(".")[0]](args, rows_ND)
    seconds = time.perf_counter() - started
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "sae.safetensors")
    facts = {"inference": rule, "k": args.k, "seconds": seconds, "lr": args.lr}
    (args.out / "sae.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
