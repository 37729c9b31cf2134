"""What the ranks of a test's world do: real processes, one start a world size, all cases sent through it."""

import dataclasses
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from sae_train.cli.compose import compose_config
from sae_train.config import RunConfig
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.distributed import find_ranks, leave
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sparsifiers.allocator import Allocator
from sae_train.sparsifiers.base import Encoding, Sparsifier
from sae_train.sparsifiers.gradient import Gradient
from sae_train.training import checkpoint, restore
from sae_train.training.run import plan_of
from sae_train.training.trainer import Trainer, build_trainer

D, F, N = 16, 97, 64
STEPS, QUICK_STEPS = 50, 12
LAYOUTS = {1: (1,), 2: (1, 2), 4: (1, 4, 2)}
"""Columns of the grid of ranks (parallel=data, features, mesh) by world size."""
NESTED = ["nesting=matryoshka", f"nesting.prefixes=[{25 / F},{60 / F},1.0]"]
CASES: dict[str, list[str]] = {
    "topk": ["sparsifier=topk", "aux_loss=aux_k"],
    "topk, annealed": [
        "sparsifier=topk",
        "sparsifier.multi_weight=0.125",
        "aux_loss=none",
        "budget.start_k=9",
        "budget.anneal=0.5",
        *NESTED,
    ],
    "mutual choice": ["sparsifier=mutual_choice", "aux_loss=none", "optimizer.clip=0.05"],
    "mutual choice, zipf": [
        "sparsifier=mutual_choice",
        "aux_loss=aux_zipf",
        "aux_loss.tau=0.5",
        "parametrisation=aligned",
    ],
    "jumprelu": ["sparsifier=jumprelu", "aux_loss=none", *NESTED],
    "gated": ["sparsifier=gated"],
    "relu": ["sparsifier=relu"],
    "p_anneal": ["sparsifier=p_anneal", "aux_loss=aux_zipf"],
    "temporal mask": ["sparsifier=temporal_mask", "sparsifier.strength=2", "sparsifier.export_mask=true"],
    "feature choice": ["sparsifier=feature_choice", "aux_loss=aux_k", "budget.start_k=7", "budget.anneal=0.5"],
    "feature choice, zipf": ["sparsifier=feature_choice", "budget=zipf", "sparsifier.after=0.5", "aux_loss=aux_zipf"],
    "gradient": ["sparsifier=gradient", "aux_loss=aux_k", "budget.start_k=9", "budget.anneal=0.5"],
}
TRAFFIC: dict[str, list[str]] = {
    "topk": [],
    "topk, multi": ["sparsifier.multi_weight=0.125"],
    "topk, nested": ["nesting=matryoshka"],
    "gradient": [],
    "mutual_choice": [],
    "feature_choice": [],
    "jumprelu": ["sparsifier.threshold=0.2"],
    "relu": [],
    "p_anneal": ["sparsifier.start=0", f"sparsifier.changes={STEPS}"],
    "gated": [],
    "temporal_mask": ["sparsifier.warmup=0", "sparsifier.ramp=0"],
}
"""Sparsifiers whose traffic is counted, with what makes each step move all that any moves (jumprelu: some are dead)."""
WITHOUT_AUX_K = ("relu", "p_anneal", "gated", "temporal_mask")


