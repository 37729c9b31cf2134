"""`sae-export`: the files of a run's SAEs in a foreign format, their records, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import sae_train
from sae_train.cli.export import run_command
from sae_train.cli.export_help import descriptions
from sae_train.formats.card_loading import LOADERS, TITLES
from sae_train.formats.registry import FORMATS, formats_that_hold
from tools.command_line import changed
from tools.exports import write_sae
from tools.hub_client import digest
from tools.tiny_runs import rows_run

TRAIN = """
import sys
from sae_train.cli.train import run_command
for arguments, status in zip(sys.argv[1:3], (0, 3)):
    assert run_command(arguments.split("\\n")) == status
"""
ONE, OTHER, STOPPED = (f"tensors.{name}.f64.s0" for name in ("mutual_choice.k4", "topk.k4", "mutual_choice.k3"))


pytestmark = pytest.mark.filterwarnings("ignore:saelens. (layer|site|model)")


class Runs(NamedTuple):
    """Finished runs on activation files."""

    one: Path
    """With the SAE `ONE`."""
    three: Path
    """With `ONE`, `OTHER`, and `STOPPED`, which diverged."""


class Said(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    settings = changed(rows_run(folder), "tokens=1024", "log_every=256")
    three = 'variants=["","sparsifier=topk","k=3 optimizer.lr=1e30"]'
    arguments = ["\n".join([*settings, "name=one"]), "\n".join([*settings, "name=three", three])]
    done = subprocess.run([sys.executable, "-c", TRAIN, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Runs(folder / "runs" / "one", folder / "runs" / "three")


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]):
    """Return `export(*arguments)`: `sae-export` in this process."""

    def run(*arguments: object) -> Said:
        status = run_command([str(each) for each in arguments])
        return Said(status, *capsys.readouterr())

    return run


def record_of(directory: Path) -> dict:
    return json.loads((directory / "sae_train.json").read_text())


def test_the_only_sae_of_a_run_goes_straight_into_the_directory(runs: Runs, export, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(runs.one, "--to", "saelens", "--out", out)
    assert (done.status, done.stderr) == (0, "")
    assert {path.name for path in out.iterdir()} == {"cfg.json", "sae_weights.safetensors", "sae_train.json"}
    assert done.stdout.splitlines()[-1] == f"1 SAE as saelens to {out}"
    original = sae_train.load(runs.one)
    with pytest.warns(UserWarning, match="model 'unknown'"):
        loaded = sae_train.load(out)
    assert digest(loaded) == digest(original)
    assert loaded.config["figures"] == original.config["figures"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # all of them as the user's umask has it


def test_an_export_of_activations_from_files_is_of_an_unknown_model_and_says_so(
    runs: Runs, export, tmp_path: Path
) -> None:
    done = export(runs.one, "--to", "saelens", "--out", tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("unknown", "blocks.0.hook_resid_post")
    record = record_of(tmp_path / "out")
    assert (record["model"], record["layer"], record["site"]) == ("unknown", 0, "residual")
    assert [sentence.split(":")[0] for sentence in record["assumed"]] == ["model 'unknown'", "layer 0", "site residual"]
    for sentence in record["assumed"]:
        assert f"assumed: {sentence}\n" in done.stdout


def test_what_the_user_gives_replaces_what_is_assumed_and_stays(runs: Runs, export, tmp_path: Path) -> None:
    given = ["--model", "org/model", "--layer", "5", "--site", "mlp"]
    done = export(runs.one, "--to", "saelens", "--out", tmp_path / "a", *given)
    assert "assumed" not in done.stdout
    again = export(tmp_path / "a", "--to", "saelens", "--out", tmp_path / "b")  # from an export, without the flags
    assert "assumed" not in again.stdout
    for name in ("a", "b"):
        metadata = json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["hook_name"]) == ("org/model", "blocks.5.hook_mlp_out")
        record = record_of(tmp_path / name)
        assert (record["model"], record["layer"], record["site"], record["assumed"]) == ("org/model", 5, "mlp", [])
    assert record_of(tmp_path / "a") == record_of(tmp_path / "b")


def test_the_record_holds_how_the_sae_was_trained(runs: Runs, export, tmp_path: Path) -> None:
    export(runs.three, "--to", "saelens", "--out", tmp_path / "out")
    config = yaml.safe_load((runs.three / "config.yaml").read_text())
    summary = json.loads((runs.three / "summary.json").read_text())
    for name, sparsifier in ((ONE, "mutual_choice"), (OTHER, "topk")):
        record, figures = record_of(tmp_path / "out" / name), summary["saes"][name]
        assert {key: record[key] for key in ("l0", "fvu", "dead_fraction")} == {
            key: figures[key] for key in ("l0", "fvu", "dead_fraction")
        }
        assert (record["name"], record["tokens"], record["seed"]) == (name, 1024, 0)
        assert record["data"] == config["source"]["data"]
        limit = record["sae"]["normalisation"]["outlier_limit"]
        assert record["filters"] == {"outlier_limit": limit, "share_over_limit": 0.0, "over_limit": "left out"}
        assert record["config"]["sparsifier"]["name"] == sparsifier
        assert record["config"]["tokens"] == 1024
        assert record["plan"]["n_features"] == 64
        assert record["run"] == config["provenance"]
        assert record["sae_train_version"] == sae_train.__version__


def test_several_saes_go_into_folders_and_the_stopped_one_is_left_out(runs: Runs, export, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export(runs.three, "--to", "saelens", "--out", out)
    assert done.status == 0, done.stderr
    assert f"{STOPPED} was stopped and is left out: loss is " in done.stdout
    assert done.stdout.splitlines()[-1] == f"2 SAEs as saelens to {out}"
    assert {path.name for path in out.iterdir()} == {ONE, OTHER, "suite.json"}
    suite = json.loads((out / "suite.json").read_text())
    assert {entry["name"]: entry["path"] for entry in suite} == {ONE: ONE, OTHER: OTHER}
    for name in (ONE, OTHER):
        assert digest(sae_train.load(out, name)) == digest(sae_train.load(runs.three, name))


def test_one_of_several_is_chosen_by_its_name_or_its_directory(runs: Runs, export, tmp_path: Path) -> None:
    assert export(runs.three, "--sae", OTHER, "--to", "saelens", "--out", tmp_path / "a").status == 0
    assert export(runs.three / "saes" / OTHER, "--to", "saelens", "--out", tmp_path / "b").status == 0
    assert record_of(tmp_path / "a") == record_of(tmp_path / "b")
    refused = export(runs.three, "--sae", STOPPED, "--to", "saelens", "--out", tmp_path / "c")
    assert refused.status == 2
    assert f"its SAE {STOPPED} was stopped, so there is nothing to export: loss is" in refused.stderr
    refused = export(runs.three, "--sae", "topk", "--to", "saelens", "--out", tmp_path / "c")
    assert (refused.status, "holds no SAE 'topk'" in refused.stderr) == (2, True)
    assert not (tmp_path / "c").exists()


def test_an_sae_of_an_export_has_its_folder_and_its_name_in_the_run(runs: Runs, export, tmp_path: Path) -> None:
    export(runs.three, "--to", "saelens", "--out", tmp_path / "a")
    (tmp_path / "a" / OTHER).rename(tmp_path / "a" / "moved")
    assert digest(sae_train.load(tmp_path / "a", OTHER)) == digest(sae_train.load(tmp_path / "a", "moved"))
    done = export(tmp_path / "a", "--to", "saelens", "--out", tmp_path / "b")
    assert done.status == 0, done.stderr
    assert {path.name for path in (tmp_path / "b").iterdir()} == {ONE, OTHER, "suite.json"}


def test_a_run_that_is_not_finished_is_refused(runs: Runs, export, tmp_path: Path) -> None:
    for name in ("config.yaml", "suite.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes((runs.three / name).read_bytes())
    refused = export(tmp_path / "run", "--to", "saelens", "--out", tmp_path / "out")
    assert refused.status == 2
    assert "the run in it is not finished, or files of it are missing. Finish it with its own command" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_with_anything_else_is_left_alone(runs: Runs, export, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(runs.one, "--to", "saelens", "--out", out, "--card").status == 0
    assert export(runs.one, "--to", "saelens", "--out", out).status == 0  # replaces it
    assert not (out / "README.md").exists()
    before = contents(out)
    refused = [export(runs.three, "--to", "saelens", "--out", out), export(runs.one, "--card", "--out", out)]
    (out / "notes.txt").write_text("mine")
    refused.append(export(runs.one, "--to", "saelens", "--out", out))
    (out / "notes.txt").unlink()
    (tmp_path / "file").write_text("mine")
    refused.append(export(runs.one, "--to", "saelens", "--out", tmp_path / "file"))
    refused.append(export(runs.one, "--to", "saelens", "--out", runs.three))
    for each in refused:
        assert each.status == 2
        assert re.search(r"--out \S+: (holds something else than an earlier export|is a file)", each.stderr)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("inference", ["threshold", "topk"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_writes_what_it_holds_and_names_others_for_the_rest(
    export, tmp_path: Path, name: str, inference: str
) -> None:
    sae = write_sae(tmp_path / "sae", inference=inference)
    done = export(tmp_path / "sae", "--to", name, "--out", tmp_path / "out", "--layer", "2")
    reason = FORMATS[name].refusal(sae)
    assert (done.status == 0) == (reason is None), done.stderr
    assert (tmp_path / "out").exists() == (reason is None)
    if reason is not None:
        assert f"--to {name}: cannot hold sae exactly: {reason}" in done.stderr
        assert f"Formats that can: {', '.join(formats_that_hold(sae))}." in done.stderr


def test_openai_is_always_refused(export, tmp_path: Path) -> None:
    write_sae(tmp_path / "sae")
    done = export(tmp_path / "sae", "--to", "openai", "--out", tmp_path / "out")
    assert done.status == 2
    assert "saelens" in done.stderr
    assert not (tmp_path / "out").exists()


WRONG = {
    "": "RUN is missing. Give a run's directory, an SAE or hf://ORG/NAME.",
    "run --out x": "--to FORMAT is missing. Known: ",
    "run --to saelens": "--out DIR is missing.",
    "run --to saelnes --out x": "--to saelnes: no such format. Did you mean 'saelens'?",
    "run --to": "--to: needs a value. `sae-export --help` lists the flags.",
    "run --too saelens --out x": "--too: no such flag. Did you mean '--to' or '--out'?",
    "run other --to saelens --out x": "other: a second RUN, or the value of a flag that takes none. Give one RUN.",
    "run --to saelens --out x --layer -1": "--layer -1: not a block. Give a whole number, from 0.",
    "run --to saelens --out x --layer 1.5": "--layer 1.5: not a block. Give a whole number, from 0.",
    "run --to saelens --out x --site resid": "--site resid: no such kind of site. Did you mean 'residual'?",
    "run --verify=yes": "--verify=yes: takes no value. Write --verify.",
    "run --push name": "--push name: not an id on the Hugging Face Hub. Write ORG/NAME.",
    "run --to saelens --out x --private": "--private: of the repository of --push.",
    "run --to saelens --out x --license mit": "--license: of the model card. Remove it, or add --card.",
    "nowhere --to saelens --out x": "nowhere: no such file or directory. Give a run, an export, or hf://ORG/NAME.",
    "hf://name --to saelens --out x": "hf://name: not an address on the Hub.",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_argument_ends_with_status_2_and_a_message(
    export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = export(*arguments.split())
    assert (done.status, done.stdout) == (2, "")
    assert WRONG[arguments] in done.stderr
    assert "usage:" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sae", "a", "--sae", "b"], "--sae: given 2 times"),
        (["--model="], "--model: has no value"),
        (["--out", "", "--model", "m"], "--out: has no value"),
    ],
)
def test_a_flag_that_is_repeated_or_empty_is_named(export, tmp_path: Path, flags: list[str], message: str) -> None:
    write_sae(tmp_path / "sae")
    out = [] if "--out" in flags else ["--out", tmp_path / "out"]
    done = export(tmp_path / "sae", "--to", "saelens", *out, *flags)
    assert (done.status, list(tmp_path.iterdir())) == (2, [tmp_path / "sae"])
    assert message in done.stderr


def test_help_lists_the_formats_and_needs_no_torch(export) -> None:
    assert descriptions() == {name: each.HOLDS for name, each in FORMATS.items()}
    shown = export("--help").stdout
    assert all(
        re.search(rf"^  {name} +{re.escape(each.HOLDS[:40])}", shown, re.MULTILINE) for name, each in FORMATS.items()
    )
    program = (
        "import sys; from sae_train.cli.export import run_command; assert run_command(['--help']) == 0; "
        "assert not {'torch', 'numpy', 'huggingface_hub', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_model_card_can_be_read_by_the_hub_and_its_code_runs(runs: Runs, export, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = tmp_path / "out"
    done = export(runs.three, "--to", "saelens", "--out", out, "--card", "--license", "mit", "--model", "org/model")
    assert done.status == 0, done.stderr
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("saelens", "mit", "org/model")
    assert {"sparse-autoencoder", "interpretability", "mutual-choice", "topk"} <= set(card.data.tags)
    assert all(name in card.text for name in (ONE, OTHER, "2411.02124", "2406.04093"))
    loading = re.search(r"### sae-train\n+```python\n(.*?)```", card.text, re.DOTALL)
    assert loading is not None
    names = {"x": torch.randn(5, 16)}
    exec(loading[1].replace("DIR", str(out)), names)
    assert names["reconstruction"].shape == (5, 16)
    peers = [name for name in formats_that_hold(sae_train.load(runs.three, ONE)) if name in LOADERS]
    assert sum(f"### {title}\n" in card.text for title in TITLES.values()) == min(2, len(peers))
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        compile(code, "card", "exec")


def test_a_card_states_what_is_known_and_no_more(export, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    write_sae(tmp_path / "sae")
    done = export(tmp_path / "sae", "--out", tmp_path / "out", "--card")
    assert "the model card states no licence: --license gives one." in done.stdout
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("sae_train", "other", None)
    assert "an unknown model" in card.text
    assert "| FVU | 0.2500 | sum " in card.text
    assert "| dead | 12.50% | share of the features" in card.text
    assert "CE recovered | 90.00%" in card.text
    assert "--model" not in card.text
