"""A wrong argument ends with status 2 and one clear message, before anything heavy is imported."""

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_train.cli.train import run_command
from sae_train.config import RunConfig
from sae_train.errors import DataError, StoppedByNumbers
from sae_train.sweeps.outcome import VARIABLE, read_outcome
from tools.command_line import Command

Complaint = Callable[..., list[str]]


def train(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int]) -> None:
    """Put `run` in the place of training.run.run."""
    module = types.ModuleType("sae_train.training.run")
    module.run = run
    monkeypatch.setitem(sys.modules, "sae_train.training.run", module)


@pytest.fixture(autouse=True)
def _nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: RunConfig, *, overrides: list[str], **_: object) -> int:
        raise AssertionError(f"{overrides} was to be refused and started a run")

    train(monkeypatch, run)


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Return `complaint(*arguments)`: the lines of the message with which they are refused."""

    def refused(*arguments: str) -> list[str]:
        assert run_command(list(arguments)) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert "Traceback" not in stderr
        return stderr.splitlines()

    return refused


MESSAGES = {
    "kk=3": "kk=3: no such key. Did you mean 'k'?",
    "optim.lrr=3": "optim.lrr=3: no such key. Did you mean 'optimizer.lr'?",
    "lr=3": "lr=3: no such key. Did you mean 'optimizer.lr'?",
    "batch_size=3": "batch_size=3: no such key. Did you mean 'batch_tokens'?",
    "foo.bar=3": "foo.bar=3: no such key. `sae-train --help` lists the keys.",
    "harvest.x=3": "harvest.x=3: no such key. Known: harvest.calibration_tokens, harvest.context_length, "
    "harvest.contexts_per_forward, harvest.lanes, harvest.pool_batches, harvest.prefetch.",
    "k.deep=3": "k.deep=3: no such key. `sae-train --help` lists the keys.",
    "sparsifier=mutual_chioce": "sparsifier=mutual_chioce: no such sparsifier. Did you mean 'mutual_choice'?",
    "sparsifer=topk": "sparsifer=topk: no such key. Did you mean 'sparsifier'?",
    "sparsifier@x=topk": "sparsifier@x=topk: no such key. Did you mean 'sparsifier'?",
    "aux_loss=null": "aux_loss=null: no such aux_loss. Known: aux_k, aux_zipf, none.",
    "sparsifier={a:1}": "sparsifier={a:1}: no such sparsifier. Known: batch_topk, feature_choice, gated, gradient, "
    "jumprelu, jumprelu_gemma_scope, mutual_choice, p_anneal, relu, temporal_mask, topk.",
    "experiment=mine": "experiment=mine: no such experiment. Known: batch_topk_gpt2, gemma_scope_2b, llama_scope_8b, "
    "saebench_pythia_160m, suite.",
    "+k=3": "+k=3: '+' cannot add keys here. Write k=3.",
    "+kk=3": "+kk=3: '+' cannot add keys here, and there is no such key. Did you mean 'k'?",
    "++k=3": "++k=3: '++' cannot add keys here. Write k=3.",
    "~k": "~k: '~' cannot remove keys here, every one is needed. Remove it.",
    "mutual_choice": "mutual_choice: not of the form key=value. Did you mean 'sparsifier=mutual_choice'?",
    "k": "k: not of the form key=value.",
    "k=": "k=: not a finite number.",
    "k=abc": "k=abc: not a finite number.",
    "k=null": "k=null: sparsifier=mutual_choice needs a k. Give a number.",
    "k=nan": "k=nan: not a finite number.",
    "k=true": "k=true: not a finite number.",
    "tokens=5e6": "tokens=5e6: not a whole number. Write tokens=5000000.",
    "tokens=1.5": "tokens=1.5: not a whole number.",
    "n_features=many": "n_features=many: not a whole number or null.",
    "dry_run=maybe": "dry_run=maybe: not true or false.",
    "name=[a]": "name=[a]: not text or null.",
    "n_features=${nope}": "n_features: Interpolation key 'nope' not found.",
    "name=a=b": """name=a=b: cannot be read. Put the value in quotes, and these in the shell's: "name='a=b'".""",
    "k=16,32": "k=16,32: several values. Add -m to make a run for each, or write \"k='16,32'\" for one text.",
    "k=-1": "k=-1: must be positive.",
    "k=64 n_features=32": "k=64: larger than n_features=32. Lower k or raise n_features.",
    "k=3 k=4": "k=3 k=4: k is given 2 times. Keep one.",
    "batch_tokens=1000 harvest.lanes=64": "batch_tokens=1000 over harvest.lanes=64: not divisible. Nearest "
    "batch_tokens: 960 or 1024. harvest.lanes=null takes the largest divisor up to 64.",
    "harvest.lanes=64 harvest.pool_batches=8 harvest.contexts_per_forward=64": "harvest.pool_batches=8: a lane's pool "
    "holds 256 tokens, and half of it must hold one forward pass of 8192 (contexts_per_forward x context_length). "
    "Lower harvest.contexts_per_forward to 1, or raise harvest.pool_batches to 512; null chooses it.",
    "expansion=3 n_features=100": "expansion=3: n_features=100 is the width already, so this would change nothing. "
    "Keep one.",
    "aux_loss=aux_zipf aux_loss.tau=0 aux_loss.exponent=2": "aux_loss.exponent=2: says which features are underused, "
    "and only dead ones count at aux_loss.tau=0, so this would change nothing. Remove it, or raise aux_loss.tau.",
    "aux_loss=aux_zipf aux_loss.tau=0.0 aux_loss.shift=3": "aux_loss.shift=3: says which features are underused, "
    "and only dead ones count at aux_loss.tau=0, so this would change nothing. Remove it, or raise aux_loss.tau.",
    "sparsifier.revival=0.5 optimizer.decay_tokens=0": "sparsifier.revival=0.5: acts while the learning rate decays, "
    "and it never does at optimizer.decay_tokens=0, so this would change nothing. Remove it, or raise "
    "optimizer.decay_tokens.",
    "sparsifier=p_anneal sparsifier.end=1 sparsifier.changes=5": "sparsifier.changes=5: says how p falls, and it never "
    "does at sparsifier.end=1, so this would change nothing. Remove it, or lower sparsifier.end.",
    "sparsifier=p_anneal sparsifier.start=1 sparsifier.end=0.5": "sparsifier.end=0.5: says how p falls, and it never "
    "does at sparsifier.start=1, so this would change nothing. Remove it, or lower sparsifier.start.",
    "sparsifier=feature_choice sparsifier.after=1": "sparsifier.after=1: leaves no tokens to budget=uniform, so "
    "nothing would read it. Lower it, or choose sparsifier=mutual_choice.",
    "sparsifier=topk sparsifier.after=0.5": "sparsifier.after=0.5: sparsifier=topk has no 'after', so this would "
    "change nothing. Remove it, or choose sparsifier=feature_choice.",
    "sparsifier.name=topk": "sparsifier.name=topk: says which choice this is and does not change it. "
    "Write sparsifier=topk.",
    "budget.anneal=0.5": "budget.anneal=0.5: no budget.start_k to fall from. Give one or remove this.",
    "budget=zipf": "budget=zipf: only feature_choice splits its budget over features, so sparsifier=mutual_choice "
    "would never read it. Remove it or choose sparsifier=feature_choice.",
    "sparsifier=feature_choice budget=pooled": "budget=pooled: feature_choice splits its budget over features. "
    "Choose budget=uniform or zipf.",
    "model=huggingface": "model.id is required with model=huggingface: a Hub id such as Qwen/Qwen3-0.6B, or a local "
    "directory in Hugging Face layout. Add model.id=...",
    "harvest=tensors": "harvest.path is required with harvest=tensors: a directory of *.safetensors files, each with "
    "a tensor 'activations' [n, d_model]. Add harvest.path=...",
    "harvest=tensors harvest.path=": "harvest.path=: empty. Give it a value or remove it.",
    "name=": "name=: empty. Give it a value, write null, or remove it.",
    "layer=module": "layer.path is required with layer=module: a dotted name of model.named_modules(), such as "
    "transformer.h.3.ln_2. Add layer.path=...",
    "harvest=tensors harvest.path=x model=gpt2": "model=gpt2: harvest=tensors reads no language model and no text, so "
    "this would change nothing. Remove it.",
    "model.id=gpt2": "model.id=gpt2: model=bundled is the language model inside the package. Add model=huggingface for "
    "one of your own.",
    "data.id=x": "data.id=x: data=bundled is the corpus inside the package. Add data=files for text of your own, or "
    "data=huggingface for a dataset of the hub.",
    "hydra.run.dir=x": "hydra.run.dir=x: this program makes its runs itself, so this would change nothing. Remove it.",
    "--k=3": "--k=3: settings take no dashes. Write k=3.",
    "--dry-run": "--dry-run: no such flag. `sae-train --help` lists them.",
    "--config-dir nowhere": "--config-dir=nowhere: no such directory.",
    "-m --cfg job": "--multirun: --cfg and --info show one configuration. Remove it.",
    "-m k=interval(1,2)": "k=interval(1,2): a sweep needs its values one by one, as in k=16,32.",
}
"""The typed arguments, and the whole message."""


