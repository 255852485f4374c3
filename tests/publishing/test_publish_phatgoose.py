"""Publishing a router: its card with measurements and plot, and loading without hf_fusion and peft."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import adapter, bert, make_tokenizer
from tiny_routed import save_base, save_lora

from hf_fusion import Expert, Gates, PhatgooseRouter, evaluate
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.plots import plot_routing
from hf_fusion.evaluation.routing_map import ROUTING_FILE, ROUTING_PICTURE, RoutingMap, map_routing
from hf_fusion.fusion import fuse, save_fused
from hf_fusion.hub.load import load_experts
from hf_fusion.publishing.plan import plan
from hf_fusion.publishing.publish import publish

SUITE = {
    "foxes": Dataset.from_list([{"prompt": f"the quick fox {i}", "target": " jumps"} for i in range(4)]),
    "dogs": Dataset.from_list([{"prompt": f"a lazy `dog` {i}\n", "target": " said"} for i in range(3)]),
}
# How one without hf_fusion and peft loads it, and how a user who has hf_fusion reads the folder.
STRANGER = """
import sys
sys.modules["hf_fusion"] = sys.modules["peft"] = None
import torch
torch.set_grad_enabled(False)
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, where = {repo!r}, dict(revision={sha!r}, trust_remote_code=True)
inputs = AutoTokenizer.from_pretrained(repo, **where)({texts!r}, padding=True, return_tensors="pt")
loaded = AutoModelForCausalLM.from_pretrained(repo, **where)
torch.save([loaded(**inputs).logits, loaded.generate(**inputs, max_new_tokens=5, do_sample=False)], {out!r})
del sys.modules["hf_fusion"]
from hf_fusion.fusion import load_fused
model, recipe = load_fused({folder!r})
assert torch.equal(model(**inputs).logits, loaded(**inputs).logits), "load_fused differs"
print("recipe", recipe.parameters)
{then}
"""


@pytest.fixture
def ids(owner, tmp_path):
    """Two adapters on the Hub, and their base."""
    owner.push("base", save_base(tmp_path / "base"))
    owner.push("foxes", save_lora(tmp_path / "foxes", f"{owner.name}/base"))
    owner.push("dogs", save_lora(tmp_path / "dogs", f"{owner.name}/base", seed=1, rank=8))
    return [f"{owner.name}/foxes", f"{owner.name}/dogs"]


def measured(model, ids, folder, api):
    """Leaves results.json, routing.json and routing.png in a folder, as `hf-fusion eval` does."""
    owners = {"foxes": ids[0]}
    results = evaluate(
        load_experts(ids, api=api),
        SUITE,
        train_rows={},
        owners=owners,
        predictors=["base", "PHATGOOSE", "merged", "experts", "oracle"],
        command="a `command`",
    )
    results.save(folder / "results.json")
    routing = map_routing(model, SUITE, owners=owners)
    routing.save(folder / ROUTING_FILE)
    plot_routing(routing, folder / ROUTING_PICTURE)
    return results, routing


def test_the_map_is_the_mean_over_linears_and_tokens_that_decide_on_the_answer(owner, ids):
    model = fuse("phatgoose", ids, api=owner.api)
    routing = map_routing(model, SUITE, owners={"foxes": ids[0]}, batch_size=2)
    assert (routing.experts, routing.tasks, routing.n, routing.tokens) == (ids, ["foxes", "dogs"], [4, 3], "answers")
    assert routing.example == "the quick fox 0"
    assert routing.owner_weight() == routing.weights[0][0]
    model.record_routing = 4096
    for task, weights in zip(SUITE, routing.weights, strict=True):
        total = torch.zeros(2)
        for row in SUITE[task]:  # one by one, without padding
            prompt, target = (model.processor(row[part])["input_ids"] for part in ("prompt", "target"))
            model(torch.tensor([prompt + target + [model.processor.eos_token_id]]))
            trace = model.routing_trace()
            own = torch.stack([trace.expert_weights(module)[0] for module in trace.modules])  # (modules, T, E)
            total += own[:, len(prompt) - 1 : -1].sum((0, 1))
        assert weights == pytest.approx((total / total.sum()).tolist(), abs=1e-4)
    assert RoutingMap(**json.loads(json.dumps(asdict(routing)))) == routing


def test_the_map_of_classifiers_counts_all_tokens_but_padding():
    base = bert(["x", "y"])
    gate = torch.randn(32, generator=torch.Generator().manual_seed(1))
    experts = []
    for seed, name in enumerate(["me/one", "me/two"]):
        lora = adapter(base, 4, 2, seed, ["query"])
        vectors = dict.fromkeys([*lora.lora, "classifier"], gate * (1 - 2 * seed))
        experts.append(Expert(name, base, lora, make_tokenizer(), ["x", "y"], gates=Gates(vectors)))
    model = PhatgooseRouter.from_experts(experts, top_k=1)
    rows = Dataset.from_dict({"text": ["the fox", "a lazy dog said the gate"], "label": ["x", "y"]})
    routing = map_routing(model, {"all": rows})
    assert (routing.tokens, routing.example) == ("all", None)
    model.record_routing = 4096
    first = torch.zeros(2)
    for text in rows["text"]:
        model(**model.processor(text, return_tensors="pt"))
        trace = model.routing_trace()
        first += sum(trace.expert_weights(module).sum((0, 1)) for module in trace.modules)
    assert routing.weights[0] == pytest.approx((first / first.sum()).tolist(), abs=1e-4)


def test_repo_published_by_reference_loads_and_shows_results(hub, owner, ids, tmp_path, fresh_python):
    model = fuse("phatgoose", ids, base_by_reference=True, api=owner.api)
    folder = save_fused(model, tmp_path / "fused")
    results, routing = measured(model, ids, folder, owner.api)
    done = publish(folder, f"{owner.name}/both", api=owner.api)
    files = owner.api.list_repo_files(done.repo_id)
    assert {"fusion.yaml", "routing.json", "routing.png", "tokenizer.json", "modeling_phatgoose.py"} <= set(files)
    weights = owner.api.hf_hub_download(done.repo_id, "model.safetensors")
    with safe_open(weights, "pt") as tensors:
        assert all(".experts." in name for name in tensors.keys())  # noqa: SIM118

    card = ModelCard(Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text(encoding="utf-8"))
    assert card.data.tags == ["hf-fusion", "merge", "phatgoose"]
    assert card.data.base_model == [*ids, f"{owner.name}/base"]
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-generation")
    scores = {entry.dataset_name: (entry.metric_type, entry.metric_value) for entry in card.data.eval_results}
    own = results["PHATGOOSE"].scores
    assert scores == {task: ("exact_match", round(own[task].score, 4)) for task in SUITE}
    assert pinned_revision(str(card)) == done.sha
    shown = f"{routing.weights[0].index(max(routing.weights[0]))}"
    assert (
        f"![Heat map of tasks and experts. The expert with the most weight on foxes: {('foxes', 'dogs')[int(shown)]}"
        in card.text
    )
    assert "](routing.png)" in card.text
    assert "| 4 | trained |" in card.text  # rank and gates
    assert "The repo contains only the experts; their base is downloaded" in card.text
    assert f"a token costs {model.summary()['relative_cost']:.2f} times the base's operations" in card.text
    for system in ("base:", "**PHATGOOSE**:", "merged:", "oracle:", *ids):
        assert f"| {system}" in card.text

    texts = ["the quick fox", "a dog, said the router to the gate"]
    code = STRANGER.format(
        repo=done.repo_id,
        sha=done.sha,
        texts=texts,
        out=str(tmp_path / "out.pt"),
        folder=str(folder),
        then=usage_code(str(card)),
    )
    said = fresh_python(code, hub, hub.token(owner.name)).stdout
    assert "recipe {'base_by_reference': True}" in said
    logits, ids_out = torch.load(tmp_path / "out.pt")
    inputs = model.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs).logits)
    assert torch.equal(ids_out, model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert f"{{'{ids[0]}': " in said.splitlines()[-1]  # the usage block: the experts' shares of the routing weight


def test_complete_repo_needs_no_other_repo(hub, owner, ids, tmp_path):
    folder = save_fused(fuse("phatgoose", ids, api=owner.api), tmp_path / "fused")
    planned = plan(folder, f"{owner.name}/both", api=owner.api)
    assert "Not measured: neither" in planned.card
    assert "routing.png" not in planned.card
    assert "The repo contains only the experts" not in planned.card
    assert any(name.endswith("embed_tokens.weight") for name in load_file(folder / "model.safetensors"))


def test_a_gated_base_by_reference_stays_behind_its_gate(owner, ids, tmp_path):
    owner.api.update_repo_settings(f"{owner.name}/base", gated="manual")
    whole = fuse("phatgoose", ids, api=owner.api)
    with pytest.raises(FusionError, match=f"private or gated experts: {owner.name}/base"):
        plan(whole, f"{owner.name}/both", private=False, api=owner.api)
    parts = fuse("phatgoose", ids, base_by_reference=True, api=owner.api)
    assert not plan(parts, f"{owner.name}/both", private=False, api=owner.api).private
    owner.api.update_repo_settings(ids[0], private=True)
    with pytest.raises(FusionError, match=f"private or gated experts: {ids[0]}"):
        plan(parts, f"{owner.name}/both", private=False, api=owner.api)


def test_saving_a_new_fusion_removes_old_results(owner, ids, tmp_path):
    model = fuse("phatgoose", ids, api=owner.api)
    folder = save_fused(model, tmp_path / "fused")
    measured(model, ids, folder, owner.api)
    with Image.open(folder / ROUTING_PICTURE) as picture:
        assert picture.size[0] > 1000
    save_fused(model, folder, overwrite=True)
    assert not {"results.json", ROUTING_FILE, ROUTING_PICTURE} & {path.name for path in folder.iterdir()}
    (folder / "results.json").write_text(json.dumps({"tasks": [{"name": "x"}], "systems": []}))
    with pytest.raises(FusionError, match=r"tasks\[0\].metric is missing"):
        plan(folder, f"{owner.name}/both", api=owner.api)
