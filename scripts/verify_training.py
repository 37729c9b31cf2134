"""Train SAEs with another program for a few steps and save them by its own code, inside that program's environment.

Used by verify_formats.py. This package need not be installed here.

    python verify_training.py PROGRAM ACTIVATIONS.safetensors OUT

It writes OUT/NAME/ for each of the program's architectures and prints their names.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want CUDA tensors; read when it is imported
os.environ.setdefault("WANDB_MODE", "disabled")
import torch
from safetensors.torch import load_file
from torch import Tensor

STEPS, BATCH, K, F = 60, 512, 32, 512
GROUPS = (0.25, 0.25, 0.5)


class Batches:
    """Endless batches in the order of the rows. Each iterator starts anew."""

    def __init__(self, rows_ND: Tensor) -> None:
        self.rows_ND = rows_ND

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from self.rows_ND[: len(self.rows_ND) // BATCH * BATCH].split(BATCH)


def sae_lens(rows_ND: Tensor, out: Path) -> None:
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    # (name of the classes, settings); prices that leave some tens of features
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": K}),
        "topk_unscaled": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
        "batchtopk": ("BatchTopK", {"k": K}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [128, F]}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": 1.0}),
        "standard": ("Standard", {"l1_coefficient": 1.0}),
        "gated": ("Gated", {"l1_coefficient": 1.0}),
    }
    for name, (kind, settings) in kinds.items():
        config = getattr(sae_lens, f"{kind}TrainingSAEConfig")
        sae = getattr(sae_lens, f"{kind}TrainingSAE")(config(d_in=rows_ND.shape[1], d_sae=F, device="cpu", **settings))
        trainer = SAETrainerConfig(
            total_training_samples=BATCH * STEPS,
            train_batch_size_samples=BATCH,
            lr=1e-3,
            lr_end=1e-4,
            device="cpu",
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
        )
        sae_lens.SAETrainer(cfg=trainer, sae=sae, data_provider=iter(Batches(rows_ND))).fit()
        sae.save_inference_model(str(out / name))


def sparsify(rows_ND: Tensor, out: Path) -> None:
    from sparsify import SaeConfig, SparseCoder

    sae = SparseCoder(rows_ND.shape[1], SaeConfig(num_latents=F, k=K), device="cpu", dtype=torch.float32)
    sae.b_dec.data = rows_ND[:BATCH].mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for _, x_ND in zip(range(STEPS), Batches(rows_ND), strict=False):
        sae.set_decoder_norm_to_unit_norm()
        sae(x_ND).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    sae.save_to_disk(out / "topk")


def dictionary_learning(rows_ND: Tensor, out: Path) -> None:
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.training import trainSAE

    selects = {"k": K, "threshold_start_step": STEPS // 10}
    kinds = {
        "topk": (top_k.TopKTrainer, top_k.AutoEncoderTopK, selects),
        "batchtopk": (batch_top_k.BatchTopKTrainer, batch_top_k.BatchTopKSAE, selects),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
            selects | {"group_fractions": list(GROUPS)},
        ),
        "jumprelu": (
            jumprelu.JumpReluTrainer,
            classes.JumpReluAutoEncoder,
            {"sparsity_warmup_steps": STEPS // 2, "lr": 1e-3},
        ),
        "gated": (gdm.GatedSAETrainer, classes.GatedAutoEncoder, {"sparsity_warmup_steps": STEPS // 2, "lr": 1e-3}),
        "standard": (standard.StandardTrainer, classes.AutoEncoder, {"sparsity_warmup_steps": STEPS // 2}),
    }
    configs = [
        {
            "trainer": trainer,
            "dict_class": kind,
            "activation_dim": rows_ND.shape[1],
            "dict_size": F,
            "device": "cpu",
            "steps": STEPS,
            "layer": 2,
            "lm_name": "none",
            "warmup_steps": STEPS // 10,
            "seed": 0,
            **settings,
        }
        for trainer, kind, settings in kinds.values()
    ]
    with tempfile.TemporaryDirectory(dir=out) as directory:
        trainSAE(
            data=Batches(rows_ND),
            trainer_configs=configs,
            steps=STEPS,
            save_dir=directory,
            device="cpu",
            autocast_dtype=torch.float32,
        )
        for number, name in enumerate(kinds):
            Path(directory, f"trainer_{number}").rename(out / name)


def llamascopium(rows_ND: Tensor, out: Path) -> None:
    from llamascopium import SAEConfig, SparseAutoEncoder

    hook = "blocks.2.hook_resid_post"
    norm = float(rows_ND.norm(dim=1).mean())
    for name, by_norm in (("topk", False), ("topk_by_norm", True), ("jumprelu", True), ("relu", True)):
        config = SAEConfig(
            hook_point_in=hook,
            hook_point_out=hook,
            d_model=rows_ND.shape[1],
            expansion_factor=F / rows_ND.shape[1],
            act_fn=name.partition("_")[0],
            top_k=K,
            sparsity_include_decoder_norm=by_norm,
        )
        sae = SparseAutoEncoder.from_config(config)
        sae.init_parameters(
            encoder_uniform_bound=0.1, decoder_uniform_bound=0.1, init_log_jumprelu_threshold_value=-2.0
        )
        sae.set_dataset_average_activation_norm({hook: norm})
        sae.set_current_k(K)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        price = {} if name.startswith("topk") else {"sparsity_loss_type": "tanh", "l1_coefficient": 0.3}
        for _, x_ND in zip(range(STEPS), Batches(rows_ND), strict=False):
            batch = sae.normalize_activations({hook: x_ND})
            loss = sae.compute_loss(batch, return_aux_data=False, **price)
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sae.save_pretrained(out / name)
        sae.cfg.save_hyperparameters(out / name)  # save_pretrained writes the weights alone


PROGRAMS = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "llamascopium": llamascopium,
}


def main() -> None:
    program, activations, out = sys.argv[1:]
    torch.manual_seed(0)
    Path(out).mkdir(parents=True)
    PROGRAMS[program](load_file(activations)["x"], Path(out))
    print(*sorted(path.name for path in Path(out).iterdir()))


if __name__ == "__main__":
    main()
