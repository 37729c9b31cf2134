"""Settings that exist but that a run would never read: typing one is an error."""

from collections.abc import Mapping, Sequence

from sae_train.cli.overrides import NAMES_OF_CHOICES, Typed


def never_read(
    typed: Sequence[Typed], *, tensors: bool, choices: Mapping[str, str], values: Mapping[str, object]
) -> list[str]:
    """Return a problem for each setting that exists but that this run would never read.

    Args:
        tensors: whether activations are read from files.
        choices: the choice of each group.
        values: the composed values by dotted key, without refused ones.
    """
    found = [problem for entry in typed if (problem := _never_read(entry, tensors=tensors, choices=choices))]
    found += [
        f"{entry.text}: n_features={values['n_features']} is the width already, so this would change nothing. Keep one."
        for entry in typed
        if entry.key == "expansion" and values.get("n_features") is not None
    ]
    found += [
        f"{entry.text}: {why} {other}={value}, so this would change nothing. Remove it, or "
        f"{'lower' if value else 'raise'} {other}."
        for entry in typed
        for key, other, value, why in READ_UNLESS
        if entry.key == key and values.get(other) == value
    ]
    found += [
        f"{entry.text}: is for the plan that dry_run=true prints, so this would change nothing. Remove it, or add "
        "dry_run=true."
        for entry in typed
        if entry.group == "plan" and not entry.is_group and values.get("dry_run") is False
    ]
    return found


def _never_read(entry: Typed, *, tensors: bool, choices: Mapping[str, str]) -> str | None:
    if tensors and entry.group in ("model", "layer", "data") and entry.key not in ("data.seed", "data.repeat"):
        return (
            f"{entry.text}: harvest=tensors reads no language model and no text, so this would change nothing. "
            "Remove it."
        )
    for (group, choice), (fields, advice) in FIXED_BY_CHOICE.items():
        if entry.group == group and choices.get(group) == choice and entry.key.partition(".")[2] in fields:
            return f"{entry.text}: {advice}"
    if entry.key in NAMES_OF_CHOICES:
        return f"{entry.text}: says which choice this is and does not change it. Write {entry.group}={entry.value}."
    return None


FIXED_BY_CHOICE = {
    ("model", "bundled"): (
        ("id", "revision"),
        "model=bundled is the language model inside the package. Add model=huggingface for one of your own.",
    ),
    ("data", "bundled"): (
        ("id", "subset", "split", "held_out_split", "text_column"),
        "data=bundled is the corpus inside the package. Add data=files for text of your own, or data=huggingface "
        "for a dataset of the hub.",
    ),
    ("data", "files"): (
        ("subset", "split"),
        "data=files has no subsets or splits, so this would change nothing. Remove it; data.held_out_split=PATH "
        "names held-out text.",
    ),
}
"""Fields of a group that a choice fixes or does not have, and the advice."""

_LAW = "says which features are underused, and only dead ones count at"

_FALL = "says how p falls, and it never does at"

READ_UNLESS = (
    ("aux_loss.exponent", "aux_loss.tau", 0, _LAW),
    ("aux_loss.shift", "aux_loss.tau", 0, _LAW),
    ("sparsifier.revival", "optimizer.decay_tokens", 0, "acts while the learning rate decays, and it never does at"),
    ("sparsifier.start", "sparsifier.end", 1, _FALL),
    ("sparsifier.changes", "sparsifier.end", 1, _FALL),
    ("sparsifier.end", "sparsifier.start", 1, _FALL),
    ("sparsifier.changes", "sparsifier.start", 1, _FALL),
)
"""Fields that nothing reads while another field has a certain value: key, the other key, its value, and why.

aux_loss.hard is not among them: at tau 0 every weight is hard."""
