"""The public names: every class of the families is among them."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

import hf_fusion
from hf_fusion import models

FAMILIES = [module.name for module in pkgutil.iter_modules(models.__path__)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_of_a_family_is_public(family):
    package = import_module(f"hf_fusion.models.{family}")
    files = [import_module(f"{package.__name__}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    found = {
        name: value
        for module in files
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        # models and configs, and what models return or are fed by
        and (issubclass(value, (PreTrainedModel, PreTrainedConfig)) or name.endswith(("Trace", "Processor")))
    }
    assert len(found) >= 3
    for name, value in found.items():
        assert getattr(hf_fusion, name) is value
        assert name in hf_fusion.__all__


def test_every_public_name_is_there():
    for name in hf_fusion.__all__:
        assert getattr(hf_fusion, name) is not None, name
