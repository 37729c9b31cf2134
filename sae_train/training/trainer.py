"""The training loop: what happens in a step, and in which order things happen between steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import RunConfig
from sae_train.errors import StoppedByNumbers
from sae_train.harvest.build import Stream
from sae_train.ranks.interface import Ranks
from sae_train.sae.aux_loss import build_aux_loss
from sae_train.sae.firing import Firing
from sae_train.sae.losses import reconstruct
from sae_train.sae.nesting import prefix_sizes
from sae_train.sae.state import Stateful
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import PARAMETRISATIONS, REPLICATED
from sae_train.sparsifiers import build_sparsifier
from sae_train.training.clock import Clock
from sae_train.training.metrics import Totals, firing_row
from sae_train.training.nonfinite import Halt
from sae_train.training.plan import Plan
from sae_train.training.schedule import is_due, learning_rate
from sae_train.training.sphere_adam import build_optimizer

DIVERGED = 100.0
"""FVU at which there is no way back: a reconstruction a hundred times worse than the mean."""
LONGEST_HALF_LIFE = 2_000_000
"""Tokens after which a firing counts half in a feature's moving density."""


@dataclass(slots=True, kw_only=True)
class Events:
    """What the run does between steps; the trainer says when."""

    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[], None]
    checkpoint: Callable[[], None]
    advance: Callable[[int], None]
    stop: Callable[[], None]
    """Called before every step; does not come back where the run is to stop."""
    fill: Callable[[], None]
    """Has the stream harvest for the step. The same; the trainer's state is then that of the step's beginning."""