def write_activations(folder: Path) -> None:
    """Rows of a superposition on a coarse grid, so that affinities tie, some of them zero."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(6000, 64, generator=generator) < 0.06).double() * torch.rand(6000, 64, generator=generator)
    rows = (8 * codes @ torch.randn(64, D, generator=generator, dtype=torch.float64)).round() / 8
    folder.mkdir(parents=True, exist_ok=True)
    gradients = torch.randn(6000, D, generator=generator, dtype=torch.float64)
    save_file({"activations": rows.contiguous(), "gradients": gradients}, str(folder / "rows.safetensors"))


def config_of(
    folder: Path, case: list[str], *, precision: str, steps: int = STEPS, n_features: int = F, dead_window: int = 512
) -> RunConfig:
    """Return the configuration of a case."""
    return compose_config([
        "harvest=tensors", f"harvest.path={folder}", "harvest.calibration_tokens=512", "harvest.prefetch=0",
        "tracking=none", "k=5",
        f"n_features={n_features}", f"batch_tokens={N}", f"tokens={N * steps}", f"dead_window={dead_window}",
        f"precision={precision}", *case,
    ])  # fmt: skip


def build(config: RunConfig, ranks: Ranks, *, start: bool = True) -> Trainer:
    """Return the trainer that a run on these ranks would have."""
    facts = check_stream(config.source, n_ranks=ranks.size)
    plan = plan_of(config, facts, n_ranks=ranks.size)
    stream = build_stream(config.source, ranks=ranks, facts=facts)
    if start:
        stream.start()
    return build_trainer(config.source, plan, stream=stream, precision=config.precision, ranks=ranks)


def places(code: Code) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token, feature and value of what fires."""
    if isinstance(code, DenseCode):
        token, feature = (code.value > 0).nonzero().unbind(1)
        return token, feature, code.value.detach()[token, feature]
    fires = code.value > 0
    return code.token[fires].long(), code.feature[fires].long(), code.value.detach()[fires]


