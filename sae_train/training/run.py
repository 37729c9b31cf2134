"""One run from its configuration to its verdict. Everything below this module takes the part of the settings it needs.

`run` plans, claims the directory, and trains or resumes; `_train` opens the parts and hands them to a `Session`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sae_train.config import RunConfig, SaeConfig, SourceConfig, as_dict, identity, identity_digest
from sae_train.errors import Preempted, StoppedByNumbers, raise_all
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
from sae_train.training.console import ProgressBar, say, warn
from sae_train.training.hardware import Hardware, load_hardware
from sae_train.training.memory import named_when_it_runs_out
from sae_train.training.names import run_name, sae_names
from sae_train.training.plan import Plan, make_plan
from sae_train.training.plan_text import describe
from sae_train.training.prediction import predict
from sae_train.training.provenance import check_source, provenance, resolve_precision
from sae_train.training.results import results_text
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
    saes: tuple[SaeConfig, ...]
    """The settings of each SAE, at sites that are resolved."""
    source: SourceConfig
    plan: Plan
    facts: StreamFacts
    directory: RunDirectory
    stored: dict[str, Any] | None
    """config.yaml of the run that is resumed, None for a new one."""
    overrides: list[str]
    """The overrides as typed."""
    entered: Callable[[Path], None]
    """Called with the run's directory once this process holds it."""


def run(config: RunConfig, *, saes: Sequence[SaeConfig], overrides: list[str], entered: Callable[[Path], None]) -> int:
    """Train the SAEs of a configuration, or report that they are trained already.

    The ranks stay joined (`ranks.leave`), and from there on all of them leave together after a signal (signals.py).

    Args:
        config: the settings of the run.
        saes: the settings of each SAE, as typed.
        overrides: what was typed, kept in config.yaml.
        entered: called with the run's directory once this process holds it, or once the run in it is found finished.

    Returns:
        The exit status: 0, or 3 where an SAE was stopped.

    Raises:
        UserError: see errors.py; its `status` is the exit status. `Preempted` after a signal, once everything is saved.
    """
    n_ranks, hardware = this_process().size, None
    if config.dry_run and config.plan.devices is not None:
        n_ranks = config.plan.devices
    if config.dry_run and config.plan.hardware is not None:
        hardware = load_hardware(config.plan.hardware)
    show = partial(ProgressBar, is_first=this_process().rank == 0)
    phases = Phases(show=show, alone=signals.leave_early) if n_ranks == 1 else Phases(show=show)
    phases.advance()
    source = config.source_for(saes)
    facts = check_stream(source, n_ranks=n_ranks, phases=phases)
    saes = at_every_site(saes, facts)
    plan = plan_of(config, facts, n_ranks=n_ranks, saes=saes, hardware=hardware)
    by_name = {name: sae.config for name, sae in plan.saes.items()}
    sized = [(sae.config, sae.site, sae.n_features) for sae in plan.saes.values()]
    directory = RunDirectory(Path(config.runs).expanduser() / name_of(config, sized, model=facts.name))
    directory.check_length()
    directory.check_identity(identity(config, by_name))
    phases.advance()
    if config.dry_run:
        if this_process().rank == 0:
            predicted = None if hardware is None else predict(plan, source, facts, hardware)
            say(describe(plan, source, path=str(directory.path), prediction=predicted))
        return 0
    ranks = find_ranks()
    signals.listen()
    check_same_settings(as_dict(config, saes) | {"saes": by_name}, plan, ranks=ranks)
    ranks = ranks.arranged(columns=plan.columns)
    # The first rank's view counts: the others may see a moment later what it has written.
    seen = (directory.result(), directory.stored()) if ranks.is_first else None
    result, stored = ranks.gather_objects(seen)[0]
    before = "" if result is None else "already finished: " if len(plan.saes) == 1 else "already finished:\n"
    if result is None:
        planned = Planned(
            config=config,
            saes=tuple(saes),
            source=source,
            plan=plan,
            facts=facts,
            directory=directory,
            stored=stored,
            overrides=overrides,
            entered=entered,
        )
        result = _train(planned, ranks=ranks)
    elif ranks.is_first:
        entered(directory.path)
    if ranks.is_first:
        say(before + results_text(result, plan, facts, path=directory.path))
    return StoppedByNumbers.status if any("stopped" in figures for figures in result["saes"].values()) else 0