class Trainer:
    """One SAE learning from one stream. All that it would need to go on is in `state` and `feature_state`.

    A rank holds the tokens of its row of the grid of ranks (all that the row's ranks harvested) and the features of its
    column.

    Attributes:
        features: lo, hi of the features that this rank holds.
        is_screened: whether pre-activations are, by this processor, in this layout.
    """

    def __init__(self, config: RunConfig, plan: Plan, *, stream: Stream, precision: str, ranks: Ranks) -> None:
        if ranks.device.type == "cpu":
            kernels.keep_freed_memory()
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.config, self.plan, self.stream, self.ranks, self.precision = config, plan, stream, ranks, precision
        self.features = ranks.features.slice(plan.n_features)
        self.sparsifier = build_sparsifier(config.sae, plan.sae_sizes, ranks=ranks)
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
        self.aux_loss = build_aux_loss(config.sae, plan.sae_sizes)
        half_life = max(1, min(LONGEST_HALF_LIFE, plan.total_tokens // 8))
        self.firing = Firing(self.dictionary.n_features, half_life_tokens=half_life, device=ranks.device)
        self.optimizer = build_optimizer(
            self.dictionary, config.optimizer, rates={name: each.rate for name, each in extra.items()}
        )
        self.totals = Totals(d_model=plan.d_model, device=ranks.device, n_ranks=ranks.size)
        self.halt = Halt(ranks.device)
        self.n_done = 0
        self._pre_NF: Tensor | None = None  # the largest thing that a step makes: kept from step to step
        kept, own = self.sparsifier.kept_a_token, self.dictionary.n_features
        self.is_screened = kernels.can_screen(n_features=own, kept_a_token=kept, device=ranks.device, dtype=dtype)
        self._clock = Clock()

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks."""
        return self.n_done * self.plan.batch_tokens

    def step_info(self) -> StepInfo:
        """Return where in the run the next step is."""
        rate = self._learning_rate(self.tokens)
        return StepInfo(
            step=self.n_done,
            tokens=self.tokens,
            total_tokens=self.plan.total_tokens,
            batch_tokens=self.plan.batch_tokens,
            learning_rate=rate,
            lost_rate=self._learning_rate(self.tokens, decays=False) - rate,
            seed=self.config.seed,
        )

    def fit(self, events: Events) -> None:
        """Train to the end of the plan.

        Raises:
            StoppedByNumbers: a loss or gradient was not finite, or no feature fires any more.
        """
        while self.n_done < self.plan.steps:
            events.stop()
            before = self.tokens
            self._clock.start(self.plan.batch_tokens)
            events.fill()
            own_NW = self.stream.batch(self.n_done)
            self._clock.harvested()
            self.step(own_NW)
            self._clock.stop()
            events.advance(self.plan.batch_tokens)
            last = self.n_done == self.plan.steps
            if last or is_due(self.config.log_every, before=before, after=self.tokens):
                events.log(self.row())
            if not last and is_due(self.config.evaluate_every, before=before, after=self.tokens):
                events.evaluate()
            if last or is_due(self.plan.checkpoint_every, before=before, after=self.tokens):
                self.halt.check(self.ranks, site=self.plan.label)
                events.checkpoint()

    def step(self, own_NW: Tensor) -> None:
        """Learn from one batch, of which this rank harvested `own_NW`: activations, and gradients where they are read.

        Nothing is read back to the host, but for the number of pairs that matter to a penalised sparsifier, and for
        what Feature Choice works out where its phases change.
        """
        info, dictionary, ranks = self.step_info(), self.dictionary, self.ranks
        own_ND, own_gradient_ND = self._split(own_NW)
        x_ND = ranks.features.gather(own_ND).flatten(0, 1)
        self.sparsifier.before_step(dictionary, halted=self.halt.flag)
        inputs = StepInputs(
            x_ND=x_ND,
            pre_NF=self._pre_activations(x_ND),
            slope_NF=None if own_gradient_ND is None else self._slopes(own_gradient_ND),
            info=info,
            firing=self.firing,
            ranks=ranks,
        )
        code, decoded, penalty = self.sparsifier.encode(dictionary, inputs)
        missed, loss = reconstruct(
            dictionary, x_ND, decoded, sizes=self.prefixes, n_tokens=info.batch_tokens, ranks=ranks
        )
        aux, total = None, loss
        if self.aux_loss is not None:
            aux = self.aux_loss(dictionary, inputs, missed.error)
        for part in (aux, penalty):
            total = total if part is None else total + part
        total.backward()
        norm_N, sum_D = kernels.norms_and_sum(own_ND)
        grad_norm = self._update(loss.detach(), norm_N)
        self.firing.update(code, n_tokens=self.plan.batch_tokens, ranks=ranks)
        self.sparsifier.after_step(dictionary, info=info, firing=self.firing, halted=self.halt.flag)
        first = ranks.features.rank * len(own_ND)
        own = slice(first, first + len(own_ND))
        self.totals.add(
            sum_D=sum_D,
            norm_N=norm_N,
            missed_N=missed.norm[own],
            l0_N=ranks.features.sum(code.l0())[own].long(),
            code=code,
            loss=loss / ranks.features.size,
            aux=None if aux is None else aux / ranks.features.size,
            grad_norm=grad_norm,
            budget=(self.sparsifier.k_at(info) or 0.0) * len(own_ND),
        )
        self.n_done += 1

    def _pre_activations(self, x_ND: Tensor) -> kernels.PreActivations:
        if self._pre_NF is None:
            dtype = torch.bfloat16 if self.is_screened else x_ND.dtype
            self._pre_NF = x_ND.new_empty(len(x_ND), self.dictionary.n_features, dtype=dtype)
        find = self.dictionary.screened if self.is_screened else self.dictionary.pre_activations
        return find(x_ND, out=self._pre_NF)

    def _split(self, own_NW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the activations, and the gradients where the stream brings them."""
        if not self.config.reads_gradients:
            return own_NW, None
        own_ND, gradient_ND = own_NW.split(self.plan.d_model, dim=1)
        return own_ND.contiguous(), gradient_ND.contiguous()

    def _slopes(self, own_gradient_ND: Tensor) -> Tensor:
        """Return the slopes [N, F] of the row's tokens from this rank's own gradients."""
        return self.dictionary.slopes(self.ranks.features.gather(own_gradient_ND).flatten(0, 1))

    def row(self) -> dict[str, Any]:
        """Return the figures since the last row and start the next interval.

        Raises:
            StoppedByNumbers: see `fit`.
        """
        self.halt.check(self.ranks, site=self.plan.label)
        row = self.totals.row(self.ranks) | firing_row(
            self.firing, self.plan.dead_window, n_features=self.plan.n_features, ranks=self.ranks
        )
        advice = self.sparsifier.collapse_advice(self.step_info())
        if row["train/l0"] == 0 and advice is not None:
            raise StoppedByNumbers(
                f"no feature fired in the {self.config.log_every:,} tokens before step {self.n_done}: the dictionary "
                f"has collapsed. Lower optimizer.lr (now {self.plan.peak_lr:.1e}){advice}, and check the "
                "activations."
            )
        if row["train/fvu"] > DIVERGED:
            raise StoppedByNumbers(
                f"FVU is {row['train/fvu']:.3g} over the {self.config.log_every:,} tokens before step {self.n_done}: "
                f"training has diverged. Lower optimizer.lr (now {self.plan.peak_lr:.1e})."
            )
        row["train/learning_rate"] = self._learning_rate(self.tokens - self.plan.batch_tokens)
        row |= self.sparsifier.figures(self.step_info()) | self.stream.figures()
        self.totals.reset()
        self.firing.reset_interval()
        perf = self._clock.row(beside=self.stream.beside_seconds())
        return {"step": self.n_done, "tokens": self.tokens} | row | perf

    def _stateful(self) -> dict[str, Stateful]:
        """Return the parts that say by themselves what of them is saved, by name."""
        aux: dict[str, Stateful] = {} if self.aux_loss is None else {"aux_loss": self.aux_loss}
        return {"sparsifier": self.sparsifier, "firing": self.firing, **aux}

    def state(self) -> dict[str, Tensor]:
        """Return what is the same on every rank: what belongs to no feature and no lane. Collective."""
        parts: dict[str, dict[str, Tensor]] = {
            "dictionary": {name: getattr(self.dictionary, name) for name in REPLICATED},
            "optimizer": {name: value for name, value in self.optimizer.state().items() if not _has_features(name)},
            **{name: dict(part.state().shared) for name, part in self._stateful().items()},
            "stream": self.stream.replicated_state(),
            "totals": self.totals.state(self.ranks),
            "trainer": {"n_done": torch.tensor(self.n_done)},
        }
        return _joined(parts)

    def feature_state(self) -> dict[str, Tensor]:
        """Return what belongs to the features that this rank holds: tensors [hi - lo, ...] for `features`."""
        own = dict(self.dictionary.named_parameters())
        parts: dict[str, dict[str, Tensor]] = {
            "dictionary": {name: value.detach() for name, value in own.items() if name not in REPLICATED},
            "optimizer": {name: value for name, value in self.optimizer.state().items() if _has_features(name)},
            **{name: dict(part.state().by_feature) for name, part in self._stateful().items()},
        }
        return _joined(parts)

    def load_state(
        self,
        state: dict[str, Tensor],
        feature_state: dict[str, Tensor],
        lane_state: Callable[[int], dict[str, Tensor]],
    ) -> None:
        """Go on from `state`, the `feature_state` of the own features and the stream's lanes."""
        both = state | {name: value.to(self.ranks.device) for name, value in feature_state.items()}

        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}/"): v for k, v in both.items() if k.startswith(f"{name}/")}

        with torch.no_grad():
            for name, parameter in self.dictionary.named_parameters():
                parameter.copy_(both[f"dictionary/{name}"])
        self.optimizer.load_state(part("optimizer"))
        for name, each in self._stateful().items():
            each.load_state(part(name))
        self.totals.load_state(part("totals"), self.ranks)
        self.stream.restore(part("stream"), lane_state)
        self.n_done = int(state["trainer/n_done"])

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

    def _update(self, loss: Tensor, norm_N: Tensor) -> Tensor:
        """Sum gradients over ranks, project, clip, step, renormalise; return the gradient's norm.

        Args:
            loss: this rank's share.
            norm_N: of this rank's activations.
        """
        for parameter in self.dictionary.parameters():
            if parameter.grad is not None:
                self.ranks.data.sum_in_place(parameter.grad)
        for name in REPLICATED:  # equal on the ranks of a row but for rounding, which must not add up
            parameter = getattr(self.dictionary, name)
            parameter.grad = self.ranks.features.broadcast(parameter.grad, 0)
        self.optimizer.project()
        norm = self.optimizer.gradient_norm(self.ranks)
        self.halt.watch(step=self.n_done, loss=self.ranks.data.sum(loss), grad_norm=norm, norm_N=norm_N)
        self.optimizer.step(lr=self._learning_rate(self.tokens), norm=norm, halted=self.halt.flag)
        self.optimizer.normalise()
        return norm


def _has_features(name: str) -> bool:
    """Return whether an entry of the optimizer's state, such as 'W_enc.exp_avg', has a row a feature."""
    parameter, _, kind = name.partition(".")
    return parameter not in REPLICATED and kind != "step"


def _joined(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