@pytest.mark.parametrize("typed", MESSAGES)
def test_the_message_says_what_is_wrong_and_what_to_do(complaint: Complaint, typed: str) -> None:
    assert complaint(*typed.split()) == [MESSAGES[typed]]


@pytest.mark.parametrize("typed", ["harvest=store", "objective=transcoder", "sweep=wide"])
def test_what_is_promised_for_later_is_refused_by_name(complaint: Complaint, typed: str) -> None:
    (line,) = complaint(typed)
    assert line.replace(" ", "").startswith(f"{typed}:")
    assert "not built yet" in line


def test_all_independent_errors_are_reported_at_once(complaint: Complaint) -> None:
    typed = ["sparsifier=mutual_chioce", "optim.lrr=3", "k=-3", "tokens=5e6", "variants=[]", "spar", "seed=-1"]
    lines = complaint(*typed, "model=huggingface")
    assert sorted(line.partition(":")[0].split()[0] for line in lines) == sorted([*typed, "model.id"])


def test_a_wrong_value_brings_no_complaints_about_the_default_in_its_place(complaint: Complaint) -> None:
    assert complaint("batch_tokens=abc", "harvest.lanes=48") == ["batch_tokens=abc: not a whole number."]
    (line,) = complaint("sparsifier=feature_chioce", "budget=zipf", "sparsifier.after=0.5")
    assert line.startswith("sparsifier=feature_chioce: no such sparsifier.")


