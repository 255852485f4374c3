"""Experts, gates, recipes and suites as accident or malice leaves them: a clear error, or the right result.

1,000 changes of each kind, drawn with seed 0 (`python -m pytest -m slow tests/hub/test_fuzz_experts.py`); 50 always:
see `mutations`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from mutations import Mutation, mutated, mutations, sample
from safetensors.torch import load_file
from tiny_fused import save_fine_tunes
from tiny_routed import save_base, save_lora

from hf_fusion import FusionError, check_compatibility, discover, load_experts, merge
from hf_fusion.bench.suite import load_suite
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.types import Expert

NOWHERE = HfApi(endpoint="http://127.0.0.1:9")  # what is changed may name repos: none is asked for
SECONDS = 20  # of CPU time for one case
SUITE = """title: Tiny
kind: merging
head: sequence-classification
base: ./base
experts: ./{task}
defaults: {data: 'data:{task}', fitting: {split: train, share: 0.5}}
tasks:
  foxes: {metric: f1, columns: {text: sentence}, classes: [a, b], fitting: {split: train, share: 0.25}}
  dogs: {classes: names.txt, choices: options}
unseen:
  last: {fuse: [foxes], test: [dogs]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What is changed, each kind in a folder with nothing else."""
    folder = tmp_path_factory.mktemp("given")
    save_fine_tunes(folder)
    save_base(folder / "llama")
    for seed in range(2):
        save_lora(folder / f"lora-{seed}", str(folder / "llama"), seed)
    (folder / "recipe").mkdir()
    names = [RecipeExpert(str(folder / "foxes"), 0.5), RecipeExpert(str(folder / "dogs"), parameters={"weight": 2.0})]
    recipe = Recipe("ties", tuple(names), base=str(folder / "base"), parameters={"density": 0.5}, dtype="float32")
    recipe.save(folder / "recipe" / "fusion.yaml")
    (folder / "suite").mkdir()
    (folder / "suite" / "tiny.yaml").write_text(SUITE)
    (folder / "suite" / "names.txt").write_text("a\nb\n")
    return folder


def is_right(expert: Expert, files: dict[str, torch.Tensor]) -> None:
    """A model that was loaded holds what its file does."""
    state = expert.model.state_dict()
    for name, tensor in files.items():
        if name in state:
            assert torch.equal(state[name].float(), tensor.float()), f"{name} is not as in the file"
            assert tensor.isfinite().all(), f"{name} is not finite"
    lacking = [name for name, _ in expert.model.named_parameters() if name not in files]
    assert not lacking, f"{lacking[0]} was made up"


def full(folder: Path, place: Path, out: Path) -> None:
    (expert,) = load_experts([folder], api=NOWHERE)
    is_right(expert, load_file(folder / "model.safetensors"))


def full_checked(folder: Path, place: Path, out: Path) -> None:
    """Judging never fails: what does not fit has its reasons."""
    found = check_compatibility(infos([folder, place / "dogs"]), api=NOWHERE)
    assert len(found.accepted) + len(found.rejected) == 2
    for rejected in found.rejected:
        assert rejected.reasons


def full_merged(folder: Path, place: Path, out: Path) -> None:
    merge(Recipe("linear", (RecipeExpert(str(folder)), RecipeExpert(str(place / "dogs")))), out, api=NOWHERE)
    merged, own = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    other = load_file(place / "dogs" / "model.safetensors")
    for name, tensor in merged.items():
        mean = (own[name].double() + other[name].double()) / 2
        # a rounding of each input, of their sum and of the result, by the coarsest of their types
        coarsest = max(torch.finfo(given.dtype).eps for given in (own[name], other[name], tensor))
        error = 2 * coarsest * max(1.0, float(mean.abs().max()))
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=error)


def lora(folder: Path, place: Path, out: Path) -> None:
    (expert,) = load_experts([folder], base=place / "llama", gates=False, api=NOWHERE)
    assert expert.adapter is not None
    for a, b in expert.adapter.lora.values():
        assert a.isfinite().all() and b.isfinite().all() and a.shape[0] == b.shape[1]


def lora_merged(folder: Path, place: Path, out: Path) -> None:
    experts = (RecipeExpert(str(folder)), RecipeExpert(str(place / "lora-1")))
    merge(Recipe("lora", experts, base=str(place / "llama")), out, api=NOWHERE)
    assert all(tensor.isfinite().all() for tensor in load_file(out / "adapter_model.safetensors").values())


def gates(folder: Path, place: Path, out: Path) -> None:
    (expert,) = load_experts([folder], base=place / "llama", gates=True, api=NOWHERE)
    if expert.gates is not None:
        assert expert.adapter is not None and expert.gates.vectors.keys() >= expert.adapter.lora.keys()
        assert all(vector.isfinite().all() for vector in expert.gates.vectors.values())


def recipe(folder: Path, place: Path, out: Path) -> None:
    found = Recipe.load(folder / "fusion.yaml")
    merge(found, out, api=NOWHERE)
    assert (out / "config.json").is_file()


def suite(folder: Path, place: Path, out: Path) -> None:
    found = load_suite(str(folder / "tiny.yaml"))
    assert found.tasks


def infos(folders: list[Path]) -> list[Any]:
    from hf_fusion.publishing.local_experts import folder_info

    return [folder_info(str(folder)) for folder in folders]


# kind → the folder, the files that are changed, and what reads them
KINDS: dict[str, tuple[str, tuple[str, ...], Callable[[Path, Path, Path], None]]] = {
    "full": ("foxes", (), full),
    "full, checked": ("foxes", (), full_checked),
    "full, merged": ("foxes", ("config.json", ".safetensors"), full_merged),
    "LoRA": ("lora-0", ("adapter_config.json", "adapter_model.safetensors"), lora),
    "LoRA, merged": ("lora-0", ("adapter_config.json", "adapter_model.safetensors"), lora_merged),
    "gates": ("lora-0", ("phatgoose_gates.safetensors",), gates),
    "recipe": ("recipe", (), recipe),
    "suite": ("suite", (), suite),
}


def wrong(case: Mutation, read: Callable[[], None]) -> str | None:
    """What is wrong with how a case was met; None where nothing is."""
    began = time.process_time()
    try:
        read()
    except FusionError as error:
        said = str(error)
        if len(said) > 5000:
            return f"{case}: an error of {len(said)} characters"
        if not all(character.isprintable() or character == "\n" for character in said):
            return f"{case}: an error that is not printable: {said!r}"
    except AssertionError as error:
        return f"{case}: {str(error)[:300]}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error)[:300]!r}"
    if (took := time.process_time() - began) > SECONDS:
        return f"{case}: {took:.0f} s"
    return None


COUNTS = [50, pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.long
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_clear_errors_or_right_results(kind, count, place, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    name, files, read = KINDS[kind]
    found = mutations(place / name, only=files)
    cases = sample(found, count)
    found_wrong = []
    for case in cases:
        folder = mutated(place / name, case, tmp_path / "copy")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        found_wrong += filter(None, [wrong(case, lambda f=folder: read(f, place, tmp_path / "out"))])
    assert not found_wrong, f"{len(found_wrong)} of {len(cases)}:\n" + "\n".join(found_wrong)
    assert len(cases) == min(count, len(found))
    assert not (tmp_path / "planted").exists()


@pytest.mark.long
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_discovery_checks_repos_of_other_users(count, place, hub, tmp_path):
    """All repos at once, as `hf-fusion discover --check` finds them: those that fit, and reasons for the others."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token("fuzzer"))
    drawn = [case for case in mutations(place / "foxes") if "a link" not in case.name and "a folder" not in case.name]
    random.Random(0).shuffle(drawn)
    for number, case in enumerate(drawn[:count]):
        folder = mutated(place / "foxes", case, tmp_path / "copy")
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text("---\ntags: [hf-fusion-expert]\nlicense: mit\n---\n")
        api.create_repo(f"fuzzer/r{number}")
        api.upload_folder(repo_id=f"fuzzer/r{number}", folder_path=folder, commit_message=f"{number}")
    found = discover(author="fuzzer", api=api)
    assert len(found) == min(count, len(drawn))
    judged = check_compatibility(found, api=api)
    assert len(judged.accepted) + len(judged.rejected) == len(found)
    for rejected in judged.rejected:
        assert rejected.reasons and all(
            character.isprintable() for reason in rejected.reasons for character in str(reason)
        )
