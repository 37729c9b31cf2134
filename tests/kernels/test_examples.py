"""The examples in docstrings of kernels are true."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import sae_train.kernels

MODULES = [module.name for module in pkgutil.iter_modules(sae_train.kernels.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"sae_train.kernels.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_every_public_operation_has_one() -> None:
    without = {"FeatureOrder", "Matches", "Approximate", "PreActivations", "writes_fp32"}
    names = set(sae_train.kernels.__all__) - without
    assert [name for name in sorted(names) if ">>>" not in getattr(sae_train.kernels, name).__doc__] == []
