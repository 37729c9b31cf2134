"""`sae_train.train`: the run of the command line, in this process, which is the same before and after."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import sae_train
from sae_train.cli.compose import compose_config
from sae_train.cli.typed_settings import settings_texts
from sae_train.errors import CheckpointError, ConfigError, DirectoryInUse, Preempted, StoppedByNumbers
from sae_train.training import signals
from tools.command_line import Command, changed
from tools.processes import weights
from tools.tiny_runs import rows_run

LONG = ["tokens=32768", "checkpoint.every_tokens=8192", "log_every=1024"]
"""A run of a second or two, in which a signal can arrive."""


def state() -> tuple[Any, ...]:
    """Return everything of this process that belongs to the user."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    threads = [each for each in threading.enumerate() if type(each).__name__ != "TMonitor"]  # tqdm's, which stays
    switches = [
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
    ]
    return handlers, dict(os.environ), torch.get_num_threads(), Path.cwd(), threads, switches


def when(happened: Callable[[], bool], sent: signal.Signals) -> threading.Thread:
    """Send a signal to this process once something has happened."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), sent)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def has_rows(folder: Path) -> Callable[[], bool]:
    return lambda: any(path.stat().st_size for path in folder.glob("runs/*/metrics.jsonl"))


def test_a_run_equals_the_one_of_the_command_line(tmp_path: Path, command: Command) -> None:
    other = tmp_path / "python"
    assert command(*rows_run(tmp_path), "sparsifier=topk", "aux_loss.weight=0.1").status == 0
    nested = {"aux_loss": {"weight": 0.1}, "sparsifier": {"name": "topk"}}
    before = state()
    run = sae_train.train(*changed(rows_run(tmp_path), f"runs={other / 'runs'}"), nested)
    assert state() == before
    (directory,) = (tmp_path / "runs").iterdir()
    assert run.path == other / "runs" / directory.name
    assert weights(other) == weights(tmp_path)
    theirs = json.loads((directory / "summary.json").read_text())["saes"]
    assert run.summary["saes"] == theirs


def test_a_run_shows_what_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*rows_run(tmp_path), {"grid": {"k": [3, 4], "optimizer": {"lr": [0.01]}}}]
    run = sae_train.train(*settings)
    first, second = run.summary["saes"]
    assert list(run.saes) == [first, second]
    assert len(run.saes) == 2
    x = torch.randn(3, 16)
    loaded = run.saes[second]
    assert run.saes[second] is loaded
    assert torch.equal(loaded(x), sae_train.load(run.path, second)(x))
    assert loaded.k == 4
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(run.metrics) == len(rows) > 2
    assert run.metrics["sae"].tolist() == [row["sae"] for row in rows]
    assert run.metrics["train/fvu"].dropna().tolist() == [row["train/fvu"] for row in rows if "train/fvu" in row]
    said = repr(run).splitlines()
    assert str(run.path) in said[0]
    assert [line.split(":")[0].strip() for line in said[1:]] == [first, second]
    assert all("L0 " in line and "FVU " in line and "(target " in line for line in said[1:])
    with pytest.raises(CheckpointError, match=r"has 2 SAEs\. Choose one with run\.saes\[NAME\]") as caught:
        _ = run.sae
    assert first in str(caught.value)
    with pytest.raises(KeyError, match="Did you mean"):
        run.saes[first[:-1]]
    capsys.readouterr()
    began = time.monotonic()
    again = sae_train.train(*settings)
    assert time.monotonic() - began < 2
    assert "already finished:" in capsys.readouterr().out
    assert again.summary == run.summary
    assert sae_train.Run(str(run.path)).summary == run.summary


def test_settings_are_the_same_as_typed() -> None:
    variants = [{"k": 16}, "sparsifier=topk k=24", {"sparsifier": {"name": "topk"}, "optimizer.lr": 1e-3}]
    given = [
        "k=32",
        {"harvest.lanes": 8, "harvest": {"context_length": 128}, "precision": "float64", "data": {"repeat": False}},
        {"grid": {"layer": ["residual", "mlp"], "layer.index": "every=2"}, "variants": variants, "name": None},
        {"optimizer": {"lr": 1e-05}, "nesting": "matryoshka", "nesting.prefixes": (0.25, 1), "runs": Path("a b")},
    ]
    typed = [
        "k=32", "harvest.lanes=8", "harvest.context_length=128", "precision=float64", "data.repeat=false",
        "grid={layer:[residual,mlp],layer.index:'every=2'}",
        "variants=['k=16','sparsifier=topk k=24','sparsifier=topk optimizer.lr=0.001']", "name=null",
        "optimizer.lr=1e-05", "nesting=matryoshka", "nesting.prefixes=[0.25,1]", "runs='a b'",
    ]  # fmt: skip
    assert settings_texts(given) == typed
    settings = [text for text in typed if not text.startswith(("grid", "variants", "k="))]
    assert compose_config(settings).optimizer.lr == 1e-5


TEXTS = [
    "1e3",
    "null",
    "true",
    "a,b",
    "a=b",
    'it\'s "so"',
    "a\\",
    " x ",
    "{a: 1}",
    "[1]",
    "$",
    "1_000",
    "a:b",
    "#",
    "\\'",
]


@pytest.mark.parametrize("texts", [TEXTS[:5], TEXTS[5:10], TEXTS[10:]])
def test_a_text_arrives_as_it_is(texts: list[str]) -> None:
    keys = ("id", "subset", "split", "text_column", "held_out_split")
    nested = {"data": "huggingface", **{f"data.{key}": text for key, text in zip(keys, texts, strict=True)}}
    data = compose_config(settings_texts([nested])).data
    assert [getattr(data, key) for key in keys] == texts


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        sae_train.train("k=16,32", {"harvest": {"lanez": 3}}, sparsifier="top_k")
    said = str(caught.value)
    assert "k=16,32: several values, and sae_train.train makes one run. Call it once for each value" in said
    assert "harvest.lanez=3: no such key. Did you mean 'harvest.lanes'?" in said
    assert "sparsifier=top_k: no such sparsifier. Did you mean 'topk'" in said
    for given, message in [
        (["k=8", {"k": 9}], "k is given 2 times"),
        ([{"k": object()}], "k: a object is no value of a setting"),
        ([{3: 4}, 5], r"5: a int is no setting"),
        ([{"harvest": {"lanes": 1}, "harvest.lanes": 2}], "harvest.lanes: is given twice"),
        (["dry_run=true"], "sae_train.train returns a run, and a plan makes none"),
        (["seed=range(0,3)"], "sae_train.train makes one run"),
    ]:
        with pytest.raises(sae_train.UserError, match=message):
            sae_train.train(*given)  # type: ignore[arg-type]


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a run of one process, and torchrun started 2"):
        sae_train.train()


def test_an_error_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    before = state()
    with pytest.raises(sae_train.UserError) as caught:
        sae_train.train(*changed(rows_run(tmp_path), f"harvest.path={tmp_path / 'nowhere'}"))
    assert "nowhere" in str(caught.value)
    assert state() == before
    assert not (tmp_path / "runs").exists()
    assert sae_train.train(*rows_run(tmp_path)).sae.n_features == 64


def test_stopped_saes(tmp_path: Path) -> None:
    """Where one is left the run is returned; where none is, the error has the reason."""
    diverges = {"k": 3, "optimizer.lr": 1e30, "optimizer.clip": 0}
    run = sae_train.train(*changed(rows_run(tmp_path))[:-1], runs=tmp_path / "two", variants=[{"k": 4}, diverges])
    stopped, kept = (next(name for name in run.summary["saes"] if f".k{k}." in name) for k in (3, 4))
    assert list(run.saes) == [kept]
    assert stopped not in run.saes
    with pytest.raises(KeyError, match="was stopped: "):
        run.saes[stopped]
    assert f"{stopped}: stopped: " in repr(run)
    alone = [*changed(rows_run(tmp_path), "k=3"), {k: v for k, v in diverges.items() if k != "k"}]
    for _ in range(2):  # it is final
        with pytest.raises(StoppedByNumbers, match=r"was stopped: [\s\S]*no SAE is left"):
            sae_train.train(*alone)
    (directory,) = (tmp_path / "runs").iterdir()
    assert sae_train.Run(directory).metrics is not None


def test_a_directory_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="holds no finished run"):
            sae_train.Run(path)


@pytest.mark.parametrize(("sent", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_a_stopped_run_goes_on_with_the_same_call(
    tmp_path: Path, sent: signal.Signals, kind: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(rows_run(tmp_path), *LONG)
    whole = sae_train.train(*changed(settings, f"runs={tmp_path / 'whole'}"))
    before = state()
    sender = when(has_rows(tmp_path), sent)
    with pytest.raises(kind, match=f"^stopped by {sent.name}: saved at step .*; the same call goes on"):
        sae_train.train(*settings)
    sender.join()
    assert state() == before
    assert list(tmp_path.glob("runs/*/checkpoints/step_*"))
    capsys.readouterr()
    run = sae_train.train(*settings)
    assert "resuming at step" in capsys.readouterr().out
    assert weights(tmp_path) == next(whole.path.glob("saes/*/sae.safetensors")).read_bytes()
    assert len(run.metrics) == len(whole.metrics)


def test_a_second_interrupt_is_not_waited_for() -> None:
    with signals.borrowed():
        signal.raise_signal(signal.SIGINT)
        assert signals.is_interrupt()
        assert signals.wish() == signals.SAVE
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals.wish() == signals.NONE
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the process's own handler is back


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A thread may train; a second call meanwhile is refused, whatever its run, and harms nothing."""
    settings, before = changed(rows_run(tmp_path), *LONG), state()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(sae_train.train(*settings)))
    thread.start()
    while not has_rows(tmp_path)():
        time.sleep(0.001)
    for other in (settings, changed(settings, "seed=1")):
        with pytest.raises(DirectoryInUse, match="another thread of this process is training"):
            sae_train.train(*other)
    assert thread.is_alive()
    thread.join()
    assert len(found[0].saes) == 1
    assert state() == before
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_users_hydra_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "mine.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(folder), version_base="1.2"):
        assert sae_train.train(*rows_run(tmp_path)).sae.k == 4
        with pytest.raises(ConfigError):
            sae_train.train("k=0")
        assert hydra.compose("mine").a == 1
        assert hydra.version.VersionBase.instance().getbase() == hydra.version._get_version("1.2")
    assert not GlobalHydra.instance().is_initialized()


def test_the_switches_of_torch_change_nothing(tmp_path: Path) -> None:
    settings = rows_run(tmp_path)
    plain = sae_train.train(*settings)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(mode=True)
    try:
        with torch.inference_mode(), torch.device("meta"):
            before = state()
            run = sae_train.train(*changed(settings, f"runs={tmp_path / 'other'}"))
            assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(mode=False)
    files = [next(each.path.glob("saes/*/sae.safetensors")) for each in (plain, run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_choices_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nk: 3\n")
    settings = [text for text in rows_run(tmp_path) if text != "k=4"]
    assert sae_train.train(*settings, experiment="mine", config_dir=tmp_path / "conf").sae.k == 3
