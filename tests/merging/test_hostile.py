"""Hostile files, indexes, recipes and output paths: each gives one clear error, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
import torch
from on_disk import NOWHERE, is_clear, model, models, recipe_of, refused, row, write_raw
from safetensors.torch import load_file, save_file

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import INDEX, SINGLE, read_header
from hf_fusion.merging.engine.output import staging_path
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert


@pytest.fixture
def folders(tmp_path):
    return models(tmp_path)


# ---------------------------------------------------------------- safetensors

X = row("F32", [2])
CASES = {
    "empty": (b"", b"", None, "header is not valid"),
    "cut off in the header": ({"x": X}, b"", 1_000, "header of 1000 bytes does not fit into its"),
    "a header of 2^63": ({"x": X}, b"\0" * 8, 1 << 63, "does not fit into its"),
    "cut off in the data": ({"x": X}, b"\0" * 7, None, "tensors end at byte .*, the file at"),
    "more than its tensors": ({"x": X}, b"\0" * 9, None, "tensors end at byte"),
    "no JSON": ("{'x': 1}", b"", None, "header is not valid"),
    "UTF-16": (json.dumps({"x": X}).encode("utf-16"), b"\0" * 8, None, "header is not valid"),
    "no UTF-8": (b'{"\xff": 1}', b"", None, "header is not valid"),
    "a bomb": ("[" * 100_000, b"", None, "header is not valid .*nested too deeply"),
    "a bomb of objects": ('{"a":' * 50_000, b"", None, "header is not valid .*nested too deeply"),
    "a list": ("[]", b"", None, "not a JSON object"),
    "a tensor twice": ('{"x": %s, "x": %s}' % ((json.dumps(X),) * 2), b"\0" * 8, None, "'x' occurs twice"),
    "a key twice": ('{"x": {"dtype": "F32", "dtype": "F16"}}', b"", None, "'dtype' occurs twice"),
    "overlapping": ({"x": X, "y": row("F32", [2], 4)}, b"\0" * 12, None, "y begins at byte 4 .* ends at 8"),
    "the same bytes": ({"x": X, "y": X}, b"\0" * 8, None, "begins at byte 0 .* ends at 8"),
    "a gap": ({"x": X, "y": row("F32", [2], 12)}, b"\0" * 20, None, "y begins at byte 12 .* ends at 8"),
    "backwards": ({"x": {**X, "data_offsets": [8, 0]}}, b"\0" * 8, None, "x has -8 bytes"),
    "below 0": ({"x": {**X, "data_offsets": [-8, 0]}}, b"", None, "x has no two data_offsets"),
    "offsets of floats": ({"x": {**X, "data_offsets": [0.0, 8.0]}}, b"\0" * 8, None, "x has no two data_offsets"),
    "three offsets": ({"x": {**X, "data_offsets": [0, 4, 8]}}, b"\0" * 8, None, "x has no two data_offsets"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, b"", None, "x has no two data_offsets"),
    "no row": ({"x": 3}, b"", None, "x has no two data_offsets"),
    "an unknown type": ({"x": {**X, "dtype": "F31"}}, b"\0" * 8, None, "x has the dtype 'F31'; supported are F64"),
    "a type that is none": ({"x": {**X, "dtype": ["F32"]}}, b"\0" * 8, None, "x has the dtype"),
    "another type": ({"x": {**X, "dtype": "F64"}}, b"\0" * 8, None, r"x has 8 bytes, but F64 \[2\] needs 16"),
    "a negative size": ({"x": {**X, "shape": [-2]}}, b"\0" * 8, None, r"x has the shape \[-2\]"),
    "a size of 2.0": ({"x": {**X, "shape": [2.0]}}, b"\0" * 8, None, r"x has the shape \[2.0\]"),
    "a size of true": ({"x": {**X, "shape": [True, 2]}}, b"\0" * 8, None, r"x has the shape \[True, 2\]"),
    "a size of NaN": ('{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}', b"", None, "shape"),
    "2^64 elements": ({"x": {**X, "shape": [1 << 32, 1 << 32]}}, b"\0" * 8, None, "x has the shape"),
    "2^64 + 2 of 2^62": ({"x": {**X, "shape": [4, (1 << 62) + 1]}}, b"\0" * 16, None, "x has the shape"),
    "0 times 2^96": ({"x": row("F32", [0, 1 << 48, 1 << 48])}, b"", None, "x has the shape"),
    "a size of 5000 digits": ('{"x": {"shape": [%s]}}' % ("9" * 5000), b"", None, "header is not valid"),
    "70 dimensions": ({"x": row("F32", [1] * 70)}, b"\0" * 4, None, "x has the shape"),
    "a name of control characters": ({"a\x1b[2J\nb": X}, b"\0" * 8, None, r"'a\\x1b\[2J\\nb' is not a valid"),
    "half a character": (json.dumps({"\ud800": X}), b"\0" * 8, None, "is not a valid tensor name"),
    "a name without end": ({"n" * 100_000: X}, b"\0" * 8, None, "is not a valid tensor name"),
    "no name": ({"": X}, b"\0" * 8, None, "'' is not a valid tensor name"),
}


@pytest.mark.parametrize("case", CASES)
def test_safetensors(case, folders, tmp_path):
    header, data, length, reason = CASES[case]
    write_raw(folders[1] / SINGLE, header, data, length)
    error = refused(
        f"{SINGLE} is not a valid safetensors file: .*{reason}", recipe_of(folders), tmp_path / "out", tmp_path
    )
    assert str(folders[1] / SINGLE) in error.message


def test_files_of_safetensors_are_read(tmp_path):
    tensors = {"none": torch.ones(0, 3), "scalar": torch.tensor(2.0), "größe": torch.ones(2, 1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "x": "y"})
    found = read_header(tmp_path / SINGLE)
    assert {name: entry.shape for name, entry in found.items()} == {k: tuple(v.shape) for k, v in tensors.items()}


def test_header_length_is_checked_before_reading(tmp_path):
    file = tmp_path / SINGLE
    with file.open("wb") as stream:  # a hole: 200 MB that take no room
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    began = time.perf_counter()
    with pytest.raises(FusionError, match="header of 150000000 bytes is longer than 100000000"):
        read_header(file)
    assert time.perf_counter() - began < 1


def test_many_duplicate_names_take_linear_time(tmp_path):
    rows = ",".join(f'"{i}":1' for i in [*range(200_000), 199_999])
    write_raw(tmp_path / SINGLE, f"{{{rows}}}", b"")
    began = time.perf_counter()
    with pytest.raises(FusionError, match="'199999' occurs twice"):
        read_header(tmp_path / SINGLE)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_refused(value, folders, tmp_path):
    file = folders[2] / SINGLE
    tensors = load_file(file)
    tensors["layers.1.mlp.bias"][3] = value
    save_file(tensors, file)
    with pytest.raises(FusionError, match="layers.1.mlp.bias of expert 2 has NaN or Inf"):
        merge(recipe_of(folders), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "one", "two"}


def test_values_beyond_half_precision(folders, tmp_path):
    recipe = recipe_of(folders, scaling=1e6)
    merge(recipe, tmp_path / "wide")
    recipe = Recipe(recipe.method, recipe.experts, recipe.base, recipe.parameters, dtype="float16")
    refused("embed.weight exceeds 65504", recipe, tmp_path / "out", tmp_path)


def test_refusal_by_a_method_leaves_no_output(folders, tmp_path):
    experts = tuple(RecipeExpert(str(folder), weight) for folder, weight in zip(folders[:2], (1.0, -1.0), strict=True))
    with pytest.raises(FusionError, match="weights of .* sum to 0"):
        merge(Recipe("linear", experts), tmp_path / "out")


def test_integer_tensors_are_a_mismatch(folders, tmp_path):
    file = folders[2] / SINGLE
    save_file(load_file(file) | {"head.weight": torch.ones(3, 4, dtype=torch.int32)}, file)
    with pytest.raises(FusionError, match="head.weight +1 .*I32 against F32 +base | skip"):
        merge(recipe_of(folders), tmp_path / "out")
    merge(recipe_of(folders, mismatch="skip", scaling=1.0), tmp_path / "out")
    merged = load_file(tmp_path / "out" / SINGLE)["head.weight"]
    torch.testing.assert_close(merged, load_file(folders[1] / SINGLE)["head.weight"])  # the only one that counts


# ---------------------------------------------------------------- index files and links


@pytest.fixture
def sharded(tmp_path):
    found = models(tmp_path, shards=2)
    model(tmp_path / "secret", 9)
    return found


def reindexed(folder, change):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index) or index))


@pytest.mark.parametrize(
    "place",
    ["../secret/model.safetensors", "{root}/secret/model.safetensors", "sub/model.safetensors", "..", ""]
    + ["a" * 300 + ".safetensors", "model\0.safetensors", "model.bin", "\u0660.safetensors", 3, None, ["a"]],
)
def test_an_index_that_names_no_file_beside_it(place, sharded, tmp_path):
    place = place.format(root=tmp_path) if isinstance(place, str) else place
    reindexed(sharded[1], lambda index: index["weight_map"].update({"head.weight": place}))
    refused(f"one: {INDEX} names .*, which is not a file beside it", recipe_of(sharded), tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda index: index["weight_map"].update(new="model-00001-of-00002.safetensors"),
            "new.* is not in model-00001",
        ),
        (lambda index: index["weight_map"].update(new="model-00003.safetensors"), "one lacks model-00003.safetensors"),
        (lambda index: {"weight_map": list(index["weight_map"].items())}, "has no weight_map"),
        (lambda index: {"weight_map": {}}, "has no weight_map"),
        (lambda index: {"metadata": {}}, "has no weight_map"),
        (lambda index: [index], "has no weight_map"),
    ],
)
def test_index_that_contradicts_the_shards_is_refused(change, reason, sharded, tmp_path):
    reindexed(sharded[1], change)
    refused(reason, recipe_of(sharded), tmp_path / "out", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"weight_map": {"a": "b", "a": "b"}}', "\udcff"])
def test_an_index_that_is_not_valid(text, sharded, tmp_path):
    (sharded[1] / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    refused(f"one: {INDEX} is not valid", recipe_of(sharded), tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer_config.json", "custom.py"]
)
def test_links_out_of_a_model(name, sharded, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    link = sharded[0] / name
    if link.exists():
        shutil.move(link, outside / name)
    else:
        (outside / name).write_text("secret")
    link.symlink_to(outside / name)
    refused(
        f"{link} is a link to {outside / name}, outside the model's folder",
        recipe_of(sharded),
        tmp_path / "out",
        tmp_path,
    )


def test_links_within_a_model_and_into_the_cache_are_followed(tmp_path):
    """As huggingface_hub keeps them: models--x/snapshots/SHA/model.safetensors -> ../../blobs/ETAG."""
    folders = models(tmp_path)
    cached = tmp_path / "models--me--one" / "snapshots" / "abc"
    (cached.parent.parent / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    for number, file in enumerate(folders[1].iterdir()):
        blob = cached.parent.parent / "blobs" / str(number)
        shutil.copy(file, blob)
        (cached / file.name).symlink_to(f"../../blobs/{number}")
    (folders[2] / SINGLE).rename(folders[2] / "weights")
    (folders[2] / SINGLE).symlink_to("weights")
    merge(recipe_of(models(tmp_path / "plain")), tmp_path / "a")
    merge(recipe_of([folders[0], cached, folders[2]]), tmp_path / "b")
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("kind", ["circle", "nowhere", "pipe", "folder"])
def test_missing_and_special_files_are_refused(name, kind, sharded, tmp_path):
    file = sharded[1] / name
    file.unlink()
    match kind:
        case "circle":
            file.symlink_to(file)
        case "nowhere":
            file.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(file)  # who opens it waits for ever
        case "folder":
            file.mkdir()
    reason = f"one (lacks|has no) .*{name if name != INDEX else 'model'}"
    if kind == "pipe":
        reason = f"one/{name} is a pipe, not a file"
    refused(reason, recipe_of(sharded), tmp_path / "out", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "nan", "[" * 100_000, '{"a":' * 100_000, "\udcff"])
def test_invalid_configurations_are_refused(text, folders, tmp_path):
    (folders[0] / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused("base: config.json", recipe_of(folders), tmp_path / "out", tmp_path)


def test_a_model_of_many_heads_is_aligned_at_once(tmp_path):
    shapes = {f"a{i}.weight": (1,) for i in range(4000)}
    theirs = {f"b{name}": shape for name, shape in shapes.items()} | {"a0.weight": (1,)}
    folders = [model(tmp_path / "base", 0, shapes), model(tmp_path / "one", 1, theirs)]
    began = time.perf_counter()
    with pytest.raises(FusionError, match="do not match(.|\n)*… and [0-9]+ more"):
        merge(recipe_of(folders), tmp_path / "out")
    assert time.perf_counter() - began < 10


def test_adapter_on_itself_is_refused(tmp_path):
    own = tmp_path / "adapter"
    own.mkdir()
    save_file({"base_model.model.head.lora_A.weight": torch.ones(1, 4)}, own / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(own)}
    (own / "adapter_config.json").write_text(json.dumps(config))
    recipe = Recipe("linear", (RecipeExpert(str(own)),))  # a base would take the place of the recorded one
    refused("has adapter as its base, which is an adapter too", recipe, tmp_path / "out", tmp_path)


def test_one_model_twice(folders, tmp_path):
    base, one, _ = folders
    report = merge(recipe_of([base, one, one], scaling=0.5), tmp_path / "out")
    assert len(report.recipe.experts) == 2
    merged, wanted = load_file(tmp_path / "out" / SINGLE), load_file(one / SINGLE)
    torch.testing.assert_close(merged, wanted)


# ---------------------------------------------------------------- recipes

VALID = "method: task_arithmetic\nbase: {base}\nexperts:\n- {one}\n- model: {two}\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
WRONG = {
    "unknown key": ("extra: 1", "extra is not a supported key"),
    "a key that is a list": ("[1]: 2", "not valid YAML"),
    "key twice": ("method: linear", "'method' occurs twice, the second time in line"),
    "key twice, deeper": ("parameters: {scaling: 1, scaling: 2}", "'scaling' occurs twice"),
    "experts of no list": ("parameters: 3", "parameters is 3, expected names and values"),
    "unknown parameter": ("parameters: {lambda: 1}", "task_arithmetic has no parameter 'lambda'"),
    "NaN": ("parameters: {scaling: .nan}", "scaling is nan, expected a number"),
    "Inf": ("parameters: {scaling: -.inf}", "scaling is -inf, expected a number"),
    "Inf in a gradient": ("parameters: {scaling: [0, .inf]}", r"scaling\[1\] is inf, expected a number"),
    "NaN behind a filter": (
        "parameters: {scaling: [{filter: mlp, value: .nan}]}",
        r"scaling\[0\].value is nan, expected a number$",
    ),
    "a number no float holds": (f"parameters: {{scaling: {'9' * 99}}}", "scaling is 9999.*expected a number"),
    "a number without end": (f"parameters: {{scaling: {'9' * 9999}}}", "too long for a number"),
    "minutes without end": (f"parameters: {{scaling: {'1:' * 9999}1}}", "too long for a number"),
    "true for a number": ("parameters: {scaling: true}", "scaling is True, expected a number"),
    "a text for a number": ("parameters: {scaling: ten}", "scaling is 'ten', expected a number"),
    "a seed for each layer": ("parameters: {seed: [1, 2]}", r"seed is \[1, 2\], expected a whole number"),
    "a wrong day": ("parameters: {scaling: 2001-99-99}", "not valid YAML: month must be in"),
    "no number at all": ("parameters: {scaling: 0b_}", "not valid YAML"),
    "a false tag": ("parameters: {scaling: !!bool x}", "not valid YAML"),
    "code": ("parameters: {scaling: !!python/object/apply:os.system [ls]}", "not valid YAML"),
    "a circle": ("parameters: &p {scaling: *p}", "contains itself"),
    "a circle of lists": ("parameters: &p [*p]", "contains itself"),
    "laughs": (LAUGHS, "has more than 50,000 values"),
    "laughs in keys": (MERGED_LAUGHS, "has more than 50,000 values"),
    "nested": ("a: " + "[" * 5000, "nested more than 50 levels deep"),
    "nested objects": ("a: " + "{a: " * 500, "nested more than 50 levels deep"),
    "longer than recipes": ("# " + "x" * 300_000, "longer than 200,000 bytes"),
    "control characters": ("a: \x07", "not valid YAML"),
    "escaped characters": ('"\\e[2J": 1', r"'\\x1b\[2J' is not a supported key"),
    "two documents": ("---\na: 1", "two documents have no name"),
    "keys of lists in another": ("---\n? [a]\n: 1", "found unhashable key"),
    "an unknown type": ("dtype: int8", "dtype is 'int8', expected one of"),
    "slices of no list": ("slices: [{sources: 3}]", r"slices\[0\].sources is 3"),
    "slices of nothing": ("slices: [{}]", r"slices\[0\].sources is missing"),
    "layers of true": (
        "slices: [{sources: [{model: x, layers: [false, true]}]}]",
        r"sources\[0\].layers\[0\] is False",
    ),
    "layers below 0": (
        "slices: [{sources: [{model: x, layers: [-1, 1]}]}]",
        r"sources\[0\].layers is \[-1, 1\], expected",
    ),
    "layers of an unknown model": ("slices: [{sources: [{model: x, layers: [0, 1]}]}]", "x, which is neither the base"),
    "a mismatch of its own": ("parameters: {mismatch: any}", "mismatch is 'any', expected one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_recipes(case, folders, tmp_path):
    text, reason = WRONG[case]
    recipe = tmp_path / "recipe.yaml"
    base, one, two = folders
    recipe.write_text(VALID.format(base=base, one=one, two=two) + text)
    began = time.perf_counter()
    refused(reason, recipe, tmp_path / "out", tmp_path)
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"method: \xe4", "method: x".encode("utf-16"), b"\0", b""])
def test_binary_recipes_are_refused(raw, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(raw)
    with pytest.raises(FusionError, match=f"{recipe} (is not valid YAML|holds None)"):
        load_recipe(recipe)


@pytest.mark.parametrize("recipe", ["nowhere.yaml", ".", "a" * 300])
def test_recipes_that_are_not_there(recipe, tmp_path):
    with pytest.raises(FusionError, match="cannot be read") as caught:
        load_recipe(tmp_path / recipe)
    is_clear(caught.value)


@pytest.mark.parametrize("name", ["~nobody/model", "a" * 5000, "../../x/y", "x\0y", "\x1b[2J", "nowhere/at/all", "a/b"])
def test_missing_models_are_reported(name, folders, tmp_path):
    refused(".", recipe_of([folders[0], name]), tmp_path / "out", tmp_path)


def test_an_unknown_method(folders, tmp_path):
    refused("'mean' is not a static method", recipe_of(folders, "mean"), tmp_path / "out", tmp_path)


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "out", ["one", "one/merged", ".", "one/../one", "link", "link/deeper", ".merged.merging/../one"]
)
def test_an_output_that_overlaps_an_input(out, folders, tmp_path):
    (tmp_path / "link").symlink_to(folders[1])
    (tmp_path / ".merged.merging").mkdir()
    refused("overlaps the input", recipe_of(folders), tmp_path / out, tmp_path)


def test_an_output_whose_hidden_folder_is_an_input(tmp_path):
    folders = models(tmp_path)
    hidden = model(staging_path(tmp_path / "out"), 5)
    refused("overlaps the input", recipe_of([folders[0], hidden]), tmp_path / "out", tmp_path)


def test_an_output_that_is_the_base_of_an_adapter(tmp_path):
    base = model(tmp_path / "base", 0)
    own = tmp_path / "adapter"
    own.mkdir()
    pair = {"head.lora_A.weight": torch.ones(1, 4), "head.lora_B.weight": torch.ones(3, 1)}
    save_file({f"base_model.model.{name}": tensor for name, tensor in pair.items()}, own / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)}
    (own / "adapter_config.json").write_text(json.dumps(config))
    refused("overlaps the input", Recipe("linear", (RecipeExpert(str(own)),)), base, tmp_path)


def test_invalid_output_paths(folders, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    for out, reason in (
        ("file", "is a file"),
        ("file/out", "cannot be written"),
        ("dangling", "is a broken link"),
        ("circle", "is a broken link"),
        ("circle/out", "circle"),
        ("pipe", "is a file"),
        ("o" * 255, "cannot be written"),
        ("o" * 5000, "cannot be written"),
        ("/proc/nowhere/out", "cannot be written"),
        ("/dev/null/out", "cannot be written"),
    ):
        refused(reason, recipe_of(folders), tmp_path / out, tmp_path)


def test_unwritable_output_is_refused(folders, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "theirs").mkdir(mode=0o500)
    refused(
        "theirs cannot be written: permission was denied .Permission denied",
        recipe_of(folders),
        tmp_path / "theirs" / "out",
        tmp_path,
    )


@pytest.mark.process
def test_an_output_on_a_disk_that_is_read_only(folders, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        refused("the disk is read-only .Read-only file system", recipe_of(folders), disk / "out", tmp_path)
        refused("disk is a mount point", recipe_of(folders), disk, tmp_path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_output_folder_with_other_files(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "work.py").write_text("mine")
    refused(f"{out} holds work.py, and no fusion.yaml", recipe_of(folders), out, tmp_path)
    (out / "work.py").rename(out / "notes.txt")
    (out / "link").symlink_to("nowhere")
    merge(recipe_of(folders), out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "link").is_symlink()
    for scaling in (0.3, 0.7):  # also by the recipe that made it
        with pytest.raises(FusionError, match=f"{out} already contains a model: config.json, fusion.yaml, model"):
            merge(recipe_of(folders, scaling=scaling), out)
    merge(recipe_of(folders, scaling=0.7), out, overwrite=True)  # an earlier merge is replaced
    assert (out / "notes.txt").exists() and load_recipe(out).parameters == {"scaling": 0.7}


def test_a_link_to_a_folder_is_followed(folders, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    merge(recipe_of(folders), tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big" / SINGLE).exists()


def test_file_linked_at_the_lock_keeps_its_content(folders, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".out.lock").symlink_to(precious)
    refused("cannot be written", recipe_of(folders), tmp_path / "out", tmp_path)
    (tmp_path / ".out.lock").unlink()
    staging_path(tmp_path / "out").symlink_to(folders[0])
    with pytest.raises(FusionError, match="cannot be written"):
        merge(recipe_of(folders), tmp_path / "out")
    assert (folders[0] / SINGLE).exists()


def test_a_second_run_at_the_same_time(folders, tmp_path):
    out, seen = tmp_path / "out", []

    def again(done, total):
        with pytest.raises(FusionError, match=f"{out} is being written by another process") as caught:
            merge(recipe_of(folders), out, api=NOWHERE)
        is_clear(caught.value)
        seen.append(done)

    merge(recipe_of(folders), out, progress=again, threads=1)
    assert seen and (out / SINGLE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "out", "two"]
