"""wandb can neither end nor hang a run: at its start, in the middle and at its end, with real sockets and processes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae_train.cli.compose import compose_config
from sae_train.config import RunConfig, as_dict
from sae_train.evaluation.density import HISTOGRAM_EDGES
from sae_train.training import signals, tracking
from sae_train.training.json_process import BLOCKED, LAST_WAIT
from sae_train.training.tracking import Dashboard, Wandb, build_dashboard
from tools.command_line import LAUNCHERS, QUIET, changed
from tools.tiny_runs import rows_run
from tools.wandb_server import Server, Takes, refusing

KEY = "0123456789abcdef" * 3
"""Well-formed, and issued by no server."""
BOUND = 30.0
"""Seconds that wandb may take at a run's start."""
ROW = {"sae": "it", "step": 1, "tokens": 512, "train/fvu": 0.25, "density/histogram": [3] * (len(HISTOGRAM_EDGES) - 1)}
Start = Callable[..., Dashboard]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose_config(["tracking=wandb"])


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> Iterator[Start]:
    """Return `start(**environment)`: the dashboard of a run in 'tmp_path/a run', of a user who has no wandb yet."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "a run").mkdir()
    built: list[Dashboard] = []

    def build(**environment: str) -> Dashboard:
        for name, value in ({"HOME": str(tmp_path / "home")} | environment).items():
            monkeypatch.setenv(name, value)
        built.append(build_dashboard(config.tracking, as_dict(config, [config.sae]), tmp_path / "a run", several=False))
        return built[-1]

    yield build
    for dashboard in built:
        dashboard.close()


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for a server than a run does, so that the tests are short."""
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 5.0)
    monkeypatch.setattr(tracking, "FIRST_SECONDS", 12.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2.0)


def offline(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("wandb/offline-run-*"))


def named(text: str) -> list[str]:
    """Return the directories that the one `wandb sync` line of a text names."""
    (arguments,) = re.findall(r"wandb sync (.*)", text)
    return shlex.split(arguments)


def worker(dashboard: Dashboard) -> int:
    """Return the id of wandb's process."""
    assert isinstance(dashboard, Wandb)
    assert dashboard._process is not None
    return dashboard._process._process.pid


def is_offline(dashboard: Dashboard, folder: Path) -> bool:
    """Return whether a dashboard takes rows, to be synced as its one line says."""
    assert "\n" not in dashboard.notice
    dashboard.log([ROW])
    dashboard.summarise({"sae": {"l0": 8.0}})
    (path,) = offline(folder)
    (file,) = Path(path).glob("*.wandb")
    assert b"train/fvu" in file.read_bytes()
    return named(dashboard.notice) == [path]


def test_a_start_is_given_up_where_the_run_is_told_to_stop(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_received", signals.SAVE * signals._SHIFT + signal.SIGTERM)
    begun = time.monotonic()
    dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert time.monotonic() - begun < 5
    assert "the run was told to stop" in dashboard.notice


@pytest.mark.parametrize(
    "environment", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}, {"WANDB_DISABLED": "1"}], ids=str
)
def test_wandb_is_off_where_the_environment_says_so(tmp_path: Path, start: Start, environment: dict[str, str]) -> None:
    dashboard = start(**environment, WANDB_API_KEY=KEY)
    dashboard.log([ROW])
    dashboard.summarise({"sae": {}})
    assert dashboard.notice == ""
    assert list((tmp_path / "a run").iterdir()) == []


@pytest.mark.slow
def test_wandb_is_off_where_its_settings_file_says_so(tmp_path: Path, start: Start) -> None:
    (tmp_path / "settings").write_text("[default]\nmode = disabled\n")
    dashboard = start(WANDB_CONFIG_DIR=str(tmp_path), WANDB_API_KEY=KEY)
    dashboard.summarise({"sae": {}})
    assert (dashboard.notice, offline(tmp_path)) == ("", [])


