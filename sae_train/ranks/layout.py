"""How the ranks stand: which layout splits what, worked out from the configuration and refused where it cannot be."""

from sae_train.config import MeshConfig, ParallelConfig
from sae_train.errors import ConfigError
from sae_train.ranks.launcher_env import find_place

LAYOUTS = ("data", "features", "mesh")


def feature_columns(parallel: ParallelConfig, *, n_ranks: int, n_features: int) -> int:
    """Return over how many ranks the features of one copy of the dictionary are spread.

    Raises:
        ConfigError: the ranks cannot stand so; the message says what works.
    """
    if parallel.layout == "data":
        return 1
    columns = _mesh_columns(parallel, n_ranks) if isinstance(parallel, MeshConfig) else n_ranks
    if columns > n_features:
        raise ConfigError(
            f"parallel={parallel.layout}: {columns} ranks share {n_features} features, and some would have none. "
            f"Use at most {n_features} of them, or raise n_features."
        )
    return columns


def _mesh_columns(parallel: MeshConfig, n_ranks: int) -> int:
    possible = [count for count in range(1, n_ranks + 1) if n_ranks % count == 0]
    columns = parallel.feature_ranks
    given = f"parallel.feature_ranks={columns}"
    if columns is None:
        columns = min(find_place().local_size, n_ranks)
        given = f"parallel=mesh with {columns} ranks on this node"
    if n_ranks % columns:
        raise ConfigError(
            f"{given}: {n_ranks} ranks do not stand in rows of {columns}. Set parallel.feature_ranks to one of "
            f"{', '.join(map(str, possible))}."
        )
    return columns