def watch(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a list to which every step adds its matches: flat indices over all ranks, ascending, and what each was
    chosen by, its affinity or its score."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    learner, ranks = trainer.learners[0], trainer.ranks
    encode, scores = learner.sparsifier.encode, note_scores(learner.sparsifier)

    def watched(*parts: Any) -> Encoding:
        encoding = encode(*parts)
        code = encoding.code
        token, feature, value = places(code)
        if isinstance(learner.sparsifier, Allocator):
            assert isinstance(code, SparseCode)
            assert len(value) == int(code.count)
        if scores:
            value = scores.pop()[token, feature]
        token, feature = token + ranks.data.rank * code.n_tokens, feature + learner.features[0]
        index, order = ranks.gather_rows(token * trainer.learners[0].plan.n_features + feature).sort()
        seen.append((index, ranks.gather_rows(value)[order]))
        return encoding

    learner.sparsifier.encode = watched
    return seen


def note_scores(sparsifier: Sparsifier) -> list[torch.Tensor]:
    """Return a list to which every choice adds the scores that it goes by [N, F], where those are not affinities."""
    noted: list[torch.Tensor] = []
    if isinstance(sparsifier, Gradient):
        scores = sparsifier._scores

        def watched(*parts: Any, **rest: Any) -> torch.Tensor:
            noted.append(scores(*parts, **rest))
            return noted[-1]

        sparsifier._scores = watched
    return noted


def whole(trainer: Trainer, name: str) -> torch.Tensor:
    """Return a parameter of all features."""
    own = getattr(trainer.learners[0].dictionary, name).detach()
    return own if name == "b_dec" else trainer.ranks.features.gather_slices(own, trainer.learners[0].plan.n_features)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return all that is learned of all features, and the encoder's rows."""
    return {name: whole(trainer, name) for name in ("W_enc", *dict(trainer.learners[0].dictionary.named_parameters()))}


def learn(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Train; return every step's matches, the weights, the counters and the row of the interval."""
    trainer = build(config, ranks)
    seen = watch(trainer)
    for step in range(trainer.plan.steps):
        trainer.step(trainer.stream.batch(step))
    (row,) = trainer.rows()
    since = ranks.features.gather_slices(trainer.learners[0].firing.since_F, trainer.learners[0].plan.n_features)
    figures = {key: value for key, value in row.items() if key != "sae" and not key.startswith("perf/")}
    return {"matches": [index for index, _ in seen], "weights": weights(trainer), "since": since, "row": figures}


def one_step(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the first step's matches with what they were chosen by, and its gradients before clipping."""
    trainer = build(config, ranks)
    seen = watch(trainer)
    found: dict[str, torch.Tensor] = {}
    update = trainer.learners[0].optimizer.step

    def noted(**parts: Any) -> None:
        for name, parameter in trainer.learners[0].dictionary.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            slices = ranks.features.gather_slices
            found[name] = (
                gradient.clone() if name == "b_dec" else slices(gradient.clone(), trainer.learners[0].plan.n_features)
            )
        update(**parts)

    trainer.learners[0].optimizer.step = noted
    trainer.step(trainer.stream.batch(0))
    return {"matches": dict(zip(*(part.tolist() for part in seen[0]), strict=True)), "gradients": found}


def save(config: RunConfig, ranks: Ranks, folder: Path, *, steps: int) -> None:
    """Train for some steps and write a checkpoint."""
    trainer = build(config, ranks)
    for step in range(steps):
        trainer.step(trainer.stream.batch(step))
    checkpoint.begin(folder, trainer.contents(), notes=trainer.notes(), ranks=ranks, keep=0).publish()


def resume(config: RunConfig, ranks: Ranks, folder: Path) -> dict[str, torch.Tensor]:
    """Go on from the newest checkpoint to the end; return the weights."""
    trainer = build(config, ranks, start=False)
    found = restore.newest(folder, ranks=ranks, warn=sys.stdout.write)
    assert found is not None
    trainer.restore(found)
    while trainer.n_done < trainer.plan.steps:
        trainer.step(trainer.stream.batch(trainer.n_done))
    return weights(trainer)


def hand_over(first: Trainer, second: Trainer, folder: Path) -> None:
    """Let `second` continue where `first` is, by way of a checkpoint in `folder`."""
    path = checkpoint.begin(folder, first.contents(), notes=first.notes(), ranks=first.ranks, keep=1).publish()
    second.restore(restore.load(path))


def counted(folder: Path, kind: str, aux: str, *, n_features: int, dead_window: int) -> RunConfig:
    """Return the configuration of a run whose traffic is counted."""
    return dataclasses.replace(_counted(folder, kind, aux, dead_window), n_features=n_features)


@cache
def _counted(folder: Path, kind: str, aux: str, dead_window: int) -> RunConfig:
    case = [f"sparsifier={kind.partition(',')[0]}", f"aux_loss={aux}", *TRAFFIC[kind]]
    return config_of(folder, case, precision="float32", dead_window=dead_window)


def traffic(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """Return the bytes of one step by verb; by then features are dead, and an auxiliary loss has work."""
    trainer = build(config, ranks)
    before = 1 if config.aux_loss.name == "none" else trainer.learners[0].plan.dead_window // N + 2
    for step in range(before):
        trainer.step(trainer.stream.batch(step))
    batch = trainer.stream.batch(before)
    ranks.traffic.clear()
    trainer.step(batch)
    return {verb: count for verb, count in ranks.traffic.items() if count}


def join(rank: int, size: int, port: int) -> Ranks:
    """Join a world of processes on this machine."""
    if size == 1:
        return Solo()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return find_ranks()


def end() -> NoReturn:
    """Leave the world and end this process at once, as the command line does: threads of a group that was left may
    otherwise abort an interpreter that is ending (seen once in some ten worlds on a busy machine)."""
    leave()
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _measure(rank: int, size: int, port: int, folder: str) -> None:
    """Print the bytes that one step moves on four processes, in a Markdown table."""
    ranks = join(rank, size, port)
    if rank == 0:
        sys.stdout.write("| sparsifier | auxiliary loss | columns | n_features | bytes a step and rank | of which |\n")
        sys.stdout.write("|---|---|---|---|---|---|\n")
    for kind in TRAFFIC:
        for aux in ("none",) if kind in WITHOUT_AUX_K else ("none", "aux_k", "aux_zipf"):
            for columns in LAYOUTS[size]:
                for n_features in (256, 1024):
                    config = counted(Path(folder), kind, aux, n_features=n_features, dead_window=512)
                    moved = traffic(config, ranks.arranged(columns=columns))
                    if rank == 0:
                        parts = ", ".join(f"{verb} {count:,}" for verb, count in sorted(moved.items()))
                        total = sum(moved.values())
                        sys.stdout.write(f"| {kind} | {aux} | {columns} | {n_features} | {total:,} | {parts} |\n")
    end()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_activations(Path(scratch))
        torch.multiprocessing.spawn(_measure, args=(4, free_port(), scratch), nprocs=4)
