"""The program as a user runs it: the main job, its files, its verdict, and how it stops when it must."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sae_train
from sae_train.training.restore import load
from tools.command_line import Command, changed
from tools.tiny_runs import tiny_run


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((only_run(folder) / "summary.json").read_text())
    return summary


def write_tensors(folder: Path, *, n: int = 6000, d_model: int = 32, seed: int = 0) -> Path:
    """Write activations of a known sparse make-up; `seed` draws the tokens, the directions are always the same."""
    directions = torch.randn(64, d_model, generator=torch.Generator().manual_seed(7))
    dictionary = torch.nn.functional.normalize(directions, dim=1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 64, generator=generator) * (torch.rand(n, 64, generator=generator) < 0.06)
    folder.mkdir()
    save_file({"activations": codes @ dictionary + 1.0}, str(folder / "part.safetensors"))
    return folder


def test_bundled_run_leaves_what_the_contract_says(tmp_path: Path, command: Command) -> None:
    done = command(*tiny_run(tmp_path))
    assert done.status == 0, done.stderr
    run = only_run(tmp_path)
    assert re.fullmatch(r"bundled\.residual2\.mutual_choice\.k8\.f256\.s0-[0-9a-f]{6}", run.name)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert (run / name).is_file(), name
    figures = next(iter(summary_of(tmp_path)["saes"].values()))
    wanted = {
        "l0",
        "l0_standard_error",
        "fvu",
        "nmse",
        "dead_fraction",
        "evaluation_tokens",
        "delta_ce",
        "ce_recovered",
    }
    assert wanted <= figures.keys()
    assert abs(figures["l0"] - 8) <= max(0.02 * 8, 3 * figures["l0_standard_error"])
    assert 0 < figures["fvu"] < 1
    law = figures["density"]
    again = ["sparsifier=feature_choice", "budget=zipf", f"budget.zipf_from={run}", "dry_run=true"]
    planned = f"zipf, exponent {law['zipf_exponent']:g}, shift {law['zipf_shift']:g}, of {run}"
    assert planned in command(*tiny_run(tmp_path), *again).stdout
    verdict = done.stdout.splitlines()[-1]
    assert re.search(r"mutual_choice.*L0 .*FVU .*dead .*CE recovered .*tokens/s.*runs/", verdict)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"sae", "step", "tokens"} <= row.keys() for row in rows)
    training = [row for row in rows if "train/fvu" in row]
    assert [row["tokens"] for row in training] == [2048, 4096, 6144, 8192]
    assert training[-1]["train/fvu"] < training[0]["train/fvu"]
    assert all(row["train/l0"] == 8 for row in training)
    sae = sae_train.load(run)
    assert sae.encode(torch.randn(2, 5, 256)).shape == (2, 5, 256)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(256))


@pytest.mark.slow
def test_tracking_and_evaluation_do_not_change_the_weights(tmp_path: Path, command: Command) -> None:
    files = []
    for name, more in (
        ("quiet", ["tracking=none"]),
        ("loud", ["tracking=wandb", "evaluate_every=1024", "log_every=512"]),
    ):
        done = command(*changed(tiny_run(tmp_path / name), "tokens=4096", *more))
        assert done.status == 0, done.stderr
        (file,) = (tmp_path / name).glob("runs/*/saes/*/sae.safetensors")
        files.append(file.read_bytes())
        if name == "loud":
            assert len(re.findall(r"wandb sync", done.stderr)) == 1
            assert list((tmp_path / name).glob("runs/*/wandb/offline-run-*/*.wandb"))
    assert files[0] == files[1]


@pytest.mark.parametrize("sparsifier", ["topk", "feature_choice"])
def test_tensors_run(tmp_path: Path, command: Command, sparsifier: str) -> None:
    source, held_out = write_tensors(tmp_path / "acts"), write_tensors(tmp_path / "held_out", n=20_000, seed=1)
    done = command(
        "harvest=tensors", f"harvest.path={source}", f"harvest.held_out={held_out}", "harvest.calibration_tokens=1000",
        f"sparsifier={sparsifier}", "n_features=128", "k=4", "tokens=40960",
        "batch_tokens=512", "tracking=none", "log_every=8192",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "CE recovered" not in done.stdout
    figures = next(iter(summary_of(tmp_path)["saes"].values()))
    assert figures["fvu"] < 0.5
    assert abs(figures["l0"] - figures["target_l0"]) <= max(
        0.02 * figures["target_l0"], 3 * figures["l0_standard_error"]
    )


def test_a_loss_that_is_not_finite_stops_with_3(tmp_path: Path, command: Command) -> None:
    source = write_tensors(tmp_path / "acts")
    arguments = [
        "harvest=tensors", f"harvest.path={source}", "harvest.calibration_tokens=1000", "n_features=128", "k=4",
        "tokens=40960", "batch_tokens=512", "tracking=none", "log_every=2048", "checkpoint.every_tokens=512", "name=x",
    ]  # fmt: skip
    done = command(*arguments, "optimizer.lr=1e38", "optimizer.warmup_tokens=20480", "optimizer.clip=0")
    assert done.status == 3, done.stderr
    assert re.search(r"not finite", done.stderr)
    assert "Traceback" not in done.stderr
    assert "is stopped and left out: loss is " in done.stderr
    (figures,) = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())["saes"].values()
    assert list(figures) == ["stopped"]
    for path in (tmp_path / "runs" / "x" / "checkpoints").iterdir():
        found = load(path)
        (sae,) = found.sae_names()
        shared, features = found.sae_state(sae, 0, 128)
        state = shared | features
        names = [name for name in state if name.startswith("dictionary/")]
        assert {"dictionary/W_enc", "dictionary/b_dec"} <= set(names)
        assert all(bool(state[name].isfinite().all()) for name in names)


def test_diverging_stops_with_3(tmp_path: Path, command: Command) -> None:
    source = write_tensors(tmp_path / "acts")
    done = command(
        "harvest=tensors", f"harvest.path={source}", "harvest.calibration_tokens=1000", "n_features=128", "k=4",
        "tokens=40960", "batch_tokens=512", "tracking=none", "log_every=2048", "optimizer.lr=1e6",
    )  # fmt: skip
    assert done.status == 3, done.stderr
    assert "has diverged" in done.stderr


def test_refused_data_leaves_nothing_and_its_name_free(tmp_path: Path, command: Command) -> None:
    source = write_tensors(tmp_path / "acts")
    (tmp_path / "bad").mkdir()
    rows = torch.randn(6000, 32)
    rows[77, 3] = float("nan")
    save_file({"activations": rows}, str(tmp_path / "bad" / "x.safetensors"))
    arguments = [
        "harvest=tensors", "harvest.calibration_tokens=1000", "n_features=128", "k=4", "tokens=2048",
        "batch_tokens=512", "tracking=none", "name=fix",
    ]  # fmt: skip
    refused = command(*arguments, f"harvest.path={tmp_path / 'bad'}")
    assert refused.status == 2
    assert "row 77" in refused.stderr
    assert not (tmp_path / "runs" / "fix").exists()
    assert command(*arguments, f"harvest.path={source}").status == 0


def test_held_out_rows_that_are_all_outliers_are_refused(tmp_path: Path, command: Command) -> None:
    source, held_out = write_tensors(tmp_path / "acts"), tmp_path / "held_out"
    held_out.mkdir()
    save_file({"activations": 1e4 * torch.randn(2000, 32)}, str(held_out / "x.safetensors"))
    done = command(
        "harvest=tensors", f"harvest.path={source}", f"harvest.held_out={held_out}", "harvest.calibration_tokens=1000",
        "n_features=128", "k=4", "tokens=2048", "batch_tokens=512", "tracking=none",
    )  # fmt: skip
    assert done.status == 2, done.stderr
    assert "outlier" in done.stderr
    assert not list((tmp_path / "runs").glob("*/summary.json"))


@pytest.mark.multirank
@pytest.mark.slow
def test_two_processes_leave_in_peace(tmp_path: Path, torchrun: Command) -> None:
    """A rank that tears its group down while another still speaks made four runs in ten exit 1 after their verdict."""
    source = write_tensors(tmp_path / "acts")
    for seed in range(7):
        done = torchrun(
            2, "harvest=tensors", f"harvest.path={source}", "harvest.calibration_tokens=1000", "n_features=128", "k=4",
            "tokens=2048", "batch_tokens=512", "tracking=none", f"seed={seed}",
        )  # fmt: skip
        assert done.status == 0, (seed, done.stderr)


def test_a_full_disk_is_a_message_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A file-size limit that checkpoints pass at first refuses writes as a full disk would."""
    folder = tmp_path / "runs"
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000)); "
        "from sae_train.cli.train import main; sys.argv = ['sae-train', *sys.argv[1:]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *tiny_run(tmp_path), "checkpoint.every_tokens=1024", "name=x"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("*partial*"))
    assert not list(folder.rglob("tmp-*"))


