"""Names that are local paths or ids of the Hugging Face hub, and messages for failures of the hub or of a library."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from sae_train.errors import DataError

_OFFLINE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "gaierror",
}
_MISSING = {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError", "EntryNotFoundError",
            "RemoteEntryNotFoundError"}  # fmt: skip


def hub_error(key: str, name: str, error: BaseException) -> DataError:
    """Return the message for a failure to load `key`=`name`.

    The cause is found by the class names of nested errors, because the libraries wrap each other's errors.
    """
    chain = list(_causes(error))
    kinds = {type(cause).__name__ for cause in chain}
    if "GatedRepoError" in kinds or any("gated" in str(cause).lower() for cause in chain):
        return DataError(
            f"{key}={name}: gated on the Hugging Face hub. Accept its terms on its page there, then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if kinds & _OFFLINE:
        return DataError(
            f"{key}={name}: not in the local cache, and the Hugging Face hub cannot be reached. Connect, fetch it "
            "first where there is a network, or give a local directory."
        )
    if "RevisionNotFoundError" in kinds:
        return DataError(f"{key}={name}: the hub has no such revision of it. Correct the revision or leave it null.")
    if kinds & _MISSING:
        return DataError(
            f"{key}={name}: neither a local path nor found on the Hugging Face hub. Correct the id; a private one "
            "needs `hf auth login`."
        )
    return DataError(f"{key}={name}: cannot be loaded: {_first_line(error)}")


def local_path(name: str) -> Path | None:
    """Return `name` as a path, which may not exist, or None where it can be a hub id."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    return path if looks_local else None


def missing_library(error: BaseException) -> str | None:
    """Return the libraries whose absence caused `error`, as arguments of `pip install`, or None."""
    for cause in _causes(error):
        advice = re.search(r"pip install (?:-\S+ +)*['\"]?([A-Za-z][^`'\")\n]*)", str(cause))
        if advice is not None and advice[1].strip() != "transformers":  # that one is only too old
            return advice[1].strip()
        module = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and module and not is_installed(module):
            return module
        required = re.search(r"requires the (\S+) library", str(cause))
        if isinstance(cause, ImportError) and required is not None:
            return required[1].strip("`").lower()
    return None


def needs_library(libraries: str) -> str:
    """Return the end of a message about missing libraries."""
    quoted = f"'{libraries}'" if "=" in libraries else libraries
    return f"needs {' and '.join(libraries.split())}: not installed here, or too old. Run `pip install {quoted}`."


def is_installed(module: str) -> bool:
    """Return whether Python finds a module of this name."""
    return importlib.util.find_spec(module) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
