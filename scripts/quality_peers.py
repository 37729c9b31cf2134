"""Train one peer on precomputed activations and write it in our file layout, inside the peer's own environment.

Used by bench_quality.py. Writes DIR/sae.safetensors (W_enc, b_enc, W_dec, b_dec, threshold: see `sae_train.load`) and
DIR/sae.json. The shift of a peer's input is folded into b_enc and a gate into a threshold on the magnitude, which is
exact. The folded model is compared with the peer's own forward pass on a batch before it is written.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

NORM_BATCHES = 50
"""Batches from which SAELens estimates the mean norm."""

GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Matryoshka's shares of the features, as in its paper (arXiv 2503.17547) and in ours; no peer has a default."""


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


class Batches:
    """Endless batches: the first epoch in the files' order, later ones shuffled. Each iterator starts anew."""

    def __init__(self, rows_ND: Tensor, batch: int) -> None:
        self.rows_ND, self.batch = rows_ND, batch

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(len(self.rows_ND))
        while True:
            for start in range(0, len(self.rows_ND) - self.batch + 1, self.batch):
                yield self.rows_ND[order[start : start + self.batch]]
            order = torch.randperm(len(self.rows_ND))


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
    stream = iter(Batches(rows_ND, args.batch))
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
    """SAELens' methods at its constant learning rate (default 3e-4) or --lr.

    Those with a price see inputs of mean norm sqrt(d_model), the library's switch (off by default); its factor is
    estimated on batches of its own, so that training sees each row as often as with any other method. `jumprelu` has
    its defaults; `jumprelu_tanh` what its documentation calls Anthropic's setup, whose price reaches the encoder, too.
    """
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    method = args.method.split(".")[1]
    name, settings = {
        "topk": ("TopK", {"k": args.k}),
        "batch_topk": ("BatchTopK", {"k": args.k}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": args.k, "matryoshka_widths": prefixes(args.n_features)}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": args.coefficient}),
        "jumprelu_tanh": (
            "JumpReLU",
            {
                "l0_coefficient": args.coefficient,
                "jumprelu_sparsity_loss_mode": "tanh",
                "jumprelu_ste_to_input": True,
                "pre_act_loss_coefficient": 3e-6,
            },
        ),
        "gated": ("Gated", {"l1_coefficient": args.coefficient}),
    }[method]
    if args.coefficient is not None:
        settings["normalize_activations"] = "expected_average_only_in"
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        config(d_in=rows_ND.shape[1], d_sae=args.n_features, device="cpu", **settings)
    )
    lr = args.lr if args.lr is not None else 3e-4
    trainer = SAETrainerConfig(
        total_training_samples=args.tokens // args.batch * args.batch,
        train_batch_size_samples=args.batch,
        lr=lr,
        lr_end=lr / 10,  # has to be given; unread by the constant schedule
        device="cpu",
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    training = sae_lens.SAETrainer(cfg=trainer, sae=sae, data_provider=iter(Batches(rows_ND, args.batch)))
    if "normalize_activations" in settings:
        training.activation_scaler.estimate_scaling_factor(
            rows_ND.shape[1], iter(Batches(rows_ND, args.batch)), NORM_BATCHES
        )
    training.fit()
    with tempfile.TemporaryDirectory() as directory:
        sae.save_inference_model(directory)
        exported = sae_lens.SAE.load_from_disk(directory)
    x_ND = rows_ND[: args.batch]
    with torch.no_grad():
        expected = exported(x_ND)
    if method == "gated":
        weights = ungate(exported.W_enc, exported.r_mag, exported.b_gate, exported.b_mag)
    else:
        weights = {"W_enc": exported.W_enc, "b_enc": exported.b_enc}
        if method != "topk":
            weights["threshold"] = exported.threshold
    weights |= {"W_dec": exported.W_dec, "b_dec": exported.b_dec}
    shifted = bool(exported.cfg.apply_b_dec_to_input)
    rule = "topk" if method == "topk" else "threshold"
    return check(fold(weights, shifted=shifted), x_ND, expected, rule=rule, k=args.k), rule


def dictionary_learning(args: argparse.Namespace, rows_ND: Tensor) -> tuple[Weights, str]:
    """dictionary_learning's methods with its learning rates or --lr; warm-up a tenth of a short run.

    JumpReLU is given k as its target. It and Gated see inputs of unit mean squared norm, the library's switch for
    penalties that do not depend on the input's scale, and their penalty rises over twice the warm-up, as by default.
    """
    from dictionary_learning.dictionary import GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    method = args.method.split(".")[1]
    steps = args.tokens // args.batch
    warmup = min(1000, steps // 10)
    selects = {"k": args.k, "threshold_start_step": warmup, "lr": args.lr}
    priced = {"sparsity_warmup_steps": 2 * warmup} | ({} if args.lr is None else {"lr": args.lr})
    trainer, dictionary, settings = {
        "topk": (TopKTrainer, AutoEncoderTopK, selects),
        "batch_topk": (BatchTopKTrainer, BatchTopKSAE, selects),
        "matryoshka": (
            MatryoshkaBatchTopKTrainer,
            MatryoshkaBatchTopKSAE,
            selects | {"group_fractions": list(GROUPS)},
        ),
        "jumprelu": (
            JumpReluTrainer,
            JumpReluAutoEncoder,
            priced | {"target_l0": float(args.k), "sparsity_penalty": args.coefficient},
        ),
        "gated": (GatedSAETrainer, GatedAutoEncoder, priced | {"l1_penalty": args.coefficient}),
    }[method]
    config = {
        "trainer": trainer,
        "dict_class": dictionary,
        "activation_dim": rows_ND.shape[1],
        "dict_size": args.n_features,
        "device": "cpu",
        "steps": steps,
        "layer": 0,
        "lm_name": "none",
        "warmup_steps": warmup,
        "seed": args.seed,
        **settings,
    }
    with tempfile.TemporaryDirectory() as directory:
        trainSAE(
            data=Batches(rows_ND, args.batch),
            trainer_configs=[config],
            steps=steps,
            save_dir=directory,
            normalize_activations=method in ("jumprelu", "gated"),
            device="cpu",
            autocast_dtype=torch.float32,
        )
        sae, _ = load_dictionary(f"{directory}/trainer_0", device="cpu")
    x_ND = rows_ND[: args.batch]
    with torch.no_grad():
        expected = sae.decode(sae.encode(x_ND))
    if method == "gated":
        weights = ungate(sae.encoder.weight.T, sae.r_mag, sae.gate_bias, sae.mag_bias)
        weights |= {"W_dec": sae.decoder.weight.T, "b_dec": sae.decoder_bias}
    elif method in ("matryoshka", "jumprelu"):
        weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    else:
        weights = {
            "W_enc": sae.encoder.weight.T,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight.T,
            "b_dec": sae.b_dec,
        }
    if method in ("batch_topk", "matryoshka", "jumprelu"):
        weights["threshold"] = sae.threshold.expand(args.n_features)
    rule = "topk" if method == "topk" else "threshold"
    return check(fold(weights, shifted=method != "jumprelu"), x_ND, expected, rule=rule, k=args.k), rule


def prefixes(n_features: int) -> list[int]:
    """Return Matryoshka's widths: the first groups' sums and, last, all features."""
    sizes = [int(share * n_features) for share in GROUPS[:-1]]
    return [*itertools.accumulate(sizes), n_features]


def ungate(w_enc_DF: Tensor, r_mag_F: Tensor, b_gate_F: Tensor, b_mag_F: Tensor) -> Weights:
    """Return a gated encoder as one of magnitudes with thresholds: u > -b_gate is exp(r) u + b_mag > threshold."""
    scale_F = r_mag_F.double().exp()
    threshold_F = b_mag_F.double() - scale_F * b_gate_F.double()
    return {"W_enc": scale_F * w_enc_DF.double(), "b_enc": b_mag_F, "threshold": threshold_F}


def fold(weights: Weights, *, shifted: bool) -> Weights:
    """Return the weights for raw inputs; `shifted`: the encoder saw x - b_dec.

    Decoder norms stay as they are: per-token selection may depend on them (sparsify's averaged rows are not unit). A
    threshold below 0 becomes 0, because every peer's values pass a ReLU, too.
    """
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    if shifted:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    w["threshold"] = w.get("threshold", torch.zeros_like(w["b_enc"])).clamp(min=0)
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
    parser.add_argument("--method", required=True, help="PEER.METHOD: see bench_quality.py")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, help="learning rate; default: the peer's own recipe")
    parser.add_argument(
        "--coefficient", type=float, help="coefficient of the peer's sparsity penalty; default: the peer's own"
    )
    for name in ("n-features", "k", "tokens", "batch", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want CUDA tensors; read when it is imported
    os.environ.setdefault("WANDB_MODE", "disabled")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows_ND = read_rows(args.train, args.tokens)
    started = time.perf_counter()
    weights, rule = PEERS[args.method.split(".")[0]](args, rows_ND)
    seconds = time.perf_counter() - started
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "sae.safetensors")
    facts = {"inference": rule, "k": args.k, "seconds": seconds, "lr": args.lr, "coefficient": args.coefficient}
    (args.out / "sae.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