def test_an_unwritable_directory_is_refused_before_the_model_loads(tmp_path: Path, command: Command) -> None:
    (tmp_path / "runs").write_text("a file where the directory should be")
    done = command(*tiny_run(tmp_path))
    assert done.status == 2
    assert "runs" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, command: Command) -> None:
    done = command(*tiny_run(tmp_path), "dry_run=true")
    assert done.status == 0, done.stderr
    for word in ("site", "d_model 256", "256 features", "steps", "memory", "disk", "operations", "learning rate"):
        assert word in done.stdout, word
    assert not (tmp_path / "runs").exists()


@pytest.mark.multirank
@pytest.mark.slow
def test_two_processes_see_the_same_batches_and_compute_the_same(
    tmp_path: Path, command: Command, torchrun: Command
) -> None:
    results = []
    for name in ("one", "two"):
        arguments = changed(tiny_run(tmp_path / name), "precision=float64", "tokens=4096", "log_every=512")
        done = command(*arguments, OMP_NUM_THREADS="1") if name == "one" else torchrun(2, *arguments)
        assert done.status == 0, done.stderr
        run = only_run(tmp_path / name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results.append((sae_train.load(run), lines))
    (one, rows), (two, other_rows) = results
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-6, atol=1e-7)
    for row, other in zip(rows, other_rows, strict=True):
        for key in ("step", "tokens", "train/l0", "train/fvu", "train/loss", "train/dead_features", "eval/fvu"):
            assert (key in row) == (key in other)
            assert key not in row or row[key] == pytest.approx(other[key], rel=1e-6), key