def test_a_malformed_key_is_a_reason_to_be_offline(tmp_path: Path, start: Start) -> None:
    dashboard = start(WANDB_API_KEY="hunter2")
    assert "WANDB_API_KEY invalid" in dashboard.notice
    assert is_offline(dashboard, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "not logged in"),
        ({"WANDB_MODE": "online"}, "not logged in"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, ""),
        ({"WANDB_MODE": "sometimes", "WANDB_API_KEY": KEY}, "sometimes"),
        ({"HOME": "FILE"}, "not logged in"),
        ({"HOME": "FILE/home", "WANDB_API_KEY": "hunter2"}, "invalid"),
        ({"WANDB_CONFIG_DIR": "FILE/a", "WANDB_CACHE_DIR": "FILE/b", "WANDB_DATA_DIR": "FILE/c"}, "not logged in"),
        ({"NETRC": "/"}, ""),
        ({"WANDB_SERVICE": "2-1-unix-/nowhere", "WANDB_API_KEY": "hunter2"}, "invalid"),
    ],
    ids=str,
)
def test_offline(tmp_path: Path, start: Start, environment: dict[str, str], why: str) -> None:
    (tmp_path / "file").touch()
    environment = {name: value.replace("FILE", str(tmp_path / "file")) for name, value in environment.items()}
    dashboard = start(**environment)
    assert why in dashboard.notice
    assert is_offline(dashboard, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("status", "body"), [(403, b"{}"), (500, b""), (200, b"<html>")])
def test_a_server_that_answers_wrongly(tmp_path: Path, start: Start, status: int, body: bytes) -> None:
    with Server(status, body).serving() as server:
        dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert is_offline(dashboard, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("url", ["refused", "http://wandb.invalid"])
def test_a_server_that_cannot_be_reached(tmp_path: Path, start: Start, url: str) -> None:
    dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL=refusing() if url == "refused" else url)
    assert is_offline(dashboard, tmp_path)


@pytest.mark.slow
def test_a_server_that_never_answers_costs_30_seconds_at_most(tmp_path: Path, start: Start) -> None:
    with Server().serving() as server:
        server.is_stuck = True
        begun = time.monotonic()
        dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        assert time.monotonic() - begun < BOUND
        assert is_offline(dashboard, tmp_path)


