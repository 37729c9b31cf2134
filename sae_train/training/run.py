"""One run from its configuration to its verdict. Everything below this module takes the part of the settings it needs.

`run` plans, claims the directory, and trains or resumes; `_train` opens the parts and hands them to a `Session`.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae_train.config import RunConfig, as_dict, identity, identity_digest
from sae_train.errors import Preempted, raise_all
from sae_train.harvest.build import Stream, StreamFacts, build_stream, check_stream
from sae_train.phases import Phases
from sae_train.ranks.distributed import find_ranks
from sae_train.ranks.interface import Ranks
from sae_train.ranks.launcher_env import this_process
from sae_train.sae.nesting import prefix_sizes
from sae_train.sparsifiers import sparsifier_class
from sae_train.training import signals
from sae_train.training.checkpoint import Saver
from sae_train.training.claiming import abandoned_if_refused, claim_on_first
from sae_train.training.console import ProgressBar, say, verdict_of, warn
from sae_train.training.memory import named_when_it_runs_out
from sae_train.training.names import run_name
from sae_train.training.plan import Plan, make_plan
from sae_train.training.plan_text import describe
from sae_train.training.provenance import check_source, provenance, resolve_precision
from sae_train.training.run_directory import RunDirectory
from sae_train.training.same_on_ranks import check_same_settings, check_same_source
from sae_train.training.session import Parts, Session
from sae_train.training.stopping import Stopping
from sae_train.training.tracking import build_dashboard
from sae_train.training.trainer import build_trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What is known of a run before its ranks claim the directory. `run` makes it."""

    config: RunConfig
    plan: Plan
    facts: StreamFacts
    directory: RunDirectory
    stored: dict[str, Any] | None
    """config.yaml of the run that is resumed, None for a new one."""
    overrides: list[str]
    """The overrides as typed."""
    entered: Callable[[Path], None]
    """Called with the run's directory once this process holds it."""


def run(config: RunConfig, *, overrides: list[str], entered: Callable[[Path], None]) -> int:
    """Train the SAE of a configuration, or report that it is trained already.

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
    plan = plan_of(config, facts, n_ranks=n_ranks)
    name = name_of(config, site=facts.label, n_features=plan.sae.n_features)
    directory = RunDirectory(Path(config.runs).expanduser() / name)
    directory.check_length()
    directory.check_identity(identity(config))
    phases.advance()
    if config.dry_run:
        if this_process().rank == 0:
            say(describe(plan, config.source, config.sae, path=str(directory.path)))
        return 0
    ranks = find_ranks()
    signals.listen()
    check_same_settings(as_dict(config), plan, ranks=ranks)
    ranks = ranks.arranged(columns=plan.columns)
    # The first rank's view counts: the others may see a moment later what it has written.
    seen = (directory.result(), directory.stored()) if ranks.is_first else None
    result, stored = ranks.gather_objects(seen)[0]
    if result is None:
        planned = Planned(
            config=config,
            plan=plan,
            facts=facts,
            directory=directory,
            stored=stored,
            overrides=overrides,
            entered=entered,
        )
        _train(planned, ranks=ranks)
    elif ranks.is_first:
        entered(directory.path)
        say(f"already finished: {verdict_of(result, path=directory.path, sparsity=config.sparsity)}")
    return 0


def plan_of(config: RunConfig, facts: StreamFacts, *, n_ranks: int) -> Plan:
    """Return the plan of a run.

    Raises:
        ConfigError: settings contradict each other once the width of the activations is known, or memory is too small.
    """
    plan = make_plan(
        config.source, config.sae, facts, checkpoint=config.checkpoint, parallel=config.parallel, n_ranks=n_ranks
    )
    raise_all(sparsifier_class(config.sparsifier.name).problems(config.sae, plan.sae.sizes))
    prefix_sizes(config.nesting, n_features=plan.sae.n_features)  # and prefixes that are not whole
    return plan


def name_of(config: RunConfig, *, site: str, n_features: int) -> str:
    """Return the name of a run's directory below `runs`: as typed, else as it follows from the settings."""
    if config.name is not None:
        return config.name
    digest = identity_digest(identity(config))
    return run_name(config.sae, site=site, n_features=n_features, digest=digest)


def _train(planned: Planned, *, ranks: Ranks) -> None:
    """Train or resume in a directory. After a signal, leave once the run is saved, its files closed and SLURM told."""
    agreement = signals.Agreement(ranks)
    try:
        with named_when_it_runs_out(planned.plan.holdings), ExitStack() as stack:
            session = _begun(planned, agreement=agreement, ranks=ranks, stack=stack)
            session.train()
            session.finish()
    except Preempted:
        if ranks.is_first:
            notice = signals.requeue(agreement.wish | signals.wish())
            if notice:
                warn(notice)
        ranks.barrier()  # a rank that leaves before may have the launcher end the first one in the middle of this
        raise


def _begun(planned: Planned, *, agreement: signals.Agreement, ranks: Ranks, stack: ExitStack) -> Session:
    """Return the session of a run that holds its directory and has its data and weights. Collective; see `_train`."""
    config, facts, directory, stored = planned.config, planned.facts, planned.directory, planned.stored
    precision = resolve_precision(config.precision, stored=stored, device=ranks.device)
    plan = planned.plan.as_begun(stored["plan"]) if stored else planned.plan
    check_source(facts.record, stored=stored, path=directory.path)
    saver = Saver(directory.checkpoints, config.checkpoint, ranks=ranks)
    stopping = Stopping(agreement, newest_saved=saver.newest, ranks=ranks)
    show = partial(ProgressBar, is_first=ranks.is_first)
    phases = Phases(show=show, alone=stopping.alone, together=stopping.together)
    stack.callback(directory.release)
    with abandoned_if_refused(directory, ranks=ranks):
        record = {"plan": plan.resolved(), "source": facts.record, "provenance": provenance(planned.overrides)}
        resolved = as_dict(dataclasses.replace(config, precision=precision))
        claim_on_first(directory, resolved, identity=identity(config), record=record, ranks=ranks)
        if ranks.is_first:
            planned.entered(directory.path)
        stream = _stream(config, facts, agreement, phases=phases, ranks=ranks, stack=stack)
        parts = Parts(
            plan=plan,
            facts=facts,
            directory=directory,
            identity=identity_digest(identity(config)),
            typed_precision=config.precision,
            precision=precision,
            trainer=build_trainer(config.source, [config.sae], plan, stream=stream, precision=precision, ranks=ranks),
            saver=saver,
            stopping=stopping,
            phases=phases,
            open_dashboard=lambda: build_dashboard(config.tracking, as_dict(config), directory.path),
            stack=stack,
        )
        session = Session(parts)
        session.begin()
    return session


def _stream(
    config: RunConfig,
    facts: StreamFacts,
    agreement: signals.Agreement,
    *,
    phases: Phases,
    ranks: Ranks,
    stack: ExitStack,
) -> Stream:
    """Return the run's stream, which `stack` closes.

    Raises:
        UserError: it cannot be opened, or the ranks see different data under the same name.
    """
    phases.meet()
    stream = build_stream(config.source, ranks=ranks, phases=phases, facts=facts)
    stack.callback(stream.close)
    agreement.fills_soon = stream.fills_soon
    check_same_source(facts.record, stream.fingerprint(), ranks=ranks)
    return stream