def test_every_point_of_a_sweep_is_checked_before_the_first_begins(complaint: Complaint) -> None:
    assert sorted(complaint("-m", "sparsifier=topk,mutual_chioce,feature_choice", "k=16,-3,x")) == [
        "k=-3: must be positive.",
        "k=x: not a finite number.",
        "sparsifier=mutual_chioce: no such sparsifier. Did you mean 'mutual_choice'?",
    ]


def test_a_broken_yaml_of_the_users_is_their_error(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name, text in {"typo": "kk: 3", "type": "k: abc", "syntax": "k: ["}.items():
        (tmp_path / f"experiment/{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    assert complaint("--config-dir", str(tmp_path), "experiment=typo") == [
        "In 'experiment/typo': ConfigKeyError raised while composing config: Key 'kk' not in 'RunConfig'."
    ]
    (line,) = complaint("--config-dir", str(tmp_path), "experiment=type")
    assert line.startswith("In 'experiment/type':")
    assert "'abc'" in line
    (line,) = complaint("--config-dir", str(tmp_path), "experiment=syntax")
    assert "syntax.yaml" in line
    assert complaint("--config-dir", str(tmp_path), "experiment=typos")[0].endswith("Did you mean 'typo' or 'type'?")


def test_refusing_imports_nothing_heavy() -> None:
    program = (
        "import sys; from sae_train.cli.train import run_command; status = run_command(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'accelerate', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    for arguments, status in ((["kk=3"], 2), (["--help"], 0), (["--version"], 0), (["--cfg", "job"], 0)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert (done.stderr != "") == (status == 2)


def test_flags_and_settings_may_be_mixed(command: Command) -> None:
    outcome = command("k=3", "--cfg", "job", "seed=2")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("k: 3.0\n")
    assert "\nseed: 2\n" in outcome.stdout


def test_a_refused_command_leaves_nothing_behind(command: Command, tmp_path: Path) -> None:
    outcome = command("kk=3")
    assert outcome == (2, "", "kk=3: no such key. Did you mean 'k'?\n")
    assert command("-m", "k=0,1").status == 2
    assert command("--cfg", "job").status == 0
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """A stand-in for training.run that records the calls and ends each k as `outcomes` has it: a status or an error."""

    def __init__(self, **outcomes: object) -> None:
        self.outcomes, self.asked = outcomes, list[float]()

    def run(self, config: RunConfig, *, overrides: list[str], **_: object) -> int:
        assert f"k={config.k:g}" in overrides
        self.asked.append(config.k)
        outcome = self.outcomes.get(f"k{config.k:g}", 0)
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, int)
        return outcome


def sweep(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> int:
    train(monkeypatch, recorder.run)
    return run_command(["-m", "k=1,2,3,4", "seed=5"])


def test_a_sweep_goes_on_after_a_point_that_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(k2=DataError("data.id=x: no such file."), k3=StoppedByNumbers("the loss is nan at step 3."))
    assert sweep(monkeypatch, recorder) == 3
    assert recorder.asked == [1, 2, 3, 4]
    said = capsys.readouterr().err.splitlines()
    assert "run 2 of 4 (k=2): data.id=x: no such file." in said
    assert "run 3 of 4 (k=3): the loss is nan at step 3." in said
    assert said[-1] == "Not finished: run 2 of 4 (k=2); run 3 of 4 (k=3)."


def test_a_sweep_goes_on_after_a_point_whose_saes_were_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(VARIABLE, str(outcome))
    recorder = Recorder(k2=3)
    assert sweep(monkeypatch, recorder) == 3
    assert recorder.asked == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert "Not finished" not in said
    assert said.splitlines()[-1] == "Finished, with SAEs that were stopped by the numbers: run 2 of 4 (k=2)."
    kept = read_outcome(outcome)
    assert kept is not None
    assert (kept.state, kept.status) == ("stopped", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert sweep(monkeypatch, Recorder(k2=3)) == 3
    capsys.readouterr()
    train(monkeypatch, Recorder(k2=3).run)
    assert run_command(["k=2"]) == 3
    assert capsys.readouterr().err == ""  # the run itself reports its SAEs


def test_a_sweep_ends_with_2_when_a_point_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep(monkeypatch, Recorder(k4=DataError("no."))) == 2


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("ours"), MemoryError(), RecursionError("deep"), OSError(5, "Input/output error")]
)
def test_a_sweep_goes_on_after_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception
) -> None:
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(VARIABLE, str(outcome))
    recorder = Recorder(k2=error)
    assert sweep(monkeypatch, recorder) == 1
    assert recorder.asked == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("Traceback (most recent call last):") == 1
    assert type(error).__name__ in said
    assert "\nrun 2 of 4 (k=2): failed with the error above, which is a fault of this program.\n" in said
    assert said.splitlines()[-1] == "Not finished: run 2 of 4 (k=2)."
    kept = read_outcome(outcome)
    assert kept is not None
    assert (kept.state, kept.status) == ("failed", 1)
    assert f"run 2 of 4 (k=2): {type(error).__name__}" in str(kept.message)