def at_every_site(saes: Sequence[SaeConfig], facts: StreamFacts) -> list[SaeConfig]:
    """Return the settings of each SAE, those for several blocks once for each block."""
    found: list[SaeConfig] = []
    for sae in saes:
        layers = [site.layer or sae.layer for site in facts.sites_of(sae.layer)]
        found += [dataclasses.replace(sae, layer=layer) for layer in layers] if sae.layer.names_several else [sae]
    return found


def plan_of(
    config: RunConfig,
    facts: StreamFacts,
    *,
    n_ranks: int,
    saes: Sequence[SaeConfig] | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        saes: the settings of each SAE; None: of the one SAE of `config`.
        hardware: the hardware whose memory counts; None: this machine's.

    Raises:
        ConfigError: settings contradict each other once the width of the activations is known, or memory is too small.
    """
    saes = [config.sae] if saes is None else saes
    source = config.source_for(saes)
    plan = make_plan(
        source,
        saes,
        facts,
        checkpoint=config.checkpoint,
        parallel=config.parallel,
        n_ranks=n_ranks,
        hardware=hardware,
    )
    problems: list[str] = []
    for sae in plan.saes.values():
        problems += sparsifier_class(sae.config.sparsifier.name).problems(sae.config, sae.sizes)
    raise_all(list(dict.fromkeys(problems)))
    for sae in plan.saes.values():
        prefix_sizes(sae.config.nesting, n_features=sae.n_features)  # and prefixes that are not whole
    return plan


def name_of(config: RunConfig, saes: Sequence[tuple[SaeConfig, str, int]], *, model: str) -> str:
    """Return the name of a run's directory below `runs`: as typed, else as it follows from the settings.

    Args:
        config: the settings of the run.
        saes: settings, label of the site and width of each SAE.
        model: short name of the language model.
    """
    if config.name is not None:
        return config.name
    by_name = dict(zip(sae_names(saes), (sae for sae, _, _ in saes), strict=True))
    return run_name(saes, model=model, digest=identity_digest(identity(config, by_name)))


def _train(planned: Planned, *, ranks: Ranks) -> dict[str, Any]:
    """Train or resume in a directory; return the summary.

    After a signal, leave once the run is saved, its files closed and SLURM told.
    """
    agreement = signals.Agreement(ranks)
    try:
        with named_when_it_runs_out(planned.plan.holdings), ExitStack() as stack:
            session = _begun(planned, agreement=agreement, ranks=ranks, stack=stack)
            session.train()
            return session.finish()
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
    own = identity(config, {name: sae.config for name, sae in planned.plan.saes.items()})
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
        resolved = as_dict(dataclasses.replace(config, precision=precision), planned.saes)
        claim_on_first(directory, resolved, identity=own, record=record, ranks=ranks)
        if ranks.is_first:
            planned.entered(directory.path)
        stream = _stream(planned.source, facts, agreement, phases=phases, ranks=ranks, stack=stack)
        parts = Parts(
            plan=plan,
            facts=facts,
            directory=directory,
            identity=identity_digest(own),
            typed_precision=config.precision,
            precision=precision,
            trainer=build_trainer(planned.source, plan, stream=stream, precision=precision, ranks=ranks),
            saver=saver,
            stopping=stopping,
            phases=phases,
            open_dashboard=lambda: build_dashboard(
                config.tracking, resolved | own, directory.path, several=len(plan.saes) > 1
            ),
            stack=stack,
        )
        session = Session(parts)
        session.begin()
    return session


def _stream(
    source: SourceConfig,
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
    stream = build_stream(source, ranks=ranks, phases=phases, facts=facts)
    stack.callback(stream.close)
    agreement.fills_soon = stream.fills_soon
    check_same_source(facts.record, stream.fingerprint(), ranks=ranks)
    return stream
