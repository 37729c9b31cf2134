"""Two processes, through torch.distributed, keep the matches that one keeps, and learn what one learns."""

import socket
from pathlib import Path

import pytest
import torch
from small_runs import CPU, run_config
from torch import Tensor

from sae_train.ranks import Processes, Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.dictionary import Dictionary
from sae_train.sae.firing import Firing
from sae_train.sae.losses import build_aux_loss, reconstruction_loss
from sae_train.sae.moment import Moment
from sae_train.sparsifiers import build_sparsifier

N, D, F, STEPS = 64, 16, 96, 6
CASES = [
    {"sparsifier": "topk"},
    {"sparsifier": "mutual_choice", "aux": "aux_k"},
    {"sparsifier": "mutual_choice", "start_k": 9.0, "anneal": 0.8},
    {"sparsifier": "feature_choice", "budget": "uniform"},
    {"sparsifier": "feature_choice", "budget": "zipf", "after": 0.5, "aux": "aux_zipf"},
]


def learn(case: dict[str, object], ranks: Ranks) -> dict[str, Tensor]:
    """Train for a few steps in float64; return every step's pairs, the loss, and the weights."""
    config = run_config(k=5, batch_tokens=N, tokens=N * STEPS, **case)  # type: ignore[arg-type]
    dictionary = Dictionary.initial(d_model=D, n_features=F, seed=0, dtype=torch.float64, device=CPU)
    sparsifier = build_sparsifier(config, n_features=F)
    aux = build_aux_loss(config, d_model=D, n_features=F, dead_window=N)
    firing = Firing(F, half_life_tokens=2 * N, device=CPU)
    optimizer = torch.optim.SGD(dictionary.parameters(), lr=0.3)
    own = slice(ranks.rank * N // ranks.size, (ranks.rank + 1) * N // ranks.size)
    seen: dict[str, Tensor] = {}
    for step in range(STEPS):
        moment = Moment(step=step, tokens=N * step, total_tokens=N * STEPS, batch_tokens=N, seed=0)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(N, D, generator=generator, dtype=torch.float64)[own]
        x = (x * 4).round() / 4 / D**0.5  # ties in the first steps
        pre = dictionary.pre_activations(x, precision="float64")
        chosen = sparsifier.select(pre, moment=moment, firing=firing, ranks=ranks)
        seen[f"pairs {step}"] = ranks.gather(chosen.dense() > 0).reshape(N, F)
        code: SparseCode = dictionary.attach(x, chosen)
        x_hat = dictionary.decode(code)
        loss = reconstruction_loss(x, x_hat, n_tokens=N)
        if aux is not None:
            loss = loss + aux(dictionary, x, pre, x - x_hat, firing=firing, ranks=ranks)
        optimizer.zero_grad()
        loss.backward()
        for parameter in dictionary.parameters():
            ranks.sum_in_place(parameter.grad)
        optimizer.step()
        dictionary.normalise()
        firing.update(code, n_tokens=N, ranks=ranks)
        seen[f"loss {step}"] = ranks.sum(loss.detach())
    return seen | dict(dictionary.state_dict()) | firing.state()


def learn_all(rank: int, port: int, path: str) -> None:
    """What each process runs; the first writes what came out."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = Processes()
    assert ranks.size == 2
    found = [learn(case, ranks) for case in CASES]
    if ranks.is_first:
        torch.save(found, path)
    ranks.barrier()
    ranks.close()


@pytest.mark.multirank
def test_two_processes_keep_and_learn_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "found.pt"
    torch.multiprocessing.spawn(learn_all, args=(port, str(path)), nprocs=2)
    for case, on_two in zip(CASES, torch.load(path), strict=True):
        on_one = learn(case, Solo())
        assert on_one.keys() == on_two.keys()
        for name, value in on_one.items():
            if value.is_floating_point():
                assert torch.allclose(value, on_two[name], rtol=1e-10, atol=1e-12), (case, name)
            else:
                assert torch.equal(value, on_two[name]), (case, name)
