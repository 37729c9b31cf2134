"""The SAEs that verify_formats.py exports: one of each sparsifier, four derived ones, and wrong copies of them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from bundled_activations import started
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.formats import native
from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Format, Opened
from sae_train.formats.manifest import SaeManifest
from sae_train.harvest.held_out import HALVES
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder

SETTINGS = ("n_features=512", "tokens=200_000", "layer.index=2", "tracking=none")
SPARSIFIERS = (
    "mutual_choice",
    "topk",
    "feature_choice",
    "jumprelu",
    "jumprelu_gemma_scope",
    "gated",
    "relu",
    "p_anneal",
    "temporal_mask",
)
ALONE = "gradient"
"""It reads gradients of the language model's loss, so it does not share a run with the others."""
TRAIN_ROWS, HELD_OUT_ROWS, BATCH = 30_720, 4096, 2048
ATTENTION = "attention site"
"""Name of the SAE at an attention site."""
LARGE_K = 400
"""More than the positive pre-activations of most tokens."""


def train(work: Path) -> None:
    """Train an SAE of each sparsifier on the bundled model, below WORK/runs. Finished runs are skipped."""
    listed = ",".join(f'"sparsifier={name}"' for name in SPARSIFIERS)
    for name, own in (("nine", f"variants=[{listed}]"), ("tenth", f"sparsifier={ALONE}")):
        command = [sys.executable, "-m", "sae_train", *SETTINGS, f"name={name}", own]
        subprocess.run(command, check=True, cwd=work)


def activations(work: Path) -> tuple[Path, Path]:
    """Write activations of the SAEs' site, unless they are there: training rows and held-out rows [n, d_model]."""
    rows, held_out = work / "rows.safetensors", work / "held_out.safetensors"
    if not (rows.exists() and held_out.exists()):
        stream = started(tokens=TRAIN_ROWS)
        ((site, scaling),) = stream.scalings.items()
        batches = [stream.batch(step)[site].x_ND for step in range(TRAIN_ROWS // BATCH)]
        x_ND = torch.cat([(x_ND * scaling.scale + scaling.centre_D).float() for x_ND in batches])
        save_file({"x": x_ND.contiguous()}, rows)
        halves = stream.held_out.batches(HALVES[0], max_tokens=2 * HELD_OUT_ROWS, ranks=Solo())
        x_ND = torch.cat([batch.sites[site].raw_ND.float() for batch in halves])[:HELD_OUT_ROWS]
        save_file({"x": x_ND.contiguous()}, held_out)
    return rows, held_out


def subjects(work: Path) -> dict[str, Opened]:
    """Return the SAEs by name: the trained ones, and four derived from mutual_choice."""
    found = {}
    for directory in sorted(work.glob("runs/*/saes/*")):
        sae, manifest = native.load(directory), native.read_manifest(directory)
        name = manifest.sparsifier or directory.name
        name = name if name not in found else f"{name}_gemma_scope"
        found[name] = Opened(sae=sae, manifest=manifest, format_name="ours")
    base = found["mutual_choice"]
    generator = torch.Generator().manual_seed(0)
    threshold_F = base.sae.threshold * (0.8 + 0.4 * torch.rand(base.sae.n_features, generator=generator))
    threshold_F[::47] = torch.inf
    derived = {
        "thresholds with +inf": altered(base.sae, threshold=threshold_F),
        "thresholds 0": altered(base.sae, threshold=torch.zeros_like(threshold_F)),
        f"k={LARGE_K}": altered(base.sae, threshold=torch.zeros_like(threshold_F), k=LARGE_K, inference="topk"),
    }
    for name, sae in derived.items():
        found[name] = Opened(sae=sae, manifest=_manifest(base.manifest, sae), format_name="ours")
    attention = replace(base.manifest, site="attention2")  # headers differ, and SAELens wants heads
    found[ATTENTION] = Opened(sae=base.sae, manifest=attention, format_name="ours")
    return found


def altered(
    sae: SparseAutoencoder, *, k: float | None = None, inference: str | None = None, **tensors: Tensor
) -> SparseAutoencoder:
    """Return a copy of an SAE with some of its facts replaced."""
    own = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    return SparseAutoencoder(
        **(own | tensors), k=sae.k if k is None else k, inference=inference or sae.inference
    ).eval()  # fmt: skip


def mistakes(sae: SparseAutoencoder) -> dict[str, SparseAutoencoder]:
    """Return an SAE as faulty exports would give it."""
    shift_F = (sae.b_dec.double() @ sae.W_enc.double()).float()
    rounded = {name: tensor.bfloat16().float() for name, tensor in sae.state_dict().items()}
    wrong = {
        "bias not folded": altered(sae, b_enc=(sae.b_enc - shift_F).detach()),
        "bf16 rounding": altered(sae, **rounded),
    }
    if sae.inference == "topk":
        return wrong | {"k one less": altered(sae, k=sae.k - 1), "k one more": altered(sae, k=sae.k + 1)}
    return wrong | {
        "threshold 0.1% higher": altered(sae, threshold=sae.threshold * 1.001),
        "threshold 0.1% lower": altered(sae, threshold=sae.threshold / 1.001),
    }


def exported(sae: SparseAutoencoder, manifest: SaeManifest, to: Format, out: Path) -> Path:
    """Export one SAE; return the directory of its files."""
    opened = Opened(sae=sae, manifest=_manifest(manifest, sae), format_name="ours")
    (written,) = export([Source(name=out.name, open=lambda: opened, run=None)], to, out)
    return written.directory


def _manifest(manifest: SaeManifest, sae: SparseAutoencoder) -> SaeManifest:
    values = manifest.as_json() | {"k": sae.k, "inference": sae.inference}
    return SaeManifest.from_json(values)


def rows_of(path: Path) -> Tensor:
    return load_file(path)["x"]