def test_an_error_of_ours_ends_a_single_run_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, Recorder(k1=ZeroDivisionError("ours")).run)
    with pytest.raises(ZeroDivisionError):
        run_command(["k=1"])


def test_a_sweep_stops_where_it_is_preempted_or_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(k2=75)
    assert sweep(monkeypatch, recorder) == 75
    assert recorder.asked == [1, 2]
    recorder = Recorder(k1=ZeroDivisionError("ours"), k2=KeyboardInterrupt())
    assert sweep(monkeypatch, recorder) == 130
    assert recorder.asked == [1, 2]


def test_several_ranks_stop_at_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    recorder = Recorder(k2=DataError("no."))
    assert sweep(monkeypatch, recorder) == 2
    assert recorder.asked == [1, 2]
    recorder = Recorder(k2=ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        sweep(monkeypatch, recorder)
    assert recorder.asked == [1, 2]


def test_one_rank_speaks_for_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sae_train.cli.process.FIRST_RANK_SPEAKS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(["kk=3"]) == 2
        assert (capsys.readouterr().err != "") == (rank == "0")
    assert sweep(monkeypatch, Recorder(k1=DataError("only here."))) == 2
    assert capsys.readouterr().err == "rank 1: run 1 of 4 (k=1): only here.\n"


@pytest.mark.parametrize("swept", ["k=glob(*)", "name=glob(*)"])
def test_a_sweep_of_nothing_is_refused(swept: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["-m", swept, "dry_run=true"]) == 2
    assert f"{swept}: nothing that there is matches" in capsys.readouterr().err
