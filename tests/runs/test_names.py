"""Names that a run gives: cut to what file systems take, refused where a typed one cannot be, checked before a step."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_train.assets import model_directory
from sae_train.cli.compose import compose_config
from sae_train.cli.train import run_command
from sae_train.config.naming import LONGEST_NAME, shortened
from sae_train.errors import ConfigError
from sae_train.formats.native import find
from sae_train.sweeps.directory import SweepDirectory
from sae_train.training.run import name_of
from sae_train.training.run_directory import LONGEST_BELOW, RunDirectory
from tools.command_line import Command, changed
from tools.tiny_runs import rows_run, tiny_run

MOST = os.pathconf("/", "PC_PATH_MAX") - 1
USUAL = compose_config([])


@given(label=st.text() | st.integers(0, 400).map("m/\u00e9.".__mul__), n_features=st.integers(1, 10**15))
def test_every_name_that_is_made_is_short_enough(label: str, n_features: int) -> None:
    name = name_of(USUAL, [(USUAL.sae, label, n_features)], model="m")
    assert 0 < len(name.encode()) <= LONGEST_NAME
    assert f".mutual_choice.k32.f{n_features}.s0-" in name


def test_a_seed_of_many_digits_is_cut_too() -> None:
    names = [
        name_of(long, [(long.sae, "residual2", 64)], model="m")
        for long in (replace(USUAL, seed=10**200 + i) for i in (0, 1))
    ]
    assert all(len(name) <= LONGEST_NAME for name in names)
    assert names[0] != names[1]


@given(text=st.text(max_size=300), longest=st.integers(20, 200))
def test_a_name_that_is_cut_fits_and_one_that_fits_stays(text: str, longest: int) -> None:
    cut = shortened(text, longest)
    assert len(cut.encode()) <= longest
    assert (cut == text) == (len(text.encode()) <= longest)


def test_names_that_begin_alike_stay_apart() -> None:
    assert shortened("a" * 200) != shortened("a" * 201)


LONG, WIDE = "n" * (LONGEST_NAME + 1), "\u00e9" * 60
REFUSED = {
    LONG: f"name={LONG}: 120 bytes long, and the name of a directory may have 119. Shorten it.",
    WIDE: f"name={WIDE}: 120 bytes long, and the name of a directory may have 119. Shorten it.",
    f"group/{LONG}": "120 bytes long",
    "..": "not a directory below the one that runs= names",
    "a/../../b": "not a directory below the one that runs= names",
    "/tmp/elsewhere": "not a directory below the one that runs= names",
    "a//b": "not a directory below the one that runs= names",
    "a\nb": r"name='a\nb': holds control characters, or bytes that are not UTF-8",
    "a\udcff": r"name='a\udcff': holds control characters, or bytes that are not UTF-8",
}


def test_a_typed_name_that_cannot_be_is_refused() -> None:
    for name, reason in REFUSED.items():
        with pytest.raises(ConfigError) as caught:
            replace(USUAL, name=name)
        assert reason in str(caught.value)


def test_a_typed_name_that_can_be_is_kept() -> None:
    for name in ("n" * LONGEST_NAME, WIDE[1:], "group/mine", "a b", "\u65e5\u672c", "a\u200cb"):
        assert name_of(replace(USUAL, name=name), [(USUAL.sae, "residual2", 64)], model="m") == name


def of_length(folder: Path, length: int) -> Path:
    """Return a path below `folder` of so many bytes, with names that every file system takes."""
    left = length - len(os.fsencode(folder))
    sizes = [100] * (left // 101) + ([left % 101 - 1] if left % 101 > 1 else [])
    path = folder.joinpath(*("d" * size for size in sizes))
    return path if len(os.fsencode(path)) == length else path.with_name(path.name + "d")


def test_a_directory_whose_files_would_have_paths_too_long_is_refused(tmp_path: Path) -> None:
    most = MOST - 1 - max(LONGEST_BELOW.values())
    fits, does_not = of_length(tmp_path, most), of_length(tmp_path, most + 1)
    RunDirectory(fits).check_length()
    with pytest.raises(ConfigError, match=rf"a path of {most + 1} bytes.*takes {MOST} in all.*runs=DIR"):
        RunDirectory(does_not).check_length()
    with pytest.raises(ConfigError, match="256 bytes, and file systems take 255"):
        RunDirectory(tmp_path / ("d" * 256) / "run").check_length()
    with pytest.raises(ConfigError, match="a path of"):
        SweepDirectory.made(of_length(tmp_path, MOST - 80), [["k=1"]])


def test_paths_of_files_are_checked_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = changed(rows_run(tmp_path), f"runs={of_length(tmp_path, 3990)}")
    for more in ((), ("dry_run=true",)):
        assert run_command([*typed, "name=mine", *more]) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert "Choose a shorter directory with runs=DIR" in stderr
        assert len(stderr) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.slow
def test_a_run_whose_paths_just_fit_finishes(command: Command, tmp_path: Path) -> None:
    runs = of_length(tmp_path, MOST - 1 - max(LONGEST_BELOW.values()) - len("/mine"))
    outcome = command(*changed(rows_run(tmp_path), f"runs={runs}", "tracking=wandb"), "name=mine")
    assert outcome.status == 0, outcome.stderr
    assert (runs / "mine" / "summary.json").exists()


@pytest.mark.slow
def test_a_model_of_a_long_path_is_trained_and_exported(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / ("m" * 130) / ("\u00e9" * 60)
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(model_directory())
    typed = ["model=huggingface", f"model.id='{folder / 'model'}'", "tokens=2048", "log_every=2048"]
    outcome = command(*changed(tiny_run(tmp_path), *typed))
    assert outcome.status == 0, outcome.stderr
    (run,) = (tmp_path / "runs").iterdir()
    exported = find(run)
    assert all(len(os.fsencode(each)) <= LONGEST_NAME for each in (run.name, exported.name))
