"""SAEs on the Hugging Face Hub: fetching the files of one, and uploading an export.

This is the only file that imports `huggingface_hub`, whose token, cache and endpoint are used (HF_TOKEN, HF_HOME,
HF_ENDPOINT). Messages for its failures are in `sae_train/hub.py`.
"""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sae_train.errors import CheckpointError, suggest
from sae_train.formats import record
from sae_train.formats.reading import read_json
from sae_train.hub import Address, address_error, is_offline, push_error

MAIN_FILES = ("sae.safetensors", "sae_weights.safetensors", "params.safetensors")
"""Names of safetensors files that hold an SAE. A repository of another name for them holds a language model."""
PICKLES, ARRAYS = (".pt", ".pth"), ".npz"
OF_THE_HUB = (".gitattributes", "README.md")
"""Files that a new repository may hold, and that an upload may replace."""
Download = Callable[[Sequence[str]], Path]
"""Downloads files of a repository, and returns its directory in the cache."""
LISTED = 24
"""Names of a long list that a message shows."""


def fetch(address: Address, name: str | None = None) -> Path:
    """Download the files of one SAE; return its directory or file in the Hub's cache.

    Without a network, an SAE that was fetched before is found in the cache.

    Args:
        address: of the SAE, or of a repository or folder with several.
        name: the one of several: its folder, or its name in the `suite.json` there.

    Raises:
        CheckpointError: there is no such repository, folder or SAE, there are several and no name is given, or the
            files may not or cannot be downloaded.
    """
    return _fetch(address, name, every=False)


def fetch_all(address: Address) -> Path:
    """Download the files of every SAE of a repository or folder; return its directory or file in the Hub's cache.

    Raises:
        CheckpointError: see `fetch`.
    """
    return _fetch(address, None, every=True)


def _fetch(address: Address, name: str | None, *, every: bool) -> Path:
    try:
        return _fetched(address, name, every=every)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises its own errors and those of its network libraries
        raise address_error(address, error) from error


def _fetched(address: Address, name: str | None, *, every: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    commit: str | None = None
    try:
        api = HfApi()
        commit = api.repo_info(address.repo, revision=address.revision).sha
        paths = api.list_repo_files(address.repo, revision=commit)
    except Exception as error:  # see `fetch`; only a lack of network is dealt with here
        if not is_offline(error):
            raise
        paths = _cached(address)
    # a branch is passed on by its name, under which the cache can find it again without a network
    revision = address.revision

    def download(wanted: Sequence[str]) -> Path:
        patterns = [glob.escape(path) for path in wanted]
        return Path(snapshot_download(address.repo, revision=revision, allow_patterns=patterns))

    units = _units_at(address, paths)
    if every:
        return download([file for unit in units.values() for file in _files_of(unit, paths)]) / address.inside
    unit = _chosen(address, units, paths, name, download)
    return download(_files_of(unit, paths)) / unit


def _cached(address: Address) -> list[str]:
    """Return the files of a repository that are in the cache."""
    from huggingface_hub import snapshot_download

    nothing = glob.escape("no such file")
    root = Path(snapshot_download(address.repo, revision=address.revision, allow_patterns=nothing,
                                  local_files_only=True))  # fmt: skip
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]


def _units_at(address: Address, paths: Sequence[str]) -> dict[str, str]:
    """Return the folders or files of the SAEs at an address, by their names below it."""
    inside = address.inside
    if inside in paths:
        return {PurePosixPath(inside).name: inside}
    below = [path for path in paths if not inside or path.startswith(f"{inside}/")]
    if not below:
        folders = {parent.as_posix() for path in paths for parent in PurePosixPath(path).parents} - {"."}
        raise CheckpointError(f"{address.text}: {address.repo} has no folder {inside!r}.{suggest(inside, folders)}")
    found = units_of(below)
    if not found:
        raise CheckpointError(f"{address.text}: holds no file of an SAE, such as sae.safetensors. Give a repository or "
                              "a folder with one.")  # fmt: skip
    return {str(PurePosixPath(unit).relative_to(inside)): unit for unit in found}


def _chosen(
    address: Address, found: Mapping[str, str], paths: Sequence[str], name: str | None, download: Download
) -> str:
    """Return the folder or file of the SAE that is meant."""
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is not None:
        by_last = {PurePosixPath(label).name: unit for label, unit in found.items()}
        own = _names(address.inside, paths, download) if name not in found and name not in by_last else {}
        unit = found.get(name) or by_last.get(name) or own.get(name)
        if unit in found.values():  # a suite.json may hold any path
            return str(unit)
    listed = "".join(f"\n  {label}" for label in list(found)[:LISTED])
    more = f"\n  and {len(found) - LISTED} more" if len(found) > LISTED else ""
    if name is not None:
        raise CheckpointError(f"{address.text}: holds no SAE {name!r}.{suggest(name, found) or listed + more}")
    raise CheckpointError(f"{address.text}: holds {len(found)} SAEs. Give the name of one, as in load(ADDRESS, NAME), "
                          f"or its folder after the address.{listed}{more}")  # fmt: skip


