"""Checkpoints are whole or passed over; a refused write leaves the last good one."""

import json
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_train.config import CheckpointConfig
from sae_train.errors import CheckpointError
from sae_train.ranks.interface import Solo
from sae_train.sae.state import State
from sae_train.training import checkpoint, restore
from sae_train.training import checkpoint_files as files
from sae_train.training.checkpoint import Saver
from sae_train.training.checkpoint_files import Contents, SaeContents
from tools import grid_world as world

NAME = "m.residual2.topk.k4.f5.s0"
FEATURES_FILE = f"saes/{NAME}/features_00000000_00000005.safetensors"


def contents(step: int) -> Contents:
    state = State(
        {"dictionary/b_dec": torch.full((1000,), float(step))},
        {"dictionary/W_enc": torch.arange(10.0).view(5, 2), "firing/since": torch.arange(5)},
    )
    lanes = {
        0: {"pool": torch.arange(6.0).view(2, 3)},
        1: {"pool": torch.ones(0, 3), "epoch": torch.tensor(4)},
    }
    return Contents({"trainer/n_done": torch.tensor(step)}, lanes, {NAME: SaeContents((0, 5), state, Solo())})


def begin(directory: Path, step: int, *, keep: int = 0, in_background: bool = False) -> checkpoint.Saving:
    notes = {"step": step, "tokens": 10 * step, "identity": "3fa9c1", "widths": {NAME: 5}}
    return checkpoint.begin(
        directory, contents(step), notes=notes, ranks=Solo(), keep=keep, in_background=in_background
    )


def save(directory: Path, step: int, *, keep: int = 0) -> Path:
    return begin(directory, step, keep=keep).publish()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 3
    assert int(found.stream["trainer/n_done"]) == 3
    assert found.sae_names() == [NAME]
    state = found.sae_state(NAME, 1, 4)
    assert torch.equal(state.shared["dictionary/b_dec"], torch.full((1000,), 3.0))
    assert torch.equal(state.features["dictionary/W_enc"], torch.arange(10.0).view(5, 2)[1:4])
    assert torch.equal(found.sae_state(NAME, 0, 5).features["firing/since"], torch.arange(5))
    with pytest.raises(CheckpointError, match="does not hold features 3 to 6"):
        found.sae_state(NAME, 3, 7)
    with pytest.raises(CheckpointError, match=f"holds no SAE other; it has {NAME}"):
        found.sae_state("other", 0, 5)
    assert torch.equal(found.lane_state(0)["pool"], torch.arange(6.0).view(2, 3))
    assert found.lane_state(1)["pool"].shape == (0, 3)
    assert int(found.lane_state(1)["epoch"]) == 4
    with pytest.raises(CheckpointError, match="no lane 2"):
        found.lane_state(2)


