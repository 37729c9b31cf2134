"""One run from configuration to verdict: plan, claim the directory, train or resume, export, report."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sae_train.config import RunConfig, identity, identity_digest
from sae_train.errors import Preempted, raise_all
from sae_train.harvest.build import StreamFacts, check_stream
from sae_train.phases import Phases
from sae_train.ranks.distributed import find_ranks
from sae_train.ranks.interface import Ranks
from sae_train.ranks.launcher_env import this_process
from sae_train.sae.nesting import prefix_sizes
from sae_train.sparsifiers import sparsifier_class
from sae_train.training import signals
from sae_train.training.console import ProgressBar, say, verdict_of, warn
from sae_train.training.memory import named_when_it_runs_out
from sae_train.training.names import run_name
from sae_train.training.plan import Plan, describe, make_plan
from sae_train.training.run_directory import RunDirectory
from sae_train.training.same_on_ranks import check_alike
from sae_train.training.session import Session


def run(config: RunConfig, *, overrides: list[str], entered: Callable[[Path], None]) -> int:
    """Train what `config` describes, or say that it is done already.

    The ranks stay joined (`ranks.leave`), and from there on all of them leave together after a signal (signals.py).

    Args:
        overrides: what was typed, kept in config.yaml.
        entered: called with the run's directory once this process holds it, or once the run in it is found finished.

    Returns:
        The exit status, 0.

    Raises:
        UserError: see errors.py; its `status` is the exit status. `Preempted` after a signal, once everything is saved.
    """
    n_ranks = this_process().size
    show = partial(ProgressBar, is_first=this_process().rank == 0)
    phases = Phases(show=show, alone=signals.leave_early) if n_ranks == 1 else Phases(show=show)
    phases.advance()
    facts = check_stream(config.source, n_ranks=n_ranks, phases=phases)
    plan = make_plan(config, facts, n_ranks=n_ranks)
    raise_all(sparsifier_class(config.sparsifier.name).problems(config.sae, plan.sae_sizes))
    prefix_sizes(config.nesting, n_features=plan.n_features)  # and prefixes that are not whole
    name = name_of(config, site=plan.label, n_features=plan.n_features)
    directory = RunDirectory(Path(config.runs).expanduser() / name)
    directory.check_length()
    directory.check_identity(config)
    phases.advance()
    if config.dry_run:
        if this_process().rank == 0:
            say(describe(plan, config, path=str(directory.path)))
        return 0
    ranks = find_ranks()
    signals.listen()
    check_alike(config, plan, ranks=ranks)
    ranks = ranks.arranged(columns=plan.columns)
    # of what is there the first rank's view counts: others may see a moment later what it has written
    seen = (directory.result(), directory.stored()) if ranks.is_first else None
    result, stored = ranks.gather_objects(seen)[0]
    if result is None:
        parts: dict[str, Any] = {"directory": directory, "stored": stored, "overrides": overrides, "entered": entered}
        _train(config, plan, facts, **parts, ranks=ranks)
    elif ranks.is_first:
        entered(directory.path)
        say(f"already finished: {verdict_of(result, path=directory.path, sparsity=config.sparsity)}")
    return 0


def name_of(config: RunConfig, *, site: str, n_features: int) -> str:
    """Return the name of a run's directory below `runs`: as typed, else as it follows from the settings."""
    if config.name is not None:
        return config.name
    digest = identity_digest(identity(config))
    return run_name(config.sae, site=site, n_features=n_features, digest=digest)


def _train(config: RunConfig, plan: Plan, facts: StreamFacts, *, ranks: Ranks, **parts: Any) -> None:
    """Make the run; after a signal leave once it is saved, its files are closed and SLURM knows."""
    agreement = signals.Agreement(ranks)
    try:
        with named_when_it_runs_out(plan.holdings), ExitStack() as stack:
            Session(config, plan, facts, **parts, agreement=agreement, ranks=ranks, stack=stack).go()
    except Preempted:
        if ranks.is_first:
            notice = signals.requeue(agreement.wish | signals.wish())
            if notice:
                warn(notice)
        ranks.barrier()  # a rank that leaves before may have the launcher end the first one in the middle of this
        raise
