"""The predicted time and cost of a run on some hardware, from counts of its work and rates of the hardware.

Nothing here measures. `docs/plan.md` compares predictions for a CPU with measured steps. No GPU has been compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sae_train.config import SourceConfig
from sae_train.harvest.build import StreamFacts
from sae_train.training.hardware import Hardware
from sae_train.training.harvest_work import evaluation_work, harvest_work, model_precision
from sae_train.training.plan import Plan
from sae_train.training.sae_plan import SaePlan
from sae_train.training.work import FLOAT, Share, Work, step_work

HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted times of a run, of its slowest rank. `predict` makes it for the plan's text."""

    hardware: Hardware
    devices: int
    training: dict[str, float]
    """Seconds a step of each part of training, over the SAEs of the rank."""
    harvest: dict[str, float]
    """Seconds a step of each part of the harvest."""
    saes: dict[str, float]
    """Seconds a step of each SAE on a rank that trains it."""
    start_seconds: float
    """Seconds until the pools are full."""
    held_out_seconds: float
    """Seconds of all thresholds and evaluations."""
    steps: int
    batch_tokens: int
    overlaps: bool
    """Whether a step and its harvest run at the same time: on a GPU, unless harvest.prefetch=0 turns that off."""

    @property
    def training_seconds(self) -> float:
        """Seconds that a step takes without its harvest."""
        return sum(self.training.values())

    @property
    def step_seconds(self) -> float:
        """Seconds a step."""
        both = self.training_seconds, sum(self.harvest.values())
        return max(both) if self.overlaps else sum(both)

    @property
    def tokens_per_second(self) -> float:
        return self.batch_tokens / self.step_seconds

    @property
    def hours(self) -> float:
        """Hours of the whole run, its evaluations included."""
        return (self.start_seconds + self.steps * self.step_seconds + self.held_out_seconds) / HOUR

    @property
    def cost(self) -> float:
        """US dollars of the whole run on all devices."""
        return self.hours * self.devices * self.hardware.price

    @property
    def cost_of_an_sae(self) -> float:
        """US dollars of an SAE, mean over the run's SAEs."""
        return self.cost / len(self.saes)


def predict(plan: Plan, source: SourceConfig, facts: StreamFacts, hardware: Hardware) -> Prediction:
    """Return the predicted times of a run on `plan.n_ranks` devices of this hardware."""
    precision = hardware.resolved(source.precision)
    own = {name: _seconds(_share(sae, plan, hardware, precision), hardware, precision)
           for name, sae in plan.saes.items()}  # fmt: skip
    here = _slowest_rank(own, plan)
    training = _summed(own[name] for name in here)
    sites = {sae.site: sae.d_model for sae in plan.saes.values()}
    if plan.columns > 1:
        sent = sum(_gathered_bytes(d_model, plan) for d_model in sites.values())
        gather = hardware.seconds(Work(sent=sent), precision=precision)
        training["communication"] = training.get("communication", 0.0) + gather
    n_tokens = plan.batch_tokens / plan.n_ranks
    works = harvest_work(source, facts, widths=list(sites.values()), n_tokens=n_tokens, n_ranks=plan.n_ranks)
    harvest = {name: hardware.seconds(work, precision=model_precision(source)) for name, work in works.items()}
    model, encoders = evaluation_work(source, facts, [plan.saes[name] for name in here], n_sites=len(sites))
    held_out = hardware.seconds(model, precision=model_precision(source))
    held_out += hardware.seconds(encoders, precision=precision)
    readers = 1 if plan.owners else plan.n_ranks
    return Prediction(
        hardware=hardware,
        devices=plan.n_ranks,
        training=training,
        harvest=harvest,
        saes={name: sum(parts.values()) for name, parts in own.items()},
        start_seconds=sum(harvest.values()) * (0 if facts.sizes is None else facts.sizes.pool_batches),
        held_out_seconds=plan.held_out.times * held_out / readers,
        steps=plan.steps,
        batch_tokens=plan.batch_tokens,
        overlaps=hardware.overlaps and source.harvest.prefetch != 0,
    )


def _share(sae: SaePlan, plan: Plan, hardware: Hardware, precision: str) -> Share:
    """Return the part of an SAE's step that a rank computes: all of it where the SAE lives on one rank."""
    columns, rows = (1, 1) if plan.owners else (plan.columns, plan.n_ranks // plan.columns)
    on_gpu = hardware.kind == "gpu"
    return Share(
        config=sae.config,
        sizes=sae.sizes,
        rows=rows,
        columns=columns,
        on_gpu=on_gpu,
        finds_candidates=precision == "bf16" and not on_gpu,
    )


def _seconds(share: Share, hardware: Hardware, precision: str) -> dict[str, float]:
    return {name: hardware.seconds(work, precision=precision) for name, work in step_work(share).items()}


def _slowest_rank(own: dict[str, dict[str, float]], plan: Plan) -> list[str]:
    """Return the SAEs of the rank whose SAEs take the longest: all of them, unless each lives on one rank."""
    ranks = sorted(set(plan.owners.values()))
    on_rank = [[name for name in own if plan.owners[name] == rank] for rank in ranks] or [list(own)]
    return max(on_rank, key=lambda names: sum(sum(own[name].values()) for name in names))


def _gathered_bytes(d_model: int, plan: Plan) -> float:
    """Return the bytes that a rank receives of a site's batch: the rows of the other ranks of its row."""
    row_tokens = plan.batch_tokens * plan.columns / plan.n_ranks
    return FLOAT * row_tokens * d_model * (plan.columns - 1) / plan.columns


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the sum of each part, in the order in which parts are first met."""
    found: dict[str, float] = {}
    for each in parts:
        for name, seconds in each.items():
            found[name] = found.get(name, 0.0) + seconds
    return found
