"""Thresholds of a run's SAEs, set on the calibration half of the held-out data.

The half is read once for a group of sites, as many as fit in memory. Then every SAE of these sites is calibrated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.evaluation.rounds import rounds
from sae_train.harvest.build import Stream
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import Calibration, calibrate
from sae_train.sparsifiers.base import Export
from sae_train.training.learner import Learner

CALIBRATION_BYTES = 2 * 2**30
"""Bytes of held-out activations that are held at a time. The activations of one site are held in any case."""


class Draft(NamedTuple):
    """An SAE on its way to an export. `export_all` makes it."""

    learner: Learner
    sae: SparseAutoencoder
    """This rank's features, folded."""
    rule: Export


def set_thresholds(
    drafts: Sequence[Draft], stream: Stream, *, max_tokens: int, ranks: Ranks, phases: Phases = SILENT
) -> list[Calibration]:
    """Set the thresholds of each SAE, and its k where a coefficient takes its place; return the calibrations.

    Collective. All ranks read the half together. Each of them calibrates its own SAEs, whose number may differ.
    """
    found: dict[str, Calibration] = {}
    sites_of_ranks = ranks.gather_objects([draft.learner.plan.site for draft in drafts])
    total = stream.held_out.n_tokens("calibration", max_tokens=max_tokens)
    read_sites = {site for sites in sites_of_ranks for site in sites}
    widths = {site: len(each.centre_D) for site, each in stream.scalings.items() if site in read_sites}
    for group in site_groups(widths, n_tokens=total):
        with phases.of("reading activations for thresholds", total=total):
            raw = calibration_half(stream, group, max_tokens=max_tokens, ranks=ranks, phases=phases)
        own = [draft for draft in drafts if draft.learner.plan.site in group]
        for turn in range(max(sum(site in group for site in sites) for sites in sites_of_ranks)):
            if turn < len(own):
                draft = own[turn]
                found[draft.learner.name] = _set(draft, raw[draft.learner.plan.site], stream, phases)
            phases.meet()
        del raw
    return [found[draft.learner.name] for draft in drafts]


def site_groups(widths: Mapping[str, int], *, n_tokens: int) -> list[list[str]]:
    """Return sites in groups whose activations fit in `CALIBRATION_BYTES` together, in order, at least one a group.

    Args:
        widths: width of the activations of each site.
        n_tokens: tokens of the calibration half.
    """
    groups: list[list[str]] = []
    room = 0
    for site, width in widths.items():
        size = 4 * n_tokens * width
        if not groups or size > room:
            groups.append([])
            room = CALIBRATION_BYTES
        groups[-1].append(site)
        room -= size
    return groups


@torch.no_grad()
def calibration_half(
    stream: Stream, sites: Sequence[str], *, max_tokens: int, ranks: Ranks, phases: Phases = SILENT
) -> dict[str, Tensor]:
    """Return the calibration half's raw activations [N, d_model] at each site, fp32, equal on every rank. Collective.

    N differs between sites, because each leaves out the tokens over its own outlier limit.
    """
    nothing = {site: torch.zeros(0, len(stream.scalings[site].centre_D), device=ranks.device) for site in sites}
    rows = {site: [nothing[site]] for site in sites}
    batches = stream.held_out.batches("calibration", max_tokens=max_tokens, ranks=ranks, sites=sites)
    for turn in rounds(batches, ranks):
        for site in sites:
            own_ND = nothing[site] if turn.batch is None else turn.batch.sites[site].raw_ND
            rows[site].append(ranks.gather_rows(own_ND))
        phases.meet(turn.n_tokens)
    return {site: torch.cat(rows.pop(site)) for site in sites}  # each site's parts are freed once it is whole


def _set(draft: Draft, raw_ND: Tensor, stream: Stream, phases: Phases) -> Calibration:
    learner, sae, rule = draft
    plan, scale = learner.plan, stream.scalings[learner.plan.site].scale
    calibration = calibrate(
        sae,
        raw_ND,
        k=rule.k,
        batch_tokens=plan.batch_tokens,
        n_features=plan.n_features,
        ranks=learner.ranks,
        share_F=rule.share_F,
        learned_F=None if rule.threshold_F is None else rule.threshold_F.double() * scale,
        phases=phases,
    )
    if rule.k is None:
        sae.k = calibration.target_l0
    sae.threshold.data.copy_(calibration.threshold_F)
    return calibration