def test_the_newest_comes_first_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 90, 200, 100_000_000):
        save(tmp_path, step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000200", "step_100000000"]  # by number, not by name
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 100_000_000


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_damaged_ones_crowd_out_no_good_one(tmp_path: Path, keep: int) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    for step in (200, 300):
        (tmp_path / f"step_{step:08d}" / "stream.safetensors").write_bytes(b"damaged")
    said: list[str] = []
    found = restore.newest(tmp_path, ranks=Solo(), warn=said.append)
    assert found is not None
    assert found.notes["step"] == 100
    assert len(said) == 2
    save(tmp_path, 150, keep=keep)
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 150
    assert len(list(tmp_path.iterdir())) == (keep or 2)


@pytest.mark.parametrize(
    "file",
    [
        "stream.safetensors",
        f"saes/{NAME}/shared.safetensors",
        FEATURES_FILE,
        "lanes_0000_0001.safetensors",
        "checkpoint.json",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / file
    data = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        victim.write_bytes(data[:20] + bytes([data[20] ^ 0x80]) + data[21:])
    else:
        victim.unlink()
    said: list[str] = []
    found = restore.newest(tmp_path, ranks=Solo(), warn=said.append)
    assert found is not None
    assert found.notes["step"] == 1
    assert len(said) == 1
    assert "step_00000002" in said[0]
    assert "before it" in said[0]


def test_what_the_file_system_will_not_give_is_not_damage(tmp_path: Path) -> None:
    """Passed over, it would be removed by the next checkpoint, and all that was trained since with it."""
    save(tmp_path, 1)
    file = save(tmp_path, 2) / FEATURES_FILE
    file.rename(tmp_path / "kept")
    file.symlink_to(file)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Too many levels.* Nothing was changed"):
        restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    (tmp_path / "kept").replace(file)
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 2


def test_a_kill_while_old_ones_go_leaves_only_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """As a SIGKILL, which nothing catches."""

    def half(path: Path, ignore_errors: bool = False) -> None:
        if path.is_dir():
            next(iter(sorted(path.iterdir()))).unlink()
            raise Killed

    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", half)
        with pytest.raises(Killed):
            save(tmp_path, 3, keep=1)
    for path in tmp_path.glob("step_*"):
        assert restore.load(path).notes["step"] == int(path.name.removeprefix("step_"))
    assert restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail) is not None
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    """A scratch that is not mounted, say: to start over would be to write over everything once it is."""
    place = tmp_path / "checkpoints"
    assert restore.newest(place, ranks=Solo(), warn=pytest.fail) is None
    place.symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="a link to what is not there"):
        restore.newest(place, ranks=Solo(), warn=pytest.fail)
    place.unlink()
    place.write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Not a directory"):
        restore.newest(place, ranks=Solo(), warn=pytest.fail)


def test_all_damaged_means_none(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "checkpoint.json").write_text("{")
    said: list[str] = []
    assert restore.newest(tmp_path, ranks=Solo(), warn=said.append) is None
    assert len(said) == 1
    assert "starting over" in said[0]


def test_what_a_killed_writer_left_is_ignored_and_swept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = tmp_path / "tmp-step_00000002"
    partial.mkdir()
    (partial / "stream.safetensors").write_bytes(b"half")
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 1
    save(tmp_path, 3)
    assert not partial.exists()


def test_one_written_in_the_background_is_of_the_moment_it_was_begun(tmp_path: Path) -> None:
    save(tmp_path, 1)
    given, n_done = torch.zeros(4, 75_000), torch.tensor(7)
    state = State({"b_dec": given[0]}, {"rows": given})
    saving = checkpoint.begin(
        tmp_path,
        Contents({"trainer/n_done": n_done}, {0: {"pool": n_done.clone()}}, {NAME: SaeContents((0, 4), state, Solo())}),
        notes={"step": 2, "tokens": 20, "identity": "3fa9c1", "widths": {NAME: 4}},
        ranks=Solo(),
        keep=1,
        in_background=True,
    )
    for each in (given, n_done):
        each += 1  # as the next step does
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 1  # until it is published
    saving.publish()
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == saving.step == 2
    saved = found.sae_state(NAME, 0, 4)
    assert not saved.shared["b_dec"].any()
    assert not saved.features["rows"].any()
    assert int(found.stream["trainer/n_done"]) == int(found.lane_state(0)["pool"]) == 7
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Passed over, the run would start over, and the next checkpoint would remove it."""
    path = save(tmp_path, 1)
    notes = json.loads((path / "checkpoint.json").read_text())
    del notes["format"], notes["sha256"]
    (path / "checkpoint.json").write_text(json.dumps(notes | {"sha256": files.digest_of_notes(notes)}))
    with pytest.raises(CheckpointError, match=r"in layout 1; this one reads layout 3\. Finish the run.*name="):
        restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert path.exists()


def test_one_that_is_never_published_was_never_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    forgotten = begin(tmp_path, 2, in_background=True)
    while not forgotten.is_written():
        time.sleep(0.01)
    found = restore.newest(tmp_path, ranks=Solo(), warn=pytest.fail)
    assert found is not None
    assert found.notes["step"] == 1
    begin(tmp_path, 2, in_background=True).publish()  # a run that goes on makes the same step's again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("in_background", [False, True], ids=["in the step", "in the background"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, in_background: bool) -> None:
    """The file-size limit refuses writes as a full disk does: midway, by an OSError."""
    script = f"""
        import resource, sys, torch
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from test_checkpoint import begin, save
        from pathlib import Path
        from sae_train.errors import CheckpointError
        save(Path({str(tmp_path)!r}), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            begin(Path({str(tmp_path)!r}), 2, in_background={in_background}).publish()
        except CheckpointError as error:
            print(error)
            sys.exit(2)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert json.loads((tmp_path / "step_00000001" / "checkpoint.json").read_text())["step"] == 1


def saver_of(folder: Path) -> tuple[Saver, Callable[[], None]]:
    """Return the saver of a small run, which writes in the background, and the call that begins a checkpoint."""
    world.write_activations(folder)
    trainer = world.build(world.config_of(folder, [], precision="float32", steps=4, n_features=64), Solo())
    trainer.step(trainer.stream.batch(0))
    saver = Saver(folder / "saved", CheckpointConfig(every_tokens=None, keep=2, beside=True), ranks=Solo())
    notes = trainer.notes() | {"identity": "3fa9c1"}
    return saver, lambda: saver.save(trainer.contents(), notes, may_go_on=True)


def test_an_interrupt_while_one_is_waited_for_does_not_lose_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, save_it = saver_of(tmp_path)
    save_it()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saving, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            saver.publish()
    assert saver.saved_at == -1
    saver.publish_at_last()
    assert saver.saved_at == 1
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step_00000001"]


def interrupted(_: checkpoint.Saving) -> Path:
    raise KeyboardInterrupt


def test_one_that_fails_beside_the_step_is_told_where_it_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver, save_it = saver_of(tmp_path)
    (tmp_path / "saved").mkdir()
    for tell in (saver.publish, saver.publish_at_last):
        save_it()
        while (tmp_path / "saved").exists():  # a file may come in between
            shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        (tmp_path / "saved").write_text("")
        if tell == saver.publish:
            with pytest.raises(CheckpointError, match="saved"):
                tell()
        else:
            tell()
            assert "the checkpoint that was being written is lost" in capsys.readouterr().err
        assert saver.saved_at == -1
        tell()  # nothing is left to be told
        (tmp_path / "saved").unlink()
