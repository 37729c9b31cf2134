"""One SAE that learns: its parameters, and all that changes them in a step."""

from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.errors import StoppedByNumbers
from sae_train.ranks.interface import Ranks
from sae_train.sae.aux_loss import build_aux_loss
from sae_train.sae.code import Code
from sae_train.sae.firing import Firing
from sae_train.sae.losses import Errors, reconstruct
from sae_train.sae.nesting import prefix_sizes
from sae_train.sae.state import State, joined
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import PARAMETRISATIONS, REPLICATED
from sae_train.sparsifiers import build_sparsifier
from sae_train.training.batch import RowBatch
from sae_train.training.metrics import Totals, firing_row
from sae_train.training.nonfinite import NonFinite
from sae_train.training.optimizer import Adam
from sae_train.training.sae_plan import SaePlan
from sae_train.training.schedule import learning_rate
from sae_train.training.scratch import Scratch

DIVERGED = 100.0
"""FVU at which there is no way back: a reconstruction a hundred times worse than the mean."""
DENSITY_HALF_LIFE = 2_000_000
"""Tokens after which a firing counts half in a feature's moving density."""


class Learner:
    """One SAE and everything that belongs to it alone. `Trainer` calls it at every step and holds the stream.

    A rank holds the features of its column of the grid of ranks.

    Attributes:
        name: the SAE's name in checkpoints, metrics and summaries.
        features: lo, hi of the features that this rank holds.
        is_approximate: whether pre-activations come from a bf16 product that only finds candidates.
    """

    def __init__(self, plan: SaePlan, *, precision: str, ranks: Ranks, scratch: Scratch) -> None:
        """Args:
        plan: settings and numbers of the SAE.
        precision: of matrix products, with 'auto' resolved.
        ranks: the grid of ranks that hold the features of this SAE.
        scratch: memory for pre-activations, which SAEs share.
        """
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.name, self.config, self.plan, self.ranks, self.precision = plan.name, plan.config, plan, ranks, precision
        config, self._scratch = plan.config, scratch
        self.features = ranks.features.slice(plan.n_features)
        self.sparsifier = build_sparsifier(config, plan.sizes, ranks=ranks)
        extra = self.sparsifier.extra_parameters()
        self.dictionary = PARAMETRISATIONS[config.parametrisation.name].initial(
            d_model=plan.d_model,
            n_features=plan.n_features,
            seed=config.seed,
            dtype=dtype,
            device=ranks.device,
            features=self.features,
            precision=precision,
            has_unit_norms=self.sparsifier.has_unit_norms,
            extra=extra,
        )
        self.prefixes = prefix_sizes(config.nesting, n_features=plan.n_features)
        self.aux_loss = build_aux_loss(config, plan.sizes)
        half_life = max(1, min(DENSITY_HALF_LIFE, plan.total_tokens // 8))
        self.firing = Firing(self.dictionary.n_features, half_life_tokens=half_life, device=ranks.device)
        rates = {name: each.rate for name, each in extra.items()}
        self.optimizer = Adam(self.dictionary, config.optimizer, rates=rates)
        self.totals = Totals(d_model=plan.d_model, ranks=ranks)
        self.nonfinite = NonFinite(ranks.device)
        reads_fp32 = self.sparsifier.reads_all or kernels.writes_fp32(ranks.device)
        self.is_approximate = precision == "bf16" and not reads_fp32

    def step_info(self, step: int) -> StepInfo:
        """Return the position of a step, counted from 0, in this SAE's schedules."""
        tokens = step * self.plan.batch_tokens
        rate = self._learning_rate(tokens)
        return StepInfo(
            step=step,
            tokens=tokens,
            total_tokens=self.plan.total_tokens,
            batch_tokens=self.plan.batch_tokens,
            learning_rate=rate,
            lost_rate=self._learning_rate(tokens, decays=False) - rate,
            seed=self.config.seed,
        )

    def step(self, batch: RowBatch, *, step: int) -> None:
        """Learn from one batch; `step` counts from 0.

        Nothing is read back to the host, but for the number of pairs of a penalised sparsifier, and for the densities
        that Feature Choice fits where its phases change.
        """
        info, x_ND, dictionary, sparsifier = self.step_info(step), batch.x_ND, self.dictionary, self.sparsifier
        sparsifier.before_step(dictionary, halted=self.nonfinite.flag)
        inputs = StepInputs(
            x_ND=x_ND,
            pre_NF=self._pre_activations(x_ND),
            slope_NF=None if batch.gradient_ND is None else dictionary.slopes(batch.gradient_ND),
            info=info,
            firing=self.firing,
            ranks=self.ranks,
        )
        code, decoded, penalty = sparsifier.encode(dictionary, inputs)
        errors, loss = self.reconstruct(x_ND, decoded)
        aux, total = None, loss
        if self.aux_loss is not None:
            aux = self.aux_loss(dictionary, inputs, errors.error)
        for part in (aux, penalty):
            total = total if part is None else total + part
        total.backward()
        grad_norm = self._update(info, loss=loss.detach(), norm_N=batch.norm_N)
        self.firing.update(code, n_tokens=info.batch_tokens, ranks=self.ranks)
        sparsifier.after_step(dictionary, info=info, firing=self.firing, halted=self.nonfinite.flag)
        self._add_to_totals(batch, info, code=code, errors=errors, loss=loss, aux=aux, grad_norm=grad_norm)

    def reconstruct(self, x_ND: Tensor, code: Code) -> tuple[Errors, Tensor]:
        """Return the error of the reconstruction from all features, and the loss."""
        sizes, n_tokens = self.prefixes, self.plan.batch_tokens
        return reconstruct(self.dictionary, x_ND, code, sizes=sizes, n_tokens=n_tokens, ranks=self.ranks)

    def row(self, *, step: int, interval: int) -> dict[str, Any]:
        """Return the figures of the steps since the last row, and start the next interval. Collective.

        Args:
            step: number of steps made so far.
            interval: tokens between rows, for messages.

        Raises:
            StoppedByNumbers: a loss or gradient was not finite, no feature fires any more, or training has diverged.
        """
        self.check_finite()
        info = self.step_info(step)
        row = self.totals.row() | firing_row(
            self.firing, self.plan.dead_window, n_features=self.plan.n_features, ranks=self.ranks
        )
        self._check_sane(row, info, interval=interval)
        row["train/learning_rate"] = self._learning_rate(info.tokens - info.batch_tokens)
        row |= self.sparsifier.figures(info)
        self.totals.reset()
        self.firing.reset_interval()
        return row

    def check_finite(self) -> None:
        """Raise StoppedByNumbers on every rank if a loss or gradient was not finite. Collective."""
        self.nonfinite.check(self.ranks)

    def dead_fraction(self) -> float:
        """Return the share of all features that is dead by training's own counters. Collective."""
        dead = self.firing.dead_F(self.plan.dead_window).sum()
        return int(self.ranks.features.sum(dead)) / self.plan.n_features

    def state(self) -> State:
        """Return all that this SAE needs to continue. Collective."""
        own = {name: value.detach() for name, value in self.dictionary.named_parameters()}
        return joined(
            {
                "dictionary": _split(own),
                "optimizer": _split(self.optimizer.state()),
                "sparsifier": self.sparsifier.state(),
                "firing": self.firing.state(),
                "aux_loss": State({}, {}) if self.aux_loss is None else self.aux_loss.state(),
                "totals": self.totals.state(),
            }
        )

    def load_state(self, state: State) -> None:
        """Continue from a `state()` of these features, whatever number of ranks it was made on."""
        state = State(state.shared, {name: value.to(self.ranks.device) for name, value in state.features.items()})
        with torch.no_grad():
            for name, value in _merged(state.part("dictionary")).items():
                self.dictionary.get_parameter(name).copy_(value)
        self.dictionary.moved()
        self.optimizer.load_state(_merged(state.part("optimizer")))
        self.sparsifier.load_state(state.part("sparsifier"))
        self.firing.load_state(state.part("firing"))
        if self.aux_loss is not None:
            self.aux_loss.load_state(state.part("aux_loss"))
        self.totals.load_state(state.part("totals"))

    def _pre_activations(self, x_ND: Tensor) -> kernels.PreActivations:
        dictionary, dtype = self.dictionary, torch.bfloat16 if self.is_approximate else x_ND.dtype
        out_NF = self._scratch.matrix(len(x_ND), dictionary.n_features, dtype=dtype, device=x_ND.device)
        find = dictionary.approximate_pre_activations if self.is_approximate else dictionary.pre_activations
        return find(x_ND, out=out_NF)

    def _update(self, info: StepInfo, *, loss: Tensor, norm_N: Tensor) -> Tensor:
        """Sum gradients over ranks, project, clip, step, renormalise; return the gradient's norm.

        Args:
            info: of this step.
            loss: this rank's summand of the loss.
            norm_N: norms of the activations that this rank harvested.
        """
        ranks = self.ranks
        for parameter in self.dictionary.parameters():
            if parameter.grad is not None:
                ranks.data.sum_in_place(parameter.grad)
        for name in REPLICATED:  # equal on the ranks of a row but for rounding, which must not add up
            parameter = getattr(self.dictionary, name)
            parameter.grad = ranks.features.broadcast(parameter.grad, 0)
        norm = self.optimizer.gradient_norm(ranks)
        self.nonfinite.watch(step=info.step, loss=ranks.data.sum(loss), grad_norm=norm, norm_N=norm_N)
        self.optimizer.step(lr=info.learning_rate, norm=norm, halted=self.nonfinite.flag)
        return norm

    def _add_to_totals(
        self,
        batch: RowBatch,
        info: StepInfo,
        *,
        code: Code,
        errors: Errors,
        loss: Tensor,
        aux: Tensor | None,
        grad_norm: Tensor,
    ) -> None:
        columns, n_own = self.ranks.features, len(batch.norm_N)
        self.totals.add(
            sum_D=batch.sum_D,
            norm_N=batch.norm_N,
            missed_N=errors.norm[batch.own],
            l0_N=columns.sum(code.l0())[batch.own].long(),
            code=code,
            loss=loss / columns.size,
            aux=None if aux is None else aux / columns.size,
            grad_norm=grad_norm,
            budget=(self.sparsifier.k_at(info) or 0.0) * n_own,
        )

    def _check_sane(self, row: dict[str, Any], info: StepInfo, *, interval: int) -> None:
        """Raise StoppedByNumbers if the interval's figures show that the SAE has collapsed or diverged."""
        when, lower = f"{interval:,} tokens before step {info.step}", f"optimizer.lr (now {self.plan.peak_lr:.1e})"
        advice = self.sparsifier.collapse_advice(info)
        if row["train/l0"] == 0 and advice is not None:
            raise StoppedByNumbers(
                f"no feature fired in the {when}: the dictionary has collapsed. Lower {lower}{advice}, "
                "and check the activations."
            )
        if row["train/fvu"] > DIVERGED:
            raise StoppedByNumbers(
                f"FVU is {row['train/fvu']:.3g} over the {when}: training has diverged. Lower {lower}."
            )

    def _learning_rate(self, tokens: int, *, decays: bool = True) -> float:
        plan = self.plan
        return learning_rate(
            tokens,
            peak=plan.peak_lr,
            batch_tokens=plan.batch_tokens,
            warmup_tokens=plan.warmup_tokens,
            decay_tokens=plan.decay_tokens if decays else 0,
            total_tokens=plan.total_tokens,
        )


def _split(entries: dict[str, Tensor]) -> State:
    """Return entries such as 'W_enc' or 'W_enc.exp_avg' as a state: those with a row a feature, and the others."""

    def has_features(name: str) -> bool:
        parameter, _, kind = name.partition(".")
        return parameter not in REPLICATED and kind != "step"

    return State(
        {name: value for name, value in entries.items() if not has_features(name)},
        {name: value for name, value in entries.items() if has_features(name)},
    )


def _merged(state: State) -> dict[str, Tensor]:
    return state.shared | state.features
