"""The grid of ranks that a `parallel` layout asks for, or the reason why it is not possible."""

from sae_train.config import MeshConfig, ParallelConfig
from sae_train.errors import ConfigError
from sae_train.ranks.launcher_env import this_process

SAES = "saes"
"""The layout in which every SAE lives on one rank."""


def owners(sizes: dict[str, int], *, parallel: ParallelConfig, n_ranks: int) -> dict[str, int]:
    """Return the rank of each SAE, so that ranks hold about equally much. Empty unless `parallel=saes`.

    Largest first, each SAE goes to the rank that holds the least so far.

    Args:
        sizes: the number of parameters of each SAE, by name.
    """
    if parallel.layout != SAES:
        return {}
    held = [0] * n_ranks
    found = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = held.index(min(held))
        held[rank] += sizes[name]
        found[name] = rank
    return found


def feature_columns(parallel: ParallelConfig, *, n_ranks: int, n_features: int) -> int:
    """Return the number of ranks that share the features of one copy of the dictionary.

    Raises:
        ConfigError: the layout is not possible with these ranks; the message says what is.
    """
    if parallel.layout == "data":
        return 1
    if parallel.layout == SAES:
        return n_ranks  # all ranks make one row, which gathers a batch; each SAE then learns from it on one rank
    columns = _mesh_columns(parallel, n_ranks) if isinstance(parallel, MeshConfig) else n_ranks
    if columns > n_features:
        raise ConfigError(
            f"parallel={parallel.layout}: {columns} ranks share {n_features} features, and some would have none. "
            f"Use at most {n_features} of them, or raise n_features."
        )
    return columns


def _mesh_columns(parallel: MeshConfig, n_ranks: int) -> int:
    """Return the number of columns of a mesh: typed, or the ranks of this node."""
    possible = [count for count in range(1, n_ranks + 1) if n_ranks % count == 0]
    columns = parallel.feature_ranks
    given = f"parallel.feature_ranks={columns}"
    if columns is None:
        columns = min(this_process().local_size, n_ranks)
        given = f"parallel=mesh with {columns} ranks on this node"
    if n_ranks % columns:
        raise ConfigError(
            f"{given}: {n_ranks} ranks do not divide into rows of {columns}. Set parallel.feature_ranks to one of "
            f"{', '.join(map(str, possible))}."
        )
    return columns
