"""What replacing activations by their reconstructions costs the language model."""

import torch

from sae_train.evaluation.metric import EvaluationBatch, Metric, Subject, Sums
from sae_train.evaluation.sharded_forward import Reconstruction
from sae_train.ranks.interface import Ranks


class LanguageModelLoss(Metric):
    """ce, delta_ce, kl and ce_recovered, in nats a token but for the last, which is a share.

    - ce = cross-entropy of the clean model.
    - delta_ce = CE with reconstructions spliced in - ce.
    - kl = mean of KL(clean || spliced).
    - ce_recovered = (CE zeroed - CE spliced) / (CE zeroed - ce), where zeroed has zeros for the activations.

    Positions whose activation was filtered (special tokens, outliers) keep it and are left out of the means. So is the
    last position of a context, which predicts nothing.
    """

    in_rows = ("delta_ce", "kl", "ce_recovered")

    def __init__(self, subject: Subject) -> None:
        self._sums = Sums("positions", "clean", "spliced", "ablated", "kl", device=subject.ranks.device)

    @torch.no_grad()
    def update(self, batch: EvaluationBatch, made: Reconstruction) -> None:
        baseline = batch.baseline
        if baseline is None:
            return
        is_scored_BT = baseline.kept_BT[:, :-1]
        clean_BTV, spliced_BTV = baseline.clean_BTV, baseline.spliced_BTV(made.x_hat_ND)
        kl_BT = (clean_BTV.exp() * (clean_BTV - spliced_BTV)).sum(-1)
        losses = {"clean": baseline.loss(clean_BTV), "spliced": baseline.loss(spliced_BTV)}
        del clean_BTV, spliced_BTV  # the zero-ablated pass needs their memory
        losses |= {"ablated": baseline.ablated_loss_BT, "kl": kl_BT}
        self._sums.add(
            positions=is_scored_BT.sum(),
            **{name: loss_BT[is_scored_BT].double().sum() for name, loss_BT in losses.items()},
        )

    def figures(self, ranks: Ranks) -> dict[str, float]:
        sums = self._sums.over(ranks)
        n, clean, spliced, ablated = (sums[name] for name in ("positions", "clean", "spliced", "ablated"))
        if n == 0:
            return {}
        figures = {"ce": clean / n, "delta_ce": (spliced - clean) / n, "kl": sums["kl"] / n}
        if ablated != clean:
            figures["ce_recovered"] = (ablated - spliced) / (ablated - clean)
        return figures
