"""The streaming engine on files: complete output that equals the method's result, or none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import bert, resnet
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import OpenFiles, read_header
from hf_fusion.merging.engine.tensors import WIDE, Combination, FileReader, Tensors, merge_tensors
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.merge import merge
from hf_fusion.recipe import Recipe, RecipeExpert


@pytest.fixture
def folders(tmp_path):
    """A base and two experts of one architecture, saved as transformers saves them."""
    found = []
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        bert(["no", "yes"], seed).save_pretrained(tmp_path / name)
        found.append(tmp_path / name)
    return found


def recipe_of(method, folders, **parameters):
    base, *experts = map(str, folders)
    return Recipe(method, tuple(map(RecipeExpert, experts)), base, parameters)


def weights(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_task_arithmetic_of_files(folders, tmp_path):
    report = merge(recipe_of("task_arithmetic", folders, scaling=0.4), tmp_path / "out", threads=2)
    base, one, two = map(weights, folders)
    merged = weights(tmp_path / "out")
    assert list(merged) and merged.keys() == base.keys()
    for name, tensor in merged.items():
        wanted = base[name].double() + 0.4 * (one[name].double() - base[name].double())
        wanted += 0.4 * (two[name].double() - base[name].double())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.num_parameters() == sum(t.numel() for t in merged.values())
    assert Recipe.load(tmp_path / "out") == report.recipe
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("count", [1, 3, 9])
def test_inputs_in_bfloat16_are_summed_in_float32(count, tmp_path):
    """Of several chunks, the last of them short; from nine inputs on, each is read as float32."""
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist()
    shape, files, readers, exact = (2 * WIDE // 1000 + 7, 1000), OpenFiles(), [], 0.0
    for number, weight in enumerate(weights):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(number)).bfloat16()
        save_file({"w": values}, tmp_path / f"{number}.safetensors")
        readers.append(FileReader(read_header(tmp_path / f"{number}.safetensors")["w"], files))
        exact = exact + torch.tensor(weight).double() * values.double()
    tensors = Tensors("w", None, readers)
    combination = Combination(0.0, weights)
    narrow = combination.in_bfloat16(tensors)
    assert (narrow is None) == (count > 8)
    assert Combination(0.0, [1e-50] * count).in_bfloat16(tensors) is None
    pieces = [(start, values.clone()) for start, values in narrow or merge_tensors(tensors, combination)]
    files.close()
    step = pieces[1][0]
    assert [start for start, _ in pieces] == list(range(0, tensors.numel, step))
    assert narrow is None or step == WIDE
    merged = torch.cat([values.bfloat16() for _, values in pieces])
    wanted = exact.flatten().bfloat16()  # float64 goes through float32 on its way
    off = (merged.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    close = (merged.double() - exact.flatten()).abs() <= 1e-6 * sum(map(abs, weights)) * 5  # of what cancels
    assert ((off <= 1) | close).all()
    assert (off == 0).double().mean() > 0.999


def test_threads_and_shard_size_do_not_change_the_result(folders, tmp_path):
    recipe = recipe_of("task_arithmetic", folders)
    for name, options in {"a": {"threads": 1}, "b": {"threads": 4}, "c": {"shard_bytes": 20_000}}.items():
        merge(recipe, tmp_path / name, **options)
    one, other = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "ab")
    assert one == other
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole, sharded = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert all(tensor.equal(sharded[name]) for name, tensor in whole.items())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c").state_dict()
    assert all(tensor.equal(loaded[name]) for name, tensor in whole.items())


def test_nan_is_refused_by_name_and_leaves_no_output(folders, tmp_path):
    file = folders[2] / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("query.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FusionError, match=f"{name} of expert 2 has NaN"):
        merge(recipe_of("task_arithmetic", folders), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trimmed_over_the_whole_model(folders, tmp_path):
    """TIES' trim as in the paper: the largest of all tensors together."""
    base, one, _ = map(weights, folders)
    recipe = recipe_of("ties", folders[:2], trim="model", density=0.1)
    merge(recipe, tmp_path / "out", threads=3)
    flat = torch.cat([(one[name] - base[name]).abs().flatten() for name in base])
    limit = flat.sort(descending=True).values[int(0.1 * len(flat)) - 1]
    for name, tensor in weights(tmp_path / "out").items():
        delta = one[name] - base[name]
        torch.testing.assert_close(tensor, base[name] + torch.where(delta.abs() >= limit, delta, 0.0), msg=name)


@pytest.mark.parametrize(("method", "options"), [("ties", {"trim": "model"}), ("dare_ties", {}), ("linear", {})])
def test_state_dicts_in_memory_merge_as_files_do(method, options, folders, tmp_path):
    base, *experts = map(weights, folders)
    given = folders if method != "linear" else [None, *folders[1:]]
    recipe = recipe_of(method, given, seed=5, **options)
    merge(recipe if method != "linear" else replace(recipe, base=None), tmp_path / "out")
    merged = merge_states(method, base, experts, seed=5, **options)
    for name, tensor in weights(tmp_path / "out").items():
        assert tensor.equal(merged[name]), name
    with pytest.raises(FusionError, match="has no parameter 'scale'"):
        merge_states(method, base, experts, scale=1.0)


def test_variances_of_batch_norm_stay_variances(tmp_path):
    """Both experts have halved them, so that a large step leads below 0, where a model's outputs are no numbers."""
    found = []
    for name, factor in (("base", 1.0), ("one", 0.4), ("two", 0.5)):
        model = resnet(["no", "yes"])
        for key, buffer in model.named_buffers():
            if key.endswith("running_var"):
                buffer.mul_(factor)
        model.save_pretrained(tmp_path / name)
        found.append(tmp_path / name)
    merge(recipe_of("task_arithmetic", found, scaling=1.0), tmp_path / "out", threads=1)
    merged, in_memory = weights(tmp_path / "out"), merge_states("task_arithmetic", *_apart(found), scaling=1.0)
    variances = [name for name in merged if name.endswith("running_var")]
    assert variances and all(bool((merged[name] == 0).all()) for name in variances)  # 1 - 0.6 - 0.5 < 0
    assert merged.keys() == in_memory.keys() and all(torch.equal(merged[name], in_memory[name]) for name in merged)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert bool(loaded(torch.randn(2, 3, 32, 32)).logits.isfinite().all())


def _apart(folders):
    base, *experts = map(weights, folders)
    return base, experts
