"""Train one library on precomputed activations, a few steps on each request, inside its own environment.

Used by bench_peers.py. It reads a number of steps a line from standard input and trains as many in the library's own
loop. (sparsify's trainer requires a language model, so its step runs alone, and ours too.) It answers with a line of
JSON: the seconds of each step, from one call for activations to the next.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch
from quality_peers import read_rows
from torch import Tensor

PARTS = 1 << 40
"""More steps than anyone asks for."""


class OnDemand:
    """Endless batches, with a step between two of them. It waits for the next request when one is done."""

    def __init__(self, rows_ND: Tensor, batch: int, answers: TextIO) -> None:
        self.rows_ND, self.batch, self.answers = rows_ND, batch, answers
        self.left, self.seconds, self.began, self.place = 0, [], None, 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        settle()
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append(now - self.began)
        if self.left == 0:
            if self.began is not None:
                print(json.dumps(self.seconds), file=self.answers, flush=True)
            order = sys.stdin.readline()
            if not order:
                os._exit(0)  # no library has another way out of its loop
            self.left, self.seconds = int(order), []
        self.left -= 1
        first = self.place * self.batch % (len(self.rows_ND) - self.batch + 1)
        self.place += 1
        batch = self.rows_ND[first : first + self.batch].clone()
        settle()
        self.began = time.perf_counter()
        return batch


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def ours(args: argparse.Namespace, batches: OnDemand) -> None:
    """sae-train's step on its own reader of files; rows of metrics and checkpoints come between steps."""
    from sae_train.cli.compose import compose_config
    from sae_train.harvest.build import build_stream, check_stream
    from sae_train.ranks.interface import Solo
    from sae_train.training.provenance import resolve_precision
    from sae_train.training.run import plan_of
    from sae_train.training.trainer import build_trainer

    said = ["harvest=tensors", f"harvest.path={args.train}", "tracking=none", f"sparsifier={args.method}"]
    said += [f"n_features={args.n_features}", f"k={args.k}", f"batch_tokens={args.batch}", f"tokens={args.tokens}"]
    config = compose_config([*said, "aux_loss=none", f"precision={'bf16' if args.bf16 else 'float32'}"])
    ranks = Solo(torch.device(device()))
    facts = check_stream(config.source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1)
    stream = build_stream(config.source, ranks=ranks, facts=facts)
    stream.start()
    precision = resolve_precision(config.precision, stored=None, device=ranks.device)
    trainer = build_trainer(config.source, plan, stream=stream, precision=precision, ranks=ranks)
    for _ in batches:
        trainer.step(stream.batch(trainer.n_done))


def sparsify(args: argparse.Namespace, batches: OnDemand) -> None:
    """eai-sparsify's TopK with its default optimizer, in its trainer's order; no auxiliary loss is its default.

    On CUDA its forward pass is under bf16 autocast by itself wherever the GPU has bf16.
    """
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SaeConfig, SparseCoder
    from sparsify.sign_sgd import SignSGD

    shape = batches.rows_ND.shape[1], SaeConfig(num_latents=args.n_features, k=args.k)
    sae = SparseCoder(*shape, device=device(), dtype=torch.float32)
    sae.b_dec.data = batches.rows_ND[: args.batch].mean(0).to(device())
    rate = 5e-3 / (args.n_features / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    for x_ND in batches:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(device(), torch.bfloat16) if args.bf16 else nullcontext():
            loss = sae(x_ND.to(device())).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()


def sae_lens(args: argparse.Namespace, batches: OnDemand) -> None:
    """SAELens' trainer, its logging off."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    name = {"topk": "TopK", "batch_topk": "BatchTopK"}[args.method]
    shape = {"d_in": batches.rows_ND.shape[1], "d_sae": args.n_features}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**shape, k=args.k, device=device(), aux_loss_coefficient=0.0)
    trainer = SAETrainerConfig(
        total_training_samples=PARTS,
        train_batch_size_samples=args.batch,
        lr=3e-4,
        lr_end=3e-5,
        device=device(),
        autocast=args.bf16,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    sae_lens.SAETrainer(cfg=trainer, sae=sae, data_provider=batches).fit()


def dictionary_learning(args: argparse.Namespace, batches: OnDemand) -> None:
    """dictionary_learning's trainSAE; its auxiliary loss cannot be switched off, so its weight is set to 0.

    Its autocast is for CUDA only; on a CPU its products are fp32 whatever it is told.
    """
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    trainer, dictionary = {"topk": (TopKTrainer, AutoEncoderTopK), "batch_topk": (BatchTopKTrainer, BatchTopKSAE)}[
        args.method
    ]
    config = {"trainer": trainer, "dict_class": dictionary, "activation_dim": batches.rows_ND.shape[1]}
    config |= {"dict_size": args.n_features, "device": device(), "steps": PARTS, "layer": 0, "lm_name": "none"}
    config |= {"warmup_steps": 1000, "seed": 0, "k": args.k, "auxk_alpha": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        trainSAE(
            data=batches,
            trainer_configs=[config],
            steps=PARTS,
            save_dir=directory,
            device=device(),
            autocast_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )


LIBRARIES = {"ours": ours, "sparsify": sparsify, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, choices=LIBRARIES)
    parser.add_argument("--method", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--bf16", action="store_true")
    for name in ("n-features", "k", "tokens", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want CUDA tensors; read at its import
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")  # libraries print to what they take for standard output
    os.dup2(2, 1)
    LIBRARIES[args.library](args, OnDemand(read_rows(args.train, args.tokens), args.batch, answers))


if __name__ == "__main__":
    main()
