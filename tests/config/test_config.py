"""Every choice composes, what is typed wins, and identity is exactly what can change the exported SAE."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import sae_train.conf
from sae_train import config as schema
from sae_train.cli.compose import compose_request, offer
from sae_train.cli.help import field_lines, usage
from sae_train.cli.library import Library, opened
from sae_train.cli.overrides import NAMES_OF_CHOICES, REQUIRED
from sae_train.cli.point import build
from sae_train.cli.schemas import SCHEMAS
from sae_train.config import RunConfig, as_dict, identity_digest
from tools.small_runs import identity_of

CONF = Path(sae_train.conf.__file__).parent
CHOICES = sorted(
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in CONF.glob("*/**/*.yaml")
    if "experiment" not in path.parts
)
Compose = Callable[..., RunConfig]


def still_missing(library: Library, *arguments: str) -> list[str]:
    """Return the keys that need a value once these are typed."""
    overrides, refused = library.read(list(arguments), sweep=False)
    draft = library.draft(overrides)
    assert (refused, draft.problems) == ({}, [])
    return [
        f"{group}.{key}"
        for group, part in OmegaConf.to_container(draft.values).items()
        if isinstance(part, dict)
        for key, value in part.items()
        if value == "???"
    ]


def composed(library: Library, *arguments: str) -> RunConfig | None:
    """Compose, with a value for every key that must have one."""
    given = [f"{key}=given" for key in still_missing(library, *arguments)]
    config, problems = library.check(library.read([*arguments, *given], sweep=False)[0])
    assert problems == []
    return config


@pytest.mark.parametrize("group", sorted({choice.partition("=")[0] for choice in CHOICES}))
def test_every_choice_composes(group: str) -> None:
    with opened() as library:
        for choice in (choice for choice in CHOICES if choice.startswith(f"{group}=")):
            needs = ("sparsifier=feature_choice",) if choice in ("budget=uniform", "budget=zipf") else ()
            assert isinstance(composed(library, choice, *needs), RunConfig)
            assert set(still_missing(library, choice, *needs)) <= set(REQUIRED)


def test_every_experiment_composes() -> None:
    with opened() as library:
        for path in (CONF / "experiment").glob("*.yaml"):
            assert isinstance(composed(library, f"experiment={path.stem}"), RunConfig)


def test_the_choices_are_those_that_are_promised() -> None:
    assert {"sparsifier=topk", "sparsifier=mutual_choice", "sparsifier=batch_topk", "sparsifier=feature_choice",
            "budget=pooled", "budget=uniform", "budget=zipf", "aux_loss=none", "aux_loss=aux_k", "aux_loss=aux_zipf",
            "model=bundled", "model=gpt2", "model=pythia_70m", "model=pythia_160m", "model=gemma_2_2b",
            "model=llama_3_2_1b", "model=huggingface", "data=bundled", "data=huggingface", "data=files",
            "harvest=live", "harvest=tensors", "layer=residual", "layer=mlp", "layer=attention", "layer=module",
            "parallel=data", "parallel=features", "parallel=mesh",
            "parallel=saes", "plan=default", "tracking=wandb", "tracking=none"} <= set(CHOICES)  # fmt: skip


def test_every_schema_is_used_by_a_choice() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    assert [name for name in SCHEMAS if f"schema/{name}@_here_" not in text] == []


def test_with_no_arguments_it_is_mutual_choice_on_what_is_bundled(compose: Compose) -> None:
    config = compose()
    assert isinstance(config.sparsifier, schema.MutualChoiceConfig)
    assert isinstance(config.budget, schema.PooledBudgetConfig)
    assert isinstance(config.aux_loss, schema.AuxKConfig)
    assert isinstance(config.harvest, schema.LiveHarvestConfig)
    assert (config.model.id, config.data.id, config.layer.kind) == ("bundled", "bundled", "residual")


def test_what_is_typed_wins(compose: Compose) -> None:
    config = compose("sparsifier=topk", "k=64", "optimizer.lr=1e-4", "layer.index=-1", "data.seed=7")
    assert isinstance(config.sparsifier, schema.TopKConfig)
    assert (config.k, config.optimizer.lr, config.data.seed) == (64.0, 1e-4, 7)
    assert isinstance(config.layer, schema.BlockLayerConfig)
    assert config.layer.index == -1


def test_feature_choice_brings_a_uniform_budget_unless_one_is_typed(compose: Compose) -> None:
    assert isinstance(compose("sparsifier=feature_choice").budget, schema.UniformBudgetConfig)
    assert isinstance(compose("sparsifier=feature_choice", "budget=zipf").budget, schema.ZipfBudgetConfig)
    assert isinstance(compose("sparsifier=topk").budget, schema.PooledBudgetConfig)


def test_a_sweep_takes_every_combination_the_last_key_fastest() -> None:
    points = compose_request(["sparsifier=topk,feature_choice", "seed=3", "k=16,32"], sweep=True).points
    assert [point.overrides for point in points] == [
        [f"sparsifier={name}", "seed=3", f"k={k}"] for name in ("topk", "feature_choice") for k in (16, 32)
    ]
    assert [(point.config.sparsifier.name, point.config.budget.name, point.config.k) for point in points] == [
        ("topk", "pooled", 16), ("topk", "pooled", 32), ("feature_choice", "uniform", 16),
        ("feature_choice", "uniform", 32),
    ]  # fmt: skip


def test_an_experiment_of_the_users_wins_over_the_defaults_and_loses_to_what_is_typed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /sparsifier: feature_choice\n  - override /budget: zipf\n"
        "k: 7\nseed: 5\n"
    )
    (point,) = compose_request(["experiment=mine", "seed=6"], sweep=False, config_dir=str(tmp_path)).points
    assert (point.config.k, point.config.seed, point.config.budget.name) == (7, 6, "zipf")


def test_it_is_what_hydra_itself_would_compose(compose: Compose) -> None:
    typed = ["model=gpt2", "sparsifier=feature_choice", "budget=zipf", "budget.cap=0.2", "layer.index=-1", "k=1e1",
             "n_features=null", "name='a, b'", "optimizer.lr=null", "runs=${model.name}/runs"]  # fmt: skip
    with opened():
        expected = build(hydra.compose("train", typed))
    assert compose(*typed) == expected


def test_an_alias_is_the_same_run(compose: Compose) -> None:
    assert identity_of(compose("sparsifier=batch_topk")) == identity_of(compose("sparsifier=mutual_choice"))


FREE = {
    "name",
    "runs",
    "dry_run",
    "log_every",
    "evaluate_every",
    "checkpoint",
    "parallel",
    "tracking",
    "variants",
    "grid",
    "plan",
}
"""What a run may change between two commands and still be the same run."""


def leaves(config: RunConfig) -> list[tuple[str, str]]:
    values = as_dict(config, [config.sae])
    return [("", key) for key, value in values.items() if not isinstance(value, dict)] + [
        (group, key) for group, part in values.items() if isinstance(part, dict) for key in part
    ]


def test_identity_holds_exactly_what_can_change_the_exported_sae(compose: Compose) -> None:
    config = compose("sparsifier=feature_choice", "budget=zipf", "aux_loss=aux_zipf")
    before = identity_digest(identity_of(config))
    for group, key in leaves(config):
        other = dataclasses.replace(config)  # checks are skipped below: only the value matters
        if group:
            part = dataclasses.replace(getattr(config, group))
            object.__setattr__(part, key, "another")
            object.__setattr__(other, group, part)
        else:
            object.__setattr__(other, key, "another")
        changed = identity_digest(identity_of(other)) != before
        assert changed == ((group or key) not in FREE and key not in ("zipf_from", "prefetch")), f"{group}.{key}"


def test_a_run_on_tensors_is_not_another_one_because_of_a_model_it_never_reads(compose: Compose) -> None:
    config = compose("harvest=tensors", "harvest.path=there")
    other = dataclasses.replace(config, model=compose("model=gpt2").model)
    assert identity_of(config) == identity_of(other)
    assert identity_of(config) != identity_of(compose("harvest=tensors", "harvest.path=there", "data.seed=1"))


def test_every_setting_has_a_help_line_and_help_shows_every_choice() -> None:
    for path, settings in SCHEMAS.items():
        lines = field_lines(settings)
        for field in dataclasses.fields(settings):
            names_a_choice = f"{path.partition('/')[0]}.{field.name}" in NAMES_OF_CHOICES
            assert lines[field.name] or names_a_choice or dataclasses.is_dataclass(field.type), (path, field.name)
    text = usage(offer(["sparsifier=feature_choice"]))
    assert "sparsifier.after=0.0" in text
    for choice in CHOICES:
        group, _, name = choice.partition("=")
        (row,) = [row for row in text.splitlines() if row.startswith(f"  {group}: ")]
        assert name in row.partition(": ")[2].split(", ")
