"""The SAEs that `sae-export` was asked for: of a run, of an export, of another program, or on the Hub."""

from functools import partial
from pathlib import Path
from typing import Any

from sae_train.errors import CheckpointError
from sae_train.formats import hub_files, native, own, record
from sae_train.formats.export import Source
from sae_train.formats.foreign import Opened
from sae_train.formats.load import find_foreign, foreign_saes, opened
from sae_train.formats.reading import read_json
from sae_train.hub import SCHEME, address_of
from sae_train.training.run_directory import RunDirectory


def find_sources(run: str, name: str | None) -> tuple[list[Source], list[str]]:
    """Return the SAEs to export, and a line for each SAE that is left out.

    Args:
        run: as typed.
        name: the only SAE to export, or None for all.

    Raises:
        CheckpointError: there is no SAE, or none of that name, or the run is not finished.
    """
    if run.startswith(SCHEME):
        address = address_of(run)
        path = hub_files.fetch_all(address) if name is None else hub_files.fetch(address, name)
        name = None
    else:
        path = Path(run).expanduser()
    if not native.holds_saes(path):
        return _foreign(path, name), []
    if (path / "sae.json").is_file():
        return [_own(native.find(path, name), run=_config(path))], []
    return _of_a_run(path, name)


def _of_a_run(path: Path, name: str | None) -> tuple[list[Source], list[str]]:
    directory = RunDirectory(path)
    config = directory.stored()
    stopped: dict[str, str] = {}
    if config is not None:
        summary = directory.result()
        if summary is None:
            raise CheckpointError(f"{path}: the run in it is not finished, or files of it are missing. Finish it with "
                                  "its own command, or give the directory of one SAE, saes/NAME.")  # fmt: skip
        stopped = {each: str(own["stopped"]) for each, own in summary["saes"].items() if "stopped" in own}
    if name in stopped:
        raise CheckpointError(f"{path}: its SAE {name} was stopped, so there is nothing to export: {stopped[name]}")
    there = sorted(notes.parent for notes in path.glob("saes/*/sae.json"))
    if name is not None or not there:
        there = [native.find(path, name)]
    lines = [f"{each} was stopped and is left out: {reason}" for each, reason in stopped.items()]
    return [_own(each, run=config) for each in there], [] if name is not None else lines


def _config(directory: Path) -> dict[str, Any] | None:
    """Return config.yaml of the run that `directory` is an SAE of, if it lies in one."""
    if directory.absolute().parent.name != "saes":
        return None
    return RunDirectory(directory.absolute().parent.parent).stored()


def _own(directory: Path, *, run: dict[str, Any] | None) -> Source:
    """Return an SAE in our format. An export of it has a record, which names it and holds the run's settings."""
    name = record.name_in(directory) or directory.absolute().name
    return Source(name=name, open=partial(_open, directory), run=run or _recorded_run(directory))


def _open(directory: Path) -> Opened:
    return own.read(directory / own.WEIGHTS)


def _foreign(path: Path, name: str | None) -> list[Source]:
    found = foreign_saes(path) if name is None else {}
    if not found:
        each, file = find_foreign(path, name)  # raises where there is none
        found = {name or ".": (each, file)}
    names = {label: record.name_in(file.parent) for label, (_, file) in found.items()}
    recorded = list(names.values())
    sources = []
    for label, (_, file) in found.items():
        own_name = names[label]
        if own_name is None or recorded.count(own_name) > 1:
            # a name becomes a folder of the export, so it has no parts of its own
            own_name = label.replace("/", ".") if label != "." else path.absolute().name
        chosen = None if len(found) == 1 and name is None else label
        sources.append(Source(name=own_name, open=partial(opened, path, chosen), run=_recorded_run(file.parent)))
    return sources


def _recorded_run(directory: Path) -> dict[str, Any] | None:
    path = directory / record.FILE
    return record.run_in(read_json(path)) if path.is_file() else None
