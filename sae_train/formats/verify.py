"""Verify an export: open it with its own program where that is installed, and compare it with the SAE.

`sae-export --verify` calls it. `scripts/verify_formats.py` does the same for every format and program.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats import peers
from sae_train.formats.comparison import Verified, check_shapes, compare, probes, stretches
from sae_train.formats.foreign import Format
from sae_train.sae.autoencoder import SparseAutoencoder

BUILT_IN = "built-in reader"


def verify_export(format: Format, directory: Path, sae: SparseAutoencoder, *, x: Tensor | None = None) -> Verified:
    """Return the differences between an export and the SAE that was exported.

    The export is opened by the format's own program where that can be imported, else by our reader of the format.
    sae_train.json is not read.

    Args:
        format: the format of the export.
        directory: the directory with the files of the one SAE.
        sae: the SAE that was exported.
        x: raw activations [n, d_model]. Without them, 1024 tokens are made for which the SAE fires: sums of decoder
            rows around `b_dec` plus noise, from a fixed seed (see `comparison.probes`).

    Raises:
        CheckpointError: the program or our reader cannot open the files, or gives codes of other shapes.
    """
    x_ND = probes(sae) if x is None else x.reshape(-1, sae.d_model).float()
    peer, reason = peers.PEERS.get(format.NAME), ""
    if peer is not None:
        try:
            module = peer.imported()
        except Exception as error:  # whatever a package raises that is there and broken
            is_absent = isinstance(error, ModuleNotFoundError) and error.name == peer.module
            reason = "" if is_absent else f" ({peer.name()} cannot be imported: {_line(error)})"
        else:
            return _verified(peer.name(), directory, sae, x_ND, lambda: peer.load(module, directory))
    return _verified(BUILT_IN + reason, directory, sae, x_ND, lambda: _built_in(format, directory))


def _built_in(format: Format, directory: Path) -> peers.Opened:
    file = format.find(directory)
    if file is None:
        raise CheckpointError(f"{directory}: holds no SAE of the format {format.NAME}.")
    sae = format.read(file).sae
    return peers.Opened(sae.encode, sae.decode)


def _verified(
    reader: str, directory: Path, sae: SparseAutoencoder, x_ND: Tensor, opened: Callable[[], peers.Opened]
) -> Verified:
    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        with _explained(directory, reader):
            other = opened()
        for rows_ND in stretches(sae, x_ND):
            with _explained(directory, reader):
                code_NF = other.encode(rows_ND)
                x_hat_ND = other.decode(code_NF)
                check_shapes(sae, rows_ND, code_NF, x_hat_ND)
            yield code_NF, x_hat_ND

    return compare(sae, x_ND, parts(), reader=reader)


@contextmanager
def _explained(directory: Path, reader: str) -> Iterator[None]:
    """Turn the errors of another program into a message for the user. What it prints is dropped."""
    try:
        with peers.quiet(), torch.no_grad():
            yield
    except CheckpointError:
        raise
    except Exception as error:  # from assertions to classes of their own
        raise CheckpointError(
            f"{directory}: {reader} cannot use this export: {_line(error)}. Please report it."
        ) from error


def _line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