def _names(inside: str, paths: Sequence[str], download: Download) -> dict[str, str]:
    """Return the folders of SAEs by the names that the suite.json of an export holds."""
    suite = f"{inside}/suite.json" if inside else "suite.json"
    if suite not in paths:
        return {}
    return {each: str(PurePosixPath(inside, path)) for each, path in record.suite_paths(download([suite]) / suite)}


def units_of(paths: Sequence[str]) -> list[str]:
    """Return the folders, or files, that hold one SAE each. `.` is the repository itself.

    Example: `["a/sae.safetensors", "a/sae.json", "b/layer0.sae.pt", "b/layer1.sae.pt"]` gives
    `["a", "b/layer0.sae.pt", "b/layer1.sae.pt"]`.
    """
    mains = [path for path in paths if path.endswith((*PICKLES, ARRAYS)) or PurePosixPath(path).name in MAIN_FILES]
    folders: dict[str, list[str]] = {}
    for path in mains:
        folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
    units = []
    for folder, files in folders.items():
        are_one_each = len(files) > 1 and all(file.endswith(PICKLES) for file in files)
        units += files if are_one_each else [folder]
    return sorted(units)


def _files_of(unit: str, paths: Sequence[str]) -> list[str]:
    """Return the files of one SAE: those of its folder, or its file with the JSON files there."""
    folder = str(PurePosixPath(unit).parent) if unit in paths else unit
    beside = [path for path in paths if str(PurePosixPath(path).parent) == folder]
    if unit in paths:
        return [unit, *(path for path in beside if path.endswith(".json"))]
    return [path for path in beside if PurePosixPath(path).name not in OF_THE_HUB]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A repository to push to. `check_target` makes it, before anything is written; `upload` takes it."""

    repo: str
    """ORG/NAME."""
    account: str
    """Name of the account that the token belongs to."""
    holds: tuple[str, ...]
    """Paths of the files there. Empty for a new repository."""
    is_private: bool


def check_target(repo: str, *, private: bool) -> Target:
    """Return a repository to push to, once it is known that it is new, empty, or holds an export.

    Raises:
        CheckpointError: `repo` is no id, there is no valid token or no network, or the repository holds something else.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    try:
        account = str(api.whoami()["name"])
        try:
            info = api.repo_info(repo)
        except RepositoryNotFoundError:
            return Target(repo=repo, account=account, holds=(), is_private=private)
        holds = tuple(api.list_repo_files(repo, revision=info.sha))
    except Exception as error:  # see `fetch`
        raise push_error(repo, error) from error
    if private and not info.private:
        raise CheckpointError(f"--push {repo}: exists and is public, so --private cannot hold. Change it on its page, "
                              "or choose another name.")  # fmt: skip
    if set(holds) - set(OF_THE_HUB) and not any(PurePosixPath(path).name == record.FILE for path in holds):
        raise _other_content(repo, sorted(set(holds) - set(OF_THE_HUB)))
    return Target(repo=repo, account=account, holds=holds, is_private=bool(info.private))


def upload(target: Target, directory: Path) -> str:
    """Make the repository where it is new, and upload all of a directory; return the address of the page.

    Raises:
        CheckpointError: the repository holds other SAEs, the account may not write there, or the upload failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        _check_replaced(target, directory)
        url = api.create_repo(target.repo, private=target.is_private or None, exist_ok=True)
        api.upload_folder(repo_id=target.repo, folder_path=directory, commit_message="Upload SAEs with sae-train")
    except CheckpointError:
        raise
    except Exception as error:  # see `fetch`
        raise push_error(target.repo, error, account=target.account) from error
    return str(url)


def _check_replaced(target: Target, directory: Path) -> None:
    """Refuse to write over anything but an earlier export of the same SAEs."""
    from huggingface_hub import hf_hub_download

    ours = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    others = sorted(set(target.holds) - ours - set(OF_THE_HUB))
    if others:
        raise _other_content(target.repo, others)
    for name in sorted({record.FILE, "suite.json"} & ours & set(target.holds)):
        there = Path(hf_hub_download(target.repo, name))
        if _contents(there) != _contents(directory / name):
            raise CheckpointError(f"--push {target.repo}: holds other SAEs, according to its {name}. Choose another "
                                  "name.")  # fmt: skip


def _contents(path: Path) -> list[tuple[str, str]]:
    """Return the name and the format of the SAE of a record, or the name and the folder of each SAE of a suite.json."""
    if path.name != record.FILE:
        return sorted(record.suite_paths(path))
    values = read_json(path)
    return [(str(values.get("name")), str(values.get("format")))]


def _other_content(repo: str, paths: Sequence[str]) -> CheckpointError:
    more = f" and {len(paths) - 3} more files" if len(paths) > 3 else ""
    return CheckpointError(f"--push {repo}: holds something else than an earlier export of the same SAEs: "
                           f"{', '.join(paths[:3])}{more}. Choose another name.")  # fmt: skip
