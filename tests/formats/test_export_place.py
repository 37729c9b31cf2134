"""The directory of an export: links, the current directory, permissions, and what a kill leaves."""

import json
from pathlib import Path

import pytest

import sae_train
from sae_train.cli.export import run_command
from sae_train.errors import CheckpointError
from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Opened
from sae_train.formats.registry import FORMATS
from tools.exports import write_sae
from tools.foreign_files import open_folder, without_privileges
from tools.random_sae import manifest_of, random_sae

pytestmark = pytest.mark.filterwarnings("ignore:.*(model|layer|site)")


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return the files, links and directories below a directory; links are marked by their targets."""
    found: dict[str, bytes | None] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = str(path.readlink()).encode()
        else:
            found[str(path.relative_to(directory))] = path.read_bytes() if path.is_file() else None
    return found


def exported(sae: Path, out: Path | str) -> int:
    return run_command([str(sae), "--to", "saelens", "--out", str(out)])


def test_a_link_stays_and_its_directory_is_filled(tmp_path: Path) -> None:
    write_sae(tmp_path / "sae")
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    for _ in range(2):  # the second replaces the first
        assert exported(tmp_path / "sae", tmp_path / "link") == 0
        assert (tmp_path / "link").readlink() == Path("disk/real")
        assert sae_train.load(tmp_path / "disk" / "real").n_features == 48
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "sae"]
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("out", [".", "..", "/", "../here"])
def test_the_current_directory_is_not_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae(tmp_path / "sae")
    (tmp_path / "around" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "around" / "here")
    before = contents(tmp_path)
    assert exported(tmp_path / "sae", out) == 2
    assert "--out " in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert exported(tmp_path / "sae", "below") == 0


def test_a_link_is_something_else(tmp_path: Path) -> None:
    write_sae(tmp_path / "sae")
    assert exported(tmp_path / "sae", tmp_path / "out") == 0
    (tmp_path / "out" / "data").symlink_to(tmp_path / "sae")
    before = contents(tmp_path)
    assert exported(tmp_path / "sae", tmp_path / "out") == 2
    assert contents(tmp_path) == before


def test_a_directory_without_permission(capsys: pytest.CaptureFixture[str]) -> None:
    with open_folder() as folder:
        write_sae(folder / "sae")
        for file in (folder / "sae").iterdir():
            file.chmod(0o644)
        (folder / "locked").mkdir(mode=0o555)
        before = contents(folder)
        with without_privileges():
            assert exported(folder / "sae", folder / "locked" / "out") == 2
            assert exported(folder / "sae", folder / "locked") == 2
        assert capsys.readouterr().err.count("Permission denied") == 2
        assert contents(folder) == before


def test_the_earlier_export_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    write_sae(tmp_path / "sae")
    out, old = tmp_path / "out", tmp_path / ".out.sae-export.old"
    assert exported(tmp_path / "sae", out) == 0
    before = contents(out)
    out.rename(old)  # as far as the killed command came
    (tmp_path / ".out.sae-export.partial").mkdir()

    def damaged() -> Opened:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        export([Source(name="sae", open=damaged, run=None)], FORMATS["saelens"], out)
    assert contents(out) == before
    out.rename(old)
    assert exported(tmp_path / "sae", out) == 0
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sae"]


def test_a_directory_of_the_users_is_not_taken_for_an_earlier_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae(tmp_path / "sae")
    (tmp_path / ".out.sae-export.old").mkdir()
    (tmp_path / ".out.sae-export.old" / "diary").write_text("mine")
    before = contents(tmp_path)
    assert exported(tmp_path / "sae", tmp_path / "out") == 2
    assert f"{tmp_path / '.out.sae-export.old'}: " in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden", "", "a\0b", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    sae = random_sae()
    source = Source(name=name, open=lambda: Opened(sae=sae, manifest=manifest_of(sae), format_name="ours"), run=None)
    with pytest.raises(CheckpointError, match="the name of an SAE becomes a folder"):
        export([source, source], FORMATS["saelens"], tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_name_in_a_foreign_record_cannot_lead_out(tmp_path: Path) -> None:
    for number in range(2):
        write_sae(tmp_path / f"own{number}", seed=number)
        assert (
            run_command([str(tmp_path / f"own{number}"), "--to", "saelens", "--out", str(tmp_path / f"in/{number}")])
            == 0
        )
    record = tmp_path / "in" / "0" / "sae_train.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name": "../../evil"}))
    assert run_command([str(tmp_path / "in"), "--to", "saelens", "--out", str(tmp_path / "made/deep")]) == 0
    assert sorted(path.name for path in (tmp_path / "made" / "deep").iterdir() if path.is_dir()) == ["0", "own1"]
    assert not list(tmp_path.rglob("*evil*"))


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    sae = random_sae()
    out = tmp_path / "out"
    inner: list[str] = []

    def opened() -> Opened:
        if not inner and (tmp_path / ".out.sae-export.partial").exists():  # the outer export is being written
            inner.append("tried")
            with pytest.raises(CheckpointError, match="another export is writing there"):
                export([other], FORMATS["saelens"], out)
        return Opened(sae=sae, manifest=manifest_of(sae), format_name="ours")

    other = Source(name="other", open=lambda: Opened(sae=sae, manifest=manifest_of(sae), format_name="ours"), run=None)
    export([Source(name="one", open=opened, run=None)], FORMATS["saelens"], out)
    assert inner == ["tried"]
    assert json.loads((out / "sae_train.json").read_text())["name"] == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
