"""Names that are local paths or ids of the Hugging Face hub, and messages for failures of the hub or of a library."""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sae_train.errors import CheckpointError, DataError

SCHEME = "hf://"
_ID = r"[A-Za-z0-9][\w.-]*"

_GATED = re.compile(r"access a gated repo|is a gated repo|gated dataset", re.IGNORECASE)
"""Words of errors without a class of their own. A missing repository is reported with "a private or gated repo"."""
_OFFLINE = {
    "LocalEntryNotFoundError",
    "IncompleteSnapshotError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "gaierror",
}
_MISSING = {"RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError", "EntryNotFoundError",
            "RemoteEntryNotFoundError"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """An SAE's place on the Hub. `address_of` makes it, and `formats/hub_files.py` fetches it."""

    repo: str
    """ORG/NAME."""
    revision: str | None
    """Branch, tag or commit. None for the newest of the main branch."""
    inside: str
    """Folder or file in the repository, without slashes at its ends. Empty for all of it."""
    text: str
    """As typed."""


def address_of(text: str) -> Address:
    """Return the parts of `hf://ORG/NAME[@REVISION][/FOLDER]`.

    Raises:
        CheckpointError: it has another form.
    """
    found = re.fullmatch(rf"{SCHEME}({_ID}/{_ID})(?:@([^/@]+))?((?:/[^/]+)*)/?", text)
    inside = "" if found is None else found[3].strip("/")
    if found is None or {".", ".."} & set(inside.split("/")):
        raise CheckpointError(f"{text}: not an address on the Hub. Write {SCHEME}ORG/NAME, {SCHEME}ORG/NAME/FOLDER or "
                              f"{SCHEME}ORG/NAME@REVISION/FOLDER.")  # fmt: skip
    return Address(repo=found[1], revision=found[2], inside=inside, text=text)


def hub_error(key: str, name: str, error: BaseException) -> DataError:
    """Return the message for a failure to load `key`=`name`.

    The cause is found by the class names of nested errors, because the libraries wrap each other's errors.
    """
    kinds, reason = kinds_of(error), hub_reason(error)
    if reason is not None:
        return DataError(f"{key}={name}: {reason}")
    if kinds & _MISSING:
        return DataError(
            f"{key}={name}: neither a local path nor found on the Hugging Face hub. Correct the id; a private one "
            "needs `hf auth login`."
        )
    return DataError(f"{key}={name}: cannot be loaded: {first_line(error)}")


def hub_reason(error: BaseException) -> str | None:
    """Return the reason of a failure to read from the Hub: terms, network or revision; None for another failure."""
    kinds = kinds_of(error)
    if "GatedRepoError" in kinds or any(_GATED.search(str(cause)) for cause in _causes(error)):
        return (
            "gated on the Hugging Face hub. Accept its terms on its page there, then log in with `hf auth login` or "
            "set HF_TOKEN."
        )
    if is_offline(error):
        return (
            "not in the local cache, and the Hugging Face hub cannot be reached. Connect, fetch it first where there "
            "is a network, or give a local directory."
        )
    if "RevisionNotFoundError" in kinds:
        return "the hub has no such revision of it. Correct the revision or leave it null."
    return None


def address_error(address: Address, error: BaseException) -> CheckpointError:
    """Return the message for a failure to fetch an SAE."""
    if "RevisionNotFoundError" in kinds_of(error):
        return CheckpointError(f"{address.text}: the Hugging Face hub has no revision {address.revision!r} of "
                               f"{address.repo}. Correct it, or leave it out for the newest.")  # fmt: skip
    reason = hub_reason(error)
    if reason is not None:
        return CheckpointError(f"{address.text}: {reason}")
    if kinds_of(error) & _MISSING:
        return CheckpointError(
            f"{address.text}: the Hugging Face hub has no {address.repo}, or it is private. Correct the id, or log in "
            "with `hf auth login` or HF_TOKEN."
        )
    return CheckpointError(f"{address.text}: cannot be fetched: {first_line(error)}")


def push_error(repo: str, error: BaseException, *, account: str | None = None) -> CheckpointError:
    """Return the message for a failure to push.

    Args:
        repo: ORG/NAME, as typed.
        error: the failure.
        account: name of the account that the token belongs to, where it is known to be valid.
    """
    kinds = kinds_of(error)
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error)}
    start = f"--push {repo}: "
    if "HFValidationError" in kinds:
        return CheckpointError(f"{start}not an id on the Hugging Face hub. Write ORG/NAME, of letters, digits, '-', "
                               "'_' and '.'.")  # fmt: skip
    if "LocalTokenNotFoundError" in kinds:
        return CheckpointError(f"{start}needs a token of the Hugging Face hub. Log in with `hf auth login`, or set "
                               "HF_TOKEN to a token that may write.")  # fmt: skip
    if account is None and 401 in statuses:
        return CheckpointError(f"{start}the Hugging Face hub does not accept this token. Log in again with `hf auth "
                               "login`, or correct HF_TOKEN.")  # fmt: skip
    if is_offline(error):
        return CheckpointError(f"{start}the Hugging Face hub cannot be reached. Connect, or write the card with --card "
                               "and push later.")  # fmt: skip
    if account is not None and statuses & {401, 403, 404}:
        namespace = repo.partition("/")[0]
        return CheckpointError(f"{start}there is no namespace {namespace!r} in which the account {account!r} may write "
                               "with this token. Correct ORG, or take a token that may write there.")  # fmt: skip
    return CheckpointError(f"{start}failed: {first_line(error)}")


def is_offline(error: BaseException) -> bool:
    """Return whether an error comes from a network that cannot be reached, or must not be used."""
    return bool(kinds_of(error) & _OFFLINE)


def kinds_of(error: BaseException) -> set[str]:
    """Return the class names of an error and of the errors that it comes from."""
    return {type(cause).__name__ for cause in _causes(error)}


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
