"""The registry of families: each layer supports every family, and the rows are correct."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

import hf_fusion
from hf_fusion import models
from hf_fusion.cards.card import TEMPLATES
from hf_fusion.cards.contents import CONTENTS
from hf_fusion.cards.static_merge import MERGE
from hf_fusion.cards.usage import SCRIPTS
from hf_fusion.cli.eval import EVALUATORS
from hf_fusion.cli.fit import FIT_COMMANDS
from hf_fusion.demo import DEMOS
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.coefficient_map import COEFFICIENT_FILE, COEFFICIENT_PICTURE
from hf_fusion.evaluation.evaluate import MEASURES
from hf_fusion.evaluation.routing_map import ROUTING_FILE, ROUTING_PICTURE
from hf_fusion.families import FAMILIES, FIT_PARTS, MEASURED, METHODS, STALE, family_of, method_needing
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_checks import family_method
from hf_fusion.schema import KeyPath, read


def test_each_layer_handles_all_registered_families():
    assert set(CONTENTS) == set(FAMILIES)
    assert set(SCRIPTS) == {*FAMILIES, MERGE}
    assert set(MEASURES) == set(EVALUATORS) == set(FAMILIES)
    assert set(DEMOS) == {name for name, family in FAMILIES.items() if family.demo}
    assert set(FIT_COMMANDS) == set(FIT_PARTS)
    assert {f"{name}.md.j2" for name in FAMILIES} <= {file.name for file in TEMPLATES.iterdir()}
    assert not set(METHODS) & set(MERGE_METHODS)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_classes_match_the_registry(name):
    family = FAMILIES[name]
    classes = family.classes()
    assert issubclass(classes.model, PreTrainedModel) and issubclass(classes.config, PreTrainedConfig)
    assert issubclass(classes.generation, GenerationMixin) and issubclass(classes.generation, classes.model)
    assert classes.model.config_class is classes.config
    assert classes.config.model_type == family.name == name
    files = Path(models.__file__).parent
    assert {f"configuration_{name}.py", f"modeling_{name}.py"} <= {file.name for file in files.iterdir()}
    for kind in filter(None, (getattr(classes, field.name) for field in fields(classes))):
        assert getattr(hf_fusion, kind.__name__) is kind


@pytest.mark.parametrize("name", METHODS)
def test_method_has_the_family_and_options_of_its_row(name):
    method, family = METHODS[name], family_of(name)
    assert family.name == method.family and family.methods[name] is method
    known = inspect.signature(method.bound()).parameters
    assert {name: read(each.hint, each.default, KeyPath("")) for name, each in method.options.items()} == {
        name: option.default for name, option in known.items() if name not in ("experts", "base")
    }
    assert list(method.options) == [option for option in known if option not in ("experts", "base")]
    assert ("weights" in known) == method.takes_weights
    assert "base" in known or not method.takes_base


def test_methods_and_options_that_are_not_there_are_named():
    with pytest.raises(FusionError, match="there is no method 'phatgose'") as raised:
        family_method("phatgose", {})
    assert "phatgoose" in str(raised.value.hint)
    with pytest.raises(FusionError, match="method wemoe has no parameter 'scalling'") as raised:
        family_method("wemoe", {"scalling": 1})
    assert "scaling" in str(raised.value.hint)


def test_the_files_that_measuring_writes_are_stale_in_another_model():
    assert FAMILIES["phatgoose"].map == (ROUTING_FILE, ROUTING_PICTURE)
    assert FAMILIES["wemoe"].map == (COEFFICIENT_FILE, COEFFICIENT_PICTURE)
    assert {"results.json", ROUTING_FILE, ROUTING_PICTURE, COEFFICIENT_FILE, COEFFICIENT_PICTURE} <= set(STALE)
    assert set(MEASURED) == {"results.json", ROUTING_FILE, COEFFICIENT_FILE}


@pytest.mark.parametrize(
    ("gates", "mergeable", "method"),
    [(False, False, "foe"), (True, False, "phatgoose"), (False, True, "wemoe"), (True, True, "phatgoose")],
)
def test_method_follows_from_the_checks_of_experts(gates, mergeable, method):
    assert method_needing(gates=gates, mergeable=mergeable) == method


@pytest.mark.process
def test_the_registry_is_read_without_torch():
    code = (
        "import json, sys; from hf_fusion.families import METHODS; "
        "print(json.dumps([{name: list(method.options) for name, method in METHODS.items()}, "
        "sorted({'torch', 'transformers'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    options, heavy = json.loads(done.stdout)
    assert "mode" in options["foe"] and "rule" in options["ensemble"] and heavy == []


def test_models_are_built_by_classes_that_load_experts():
    """`from_experts` of the class in hf_fusion.models loads no ids until hf_fusion.fused_models is imported."""
    for path in Path(hf_fusion.__file__).parent.rglob("*.py"):
        if path.parent.name == "models":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        from_models = [node for node in imports if (node.module or "").startswith("hf_fusion.models")]
        bare = {alias.name for node in from_models for alias in node.names}
        calls = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "from_experts"]
        used = {node.value.id for node in calls if isinstance(node.value, ast.Name)}
        assert not bare & used, f"{path}: import {bare & used} from hf_fusion.fused_models"
