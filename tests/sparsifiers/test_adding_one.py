"""A sparsifier is added with a module, a config class and a registry line (and, for the command line, a YAML)."""

import dataclasses
from pathlib import Path

import pytest

from sae_train.config.sparsifier_registry import SPARSIFIERS, Entry
from sae_train.ranks.interface import Solo
from sae_train.sae.code import SparseCode
from tools import grid_world as world
from tools.one_of_each import only
from tools.sae_parts import encoded

MODULE = '''
from dataclasses import dataclass

import torch

from sae_train import kernels
from sae_train.config import AllocatorConfig
from sae_train.sparsifiers.allocator import Allocator


@dataclass(kw_only=True, slots=True)
class StrideConfig(AllocatorConfig):
    """Each token keeps the largest affinities of every n-th feature."""

    stride: int


class Stride(Allocator):
    def __init__(self, config, sizes, ranks):
        super().__init__(config, sizes, ranks)
        lo, hi = ranks.features.slice(sizes.n_features)
        self._allowed_F = torch.arange(lo, hi, device=ranks.device) % config.sparsifier.stride == 0

    def select(self, inputs):
        k, limits = round(self.schedule.at(inputs.info)), {"capacity": self.capacity, "n_features": self.n_features}
        found = kernels.select_rows(inputs.pre_NF, k=k, allowed_F=self._allowed_F, ranks=inputs.ranks, **limits)
        return self.code(found, inputs)
'''


def test_a_module_a_config_class_and_a_registry_line_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stride_sparsifier.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    from stride_sparsifier import StrideConfig

    monkeypatch.setitem(SPARSIFIERS, "stride", Entry(StrideConfig, "stride_sparsifier:Stride"))
    world.write_activations(tmp_path / "rows")
    config = world.config_of(tmp_path / "rows", [], precision="float32", steps=2)
    config = dataclasses.replace(config, sparsifier=StrideConfig(name="stride", revival=1.0, stride=3))
    trainer = world.build(config, Solo())
    before = world.weights(trainer)["W_dec"].clone()
    for step in range(2):
        trainer.step(trainer.stream.batch(step))
    code = encoded(trainer, only(trainer.stream.batch(2)).x_ND).code
    assert isinstance(code, SparseCode)
    fires_F = code.firing_counts()
    assert int(fires_F.sum()) == int(code.count) > 0
    assert not bool(fires_F.view(-1)[[feature for feature in range(world.F) if feature % 3]].any())
    assert bool((world.weights(trainer)["W_dec"] != before).any())
    assert trainer.rows()[0]["train/l0"] > 0