def test_a_start_that_hangs_is_killed(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tracking.START_SECONDS + LAST_WAIT <= BOUND
    (tmp_path / "hangs.py").write_text("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)\n")
    monkeypatch.setattr(tracking, "WORKER", tmp_path / "hangs.py")
    monkeypatch.setattr(tracking, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "START_SECONDS", 1.0)
    begun = time.monotonic()
    dashboard = start(WANDB_API_KEY=KEY)
    assert time.monotonic() - begun < 1.0 + LAST_WAIT
    assert "no answer" in dashboard.notice
    assert "metrics.jsonl alone" in dashboard.notice
    dashboard.log([ROW])
    dashboard.summarise({"sae": {}})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("broken", ["wandb_id", pytest.param("WANDB_BASE_URL", marks=pytest.mark.slow)])
def test_where_offline_fails_too_metrics_jsonl_is_left(tmp_path: Path, start: Start, broken: str) -> None:
    if broken == "wandb_id":
        (tmp_path / "a run" / "wandb_id").mkdir()
    dashboard = start(**({broken: "nonsense"} if broken.isupper() else {}))
    assert re.fullmatch(r"wandb does not start \(.+\)\. Rows go to metrics\.jsonl alone\.", dashboard.notice)
    dashboard.log([ROW])
    dashboard.summarise({"sae": {}})


def test_rows_reach_a_server_though_a_scheduler_signals(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with Takes().serving() as server:
        dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        for number in BLOCKED:  # as a scheduler signals a whole job
            os.kill(worker(dashboard), number)
        dashboard.log([ROW])
        dashboard.summarise({"sae": {"l0": 8.0}})
    (row,) = server.rows
    assert (row["tokens"], row["train/fvu"]) == (512, 0.25)
    assert row["density/histogram"]["values"] == ROW["density/histogram"]
    assert row["density/histogram"]["bins"] == HISTOGRAM_EDGES.tolist()
    assert {"sae", "step"} & set(row) == set()
    assert server.summary["l0"] == 8.0
    assert (dashboard.notice, capsys.readouterr()) == ("", ("", ""))


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
def test_a_server_that_stops_answering(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    with Takes().serving() as server:
        dashboard = start(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        server.is_stuck = True
        begun = time.monotonic()
        for _ in range(100):
            dashboard.log([ROW])
        assert time.monotonic() - begun < 1
        dashboard.summarise({"sae": {"l0": 8.0}})
        assert time.monotonic() - begun < 2 + 4
    (line,) = capsys.readouterr().err.splitlines()
    (flag, directory) = named(line)
    assert flag == "--include-online"
    assert list(Path(directory).glob("run-*.wandb"))


def test_a_run_that_is_told_to_stop_waits_less_for_wandb(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler gives it half a minute, and the SLURM job has to be put back in that."""
    dashboard = start()
    os.kill(worker(dashboard), signal.SIGSTOP)
    monkeypatch.setattr(signals, "_received", signals.REQUEUE * signals._SHIFT + signal.SIGUSR1)
    begun = time.monotonic()
    dashboard.close()
    assert time.monotonic() - begun < tracking.HURRIED_SECONDS + 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_stops_working(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    dashboard = start()
    os.kill(worker(dashboard), how)
    monkeypatch.setattr(tracking, "END_SECONDS", 0.5)
    begun = time.monotonic()
    for _ in range(12_000):  # more than a pipe and the queue hold
        dashboard.log([ROW])
    dashboard.summarise({"sae": {}})
    assert time.monotonic() - begun < 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wandb may lack rows")
    assert named(line) == named(dashboard.notice)


@pytest.mark.parametrize(
    "mode", ["offline", pytest.param("online", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_a_resumed_run_names_every_directory_to_sync(tmp_path: Path, start: Start, mode: str) -> None:
    folder = tmp_path / "a run" / "wandb"
    names = [f"offline-run-2026010{day}_000000-id" for day in (1, 3, 2)]
    for name in (*names, "run-20260104_000000-id"):
        (folder / name).mkdir(parents=True)
        (folder / name / "run-id.wandb").touch()
    (folder / names[0] / "run-id.wandb.synced").touch()  # as `wandb sync` marks it
    waiting = [str(folder / names[2]), str(folder / names[1])]
    if mode == "offline":
        *before, own = named(start().notice)
        assert before == waiting
        assert list(Path(own).parent.glob("offline-run-*-????????")) == [Path(own)]
    elif mode == "online":
        with Takes().serving() as server:
            assert named(start(WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url).notice) == waiting
    else:
        assert named(start(WANDB_RESUME="nonsense").notice) == waiting


def verdict_is_last(text: str) -> bool:
    *lines, last = text.replace("\r", "\n").strip().splitlines()
    return "FVU" in last and "runs/" in last and sum("wandb" in line for line in lines) == 1


def combined(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a run in a folder, with everything that it or a child process prints in one stream."""
    variables = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return subprocess.Popen(
        [sys.executable, "-m", "sae_train", *changed(rows_run(folder), "tracking=wandb", "tokens=131072")],
        cwd=folder,
        env={**variables, **QUIET, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_without_network_is_synced_as_a_whole(tmp_path: Path) -> None:
    process = combined(tmp_path)
    deadline = time.monotonic() + 120
    while not any(path.read_text() for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)  # which returns once nobody holds the stream
    with combined(tmp_path, WANDB_MODE="online", WANDB_API_KEY=KEY, WANDB_BASE_URL=refusing()) as process:
        text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert verdict_is_last(text), text
    assert len(named(text)) == 2
    assert named(text) == offline(tmp_path)
    for path in named(text):
        (file,) = Path(path).glob("*.wandb")
        assert b"train/fvu" in file.read_bytes()
