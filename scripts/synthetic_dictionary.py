"""Write activations with a known truth: sparse sums of unit directions with Zipf frequencies, families and groups.

    python scripts/synthetic_dictionary.py --out SYNTHETIC [--seed 0]

It writes SYNTHETIC/train and SYNTHETIC/held_out for `harvest=tensors`, and SYNTHETIC/truth.safetensors with

    directions  [n_true, d_model] unit rows
    density     [n_true] share of tokens on which a direction is active, by design
    parent      [n_true] a child's parent, -1 for what is no child
    active      [n_held_out, n_true] uint8: what is active on the held-out rows

An activation is x = sum_i s_i d_i + noise. Densities fall with the rank as 1 / (rank + 10), in the mean 16 directions
are active. A quarter of the directions belong to families: each parent has three children, at most one of which is
active, and only while the parent is. Another eighth are in groups of four that share a Gaussian cause. The rest are
independent. Strengths are log-normal (sigma 0.25), noise has a hundredth of the variance. All of this is ours.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, N_TRUE, MEAN_ACTIVE = 256, 512, 16.0
CHILDREN, CHILD_SHARE = 3, 0.2
"""Children of a parent; the probability of each of them on the parent's tokens."""
GROUP, CORRELATION = 4, 0.7
"""Directions that share a cause; the correlation of their Gaussians."""
SIGMA, NOISE = 0.25, 0.01
CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Truth:
    """The true directions, and the structure of their firings."""

    directions: Tensor
    density: Tensor
    parent: Tensor
    group: Tensor
    """[n_true] the number of a direction's group, -1 for none."""


def truth(seed: int) -> Truth:
    """Return directions, densities, families and groups; parents lie at every eighth rank of the denser half."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N_TRUE, D_MODEL, generator=generator)
    parent, group = torch.full((N_TRUE,), -1), torch.full((N_TRUE,), -1)
    free = list(range(N_TRUE))
    parents = free[4 : N_TRUE // 2 : 8]
    free = [i for i in free if i not in set(parents)]
    order = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()]
    children, rest = order[: CHILDREN * len(parents)], order[CHILDREN * len(parents) :]
    for place, child in enumerate(children):
        parent[child] = parents[place // CHILDREN]
    for place, member in enumerate(rest[: N_TRUE // 8]):
        group[member] = place // GROUP
    weight = 1 / (torch.arange(N_TRUE, dtype=torch.float64) + 10)
    density = weight.clone()
    for _ in range(50):  # children have a share of their parent's density; the sum is MEAN_ACTIVE, nothing above 0.4
        density[parent >= 0] = CHILD_SHARE * density[parent[parent >= 0]]
        density = (density * (MEAN_ACTIVE / density.sum())).clamp(max=0.4)
    density[parent >= 0] = CHILD_SHARE * density[parent[parent >= 0]]
    return Truth(rows / rows.norm(dim=1, keepdim=True), density, parent, group)


def activity(known: Truth, n_rows: int, generator: torch.Generator) -> Tensor:
    """Return the active directions of each row [n_rows, n_true], bool."""
    draw = torch.rand(n_rows, N_TRUE, generator=generator, dtype=torch.float64)
    grouped = known.group >= 0
    cause = torch.randn(n_rows, int(known.group.max()) + 1, generator=generator, dtype=torch.float64)
    own = torch.randn(n_rows, int(grouped.sum()), generator=generator, dtype=torch.float64)
    mixed = CORRELATION**0.5 * cause[:, known.group[grouped]] + (1 - CORRELATION) ** 0.5 * own
    draw[:, grouped] = 1 - torch.special.ndtr(mixed)
    active = draw < known.density
    for parent in known.parent[known.parent >= 0].unique().tolist():
        children = (known.parent == parent).nonzero().flatten()
        which = torch.rand(n_rows, generator=generator).div(CHILD_SHARE).floor().long()  # past the last child: none
        active[:, children] = (which[:, None] == torch.arange(len(children))) & active[:, parent, None]
    return active


def activations(known: Truth, active: Tensor, generator: torch.Generator) -> Tensor:
    """Return [n, d_model] fp32 rows of an activity [n, n_true]."""
    strength = torch.exp(SIGMA * torch.randn(active.shape, generator=generator))
    rows = (active * strength) @ known.directions
    spread = (rows.square().sum(1).mean() / D_MODEL * NOISE).sqrt()
    return rows + spread * torch.randn(rows.shape, generator=generator)


def write(out: Path, *, seed: int, n_train: int, n_held_out: int) -> None:
    """Write training rows, held-out rows and the truth under `out`."""
    known = truth(seed)
    for name, n_rows in (("train", n_train), ("held_out", n_held_out)):
        generator = torch.Generator().manual_seed(seed + {"train": 1, "held_out": 2}[name] * 2**20)
        parts, seen = [], []
        for start in range(0, n_rows, CHUNK):
            active = activity(known, min(CHUNK, n_rows - start), generator)
            parts.append(activations(known, active, generator).half())
            if name == "held_out":
                seen.append(active.to(torch.uint8))
        (out / name).mkdir(parents=True, exist_ok=True)
        save_file({"activations": torch.cat(parts)}, out / name / "rows.safetensors")
    parts_of_truth = {"directions": known.directions, "density": known.density, "parent": known.parent}
    save_file({**parts_of_truth, "active": torch.cat(seen)}, out / "truth.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The share of the truth that a dictionary has found, and absorption of parents by their children."""

    cosine: float
    """Mean over directions of the largest cosine with a feature."""
    found: float
    """Share of directions with a cosine above 0.9."""
    parents_found: float
    """Share of parents with a cosine above 0.9."""
    absorbed: list[float | None]
    """By parent: share of its tokens with a child on which its feature (the nearest in cosine) is silent; None where
    the parent was not found."""
    missed: list[float | None]
    """The same on its tokens without a child: missed without any absorption."""


def recovery(fires: Tensor, W_dec: Tensor, held: dict[str, Tensor]) -> Recovery:
    """Return the recovery by an SAE with unit decoder rows [F, D] and firings [n_held_out, F] bool on `held`."""
    cosine, nearest = (held["directions"] @ W_dec.t()).max(dim=1)
    active = held["active"].bool()
    parents = held["parent"][held["parent"] >= 0].unique()
    absorbed: list[float | None] = []
    missed: list[float | None] = []
    for parent in parents.tolist():
        children = active[:, held["parent"] == parent].any(dim=1)
        silent, is_found = ~fires[:, nearest[parent]], bool(cosine[parent] > 0.9)
        absorbed.append(float(silent[children].double().mean()) if is_found else None)
        missed.append(float(silent[active[:, parent] & ~children].double().mean()) if is_found else None)
    return Recovery(
        cosine=float(cosine.mean()), found=float((cosine > 0.9).double().mean()),
        parents_found=float((cosine[parents] > 0.9).double().mean()), absorbed=absorbed, missed=missed,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-train", type=int, default=400_000)
    parser.add_argument("--n-held-out", type=int, default=32_768)
    args = parser.parse_args()
    write(args.out, seed=args.seed, n_train=args.n_train, n_held_out=args.n_held_out)


if __name__ == "__main__":
    main()
