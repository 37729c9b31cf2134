"""Actions that may fail on one rank, and then fail on every rank."""

from collections.abc import Callable

from sae_train.errors import UserError
from sae_train.ranks.interface import Ranks


def together(action: Callable[[], None], *, ranks: Ranks) -> None:
    """Do `action` on every rank; if any rank raises a UserError, raise it on all of them. Collective."""
    problem: UserError | None = None
    try:
        action()
    except UserError as error:
        problem = error
    ranks.raise_together(problem)


def on_first(action: Callable[[], None], *, ranks: Ranks) -> None:
    """Do `action` on the first rank; if it raises a UserError, raise it on every rank. Collective."""
    together(action if ranks.is_first else _nothing, ranks=ranks)


def _nothing() -> None:
    return None
