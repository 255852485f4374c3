"""Publishing a WEMoE: its card with measurements and plot, and loading without hf_fusion and peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from models.test_wemoe import shuffled
from models.test_wemoe_experts import different_labels
from PIL import Image
from tiny import image_processor as processor_of
from tiny import images, make_tokenizer, t5
from tiny_fused import base_expert, clip, experts_of, fine_tuned

from hf_fusion import Expert, WEMoEModel
from hf_fusion.cards.usage import pinned_revision, usage_code
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.coefficient_map import COEFFICIENT_FILE, COEFFICIENT_PICTURE, CoefficientMap, map_coefficients
from hf_fusion.evaluation.intervals import mean_of
from hf_fusion.evaluation.plots import plot_coefficients
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results
from hf_fusion.evaluation.task_metrics import score_of
from hf_fusion.fusion import fuse, save_fused
from hf_fusion.publishing.plan import plan
from hf_fusion.publishing.publish import publish
from hf_fusion.training.batches import zero_shot_examples

SUITE = {
    "task-1": Dataset.from_dict(
        {"text": ["the quick fox", "a lazy dog said the gate", "dogs"], "label": ["b", "c", "d"]}
    ),
    "elsewhere": Dataset.from_dict({"text": ["nine routers", "a `fox`"]}),
}
# How one without hf_fusion and peft runs the card's usage block.
STRANGER = "import sys\nsys.modules['hf_fusion'] = sys.modules['peft'] = None\n"


@pytest.fixture
def ids(owner, tmp_path):
    """Three classifiers on the Hub, each with its own classes, and their base."""
    base, experts = different_labels()
    for name, model in [("base", base), *((e.name.rpartition("/")[2], e.model) for e in experts)]:
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-classification\n---\n")
        owner.push(name, tmp_path / name)
    return [f"{owner.name}/task-{k}" for k in range(3)]


def measured(model, folder):
    """Leaves results.json, coefficients.json and coefficients.png in a folder."""
    found = map_coefficients(model, SUITE, batch_size=2)
    found.save(folder / COEFFICIENT_FILE)
    plot_coefficients(found, folder / COEFFICIENT_PICTURE)
    rows, owner = SUITE["task-1"], found.owners["task-1"]
    labels = model.config.experts[model.experts.index(owner)]["labels"]
    right = []
    for row in rows:
        inputs = model.processor(row["text"], return_tensors="pt")
        right.append(labels[int(model(**inputs, task=owner).logits.argmax())] == row["label"])
    score = score_of(torch.tensor(right, dtype=torch.float64), "accuracy")
    scores = PredictorScores("WEMoE", "fused", {"task-1": score}, {"held-in": mean_of([score])})
    results = Results([MeasuredTask("task-1", "accuracy", len(rows), owner)], [scores], command="a `command`")
    results.save(folder / "results.json")
    return found, results


def plain_map(model, texts, **options):
    """Mean coefficients (L, K) of texts, one by one, without padding."""
    model.record_routing = True
    total = 0
    for text in texts:
        model(**model.processor(text, return_tensors="pt"), **options)
        total = total + model.routing_trace().coefficients()[0]
    model.record_routing = False
    return total / len(texts)


def test_the_map_is_the_mean_over_rows():
    base, experts = different_labels()
    model = WEMoEModel.from_experts([replace(e, processor=make_tokenizer()) for e in experts], base_expert(base))
    shuffled(model)
    found = map_coefficients(model, SUITE, batch_size=2)
    assert not model.record_routing
    assert (found.experts, found.tasks, found.n) == (model.experts, ["task-1", "elsewhere"], [3, 2])
    assert found.owners == {"task-1": "me/task-1"}
    assert (found.layers, found.scaling) == ([unit.name for unit in model.units], 0.3)
    assert found.example == "the quick fox"
    for rows, table in zip(SUITE.values(), found.coefficients, strict=True):
        assert torch.allclose(torch.tensor(table), plain_map(model, rows["text"]), atol=1e-5)
    assert found.coefficients[0] != found.coefficients[1]


def test_a_saved_map_is_read_back(tmp_path):
    found = CoefficientMap(["me/a"], ["l.0"], ["t"], [[[0.5]]], [3], {"t": "me/a"}, None, "x")
    found.save(tmp_path / COEFFICIENT_FILE)
    assert CoefficientMap.load(tmp_path / COEFFICIENT_FILE) == found


def test_language_models_are_read_by_their_prompts():
    """A causal one's answers are not read; an encoder's prompt and the start of its decoder are."""
    base = t5()
    experts = [replace(e, processor=make_tokenizer()) for e in experts_of(base)]
    model = shuffled(WEMoEModel.from_experts(experts, base_expert(base)))
    suite = {
        target: Dataset.from_dict({"prompt": ["the quick fox"], "target": [target]}) for target in (" jumps", " said")
    }
    found = map_coefficients(model, suite)
    assert torch.allclose(*map(torch.tensor, found.coefficients))
    assert [layer.split(".")[0] for layer in found.layers] == ["encoder"] * 2 + ["decoder"] * 2
    assert found.example == "the quick fox"


def test_images_are_read_by_the_towers_of_clip():
    base = clip()
    experts = [Expert(f"me/{k}", fine_tuned(base, k), processor=None) for k in range(2)]
    model = shuffled(WEMoEModel.from_experts(experts, base_expert(base)))

    def processor(text=None, images=None, **options):
        return make_tokenizer()(text, **options) if text else processor_of(16)(images=images, **options)

    rows = Dataset.from_dict({"image": images(3)})
    examples = zero_shot_examples(processor, rows, ["a fox", "a dog"])
    found = map_coefficients(model, {"pictures": examples}, batch_size=2)
    assert found.n == [3] and len(found.layers) == 4 and found.example is None
    model.record_routing = True
    model(**examples.collate([rows[i] for i in range(3)]))
    trace = model.routing_trace()
    wanted = torch.stack([trace.coefficients(layer).mean(0) for layer in trace.layers])
    assert torch.allclose(torch.tensor(found.coefficients[0]), wanted, atol=1e-5)


def test_published_with_measurements_it_loads_anywhere(hub, owner, ids, tmp_path, fresh_python):
    model = shuffled(fuse("wemoe", ids, base=f"{owner.name}/base", api=owner.api))
    folder = save_fused(model, tmp_path / "fused")
    found, results = measured(model, folder)
    done = publish(folder, f"{owner.name}/all", api=owner.api)
    files = owner.api.list_repo_files(done.repo_id)
    assert {"fusion.yaml", "coefficients.json", "coefficients.png", "tokenizer.json", "modeling_wemoe.py"} <= set(files)

    card = ModelCard(Path(owner.api.hf_hub_download(done.repo_id, "README.md")).read_text(encoding="utf-8"))
    assert card.data.tags == ["hf-fusion", "merge", "wemoe"]
    assert card.data.base_model == [*ids, f"{owner.name}/base"]
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-classification")
    [entry] = card.data.eval_results
    own = results["WEMoE"].scores["task-1"]
    assert (entry.dataset_name, entry.metric_value) == ("task-1", round(own.score, 4))
    assert pinned_revision(str(card)) == done.sha
    means = torch.tensor(found.coefficients).mean(1)
    best = means[0].argmax()
    assert f"largest mean on task-1: task-{best} {means[0, best]:.2f};" in card.text
    assert "](coefficients.png)" in card.text
    assert "as if merged once by task arithmetic, where every expert counts 0.3 for any input, until" in card.text
    assert f"| {model.summary()['merged_parameters']:,} |" in card.text

    said = fresh_python(STRANGER + usage_code(str(card)), hub, hub.token(owner.name)).stdout.splitlines()
    labels = model.config.experts[1]["labels"]
    with torch.no_grad():
        inputs = model.processor("the quick fox", return_tensors="pt")
        assert said[-2] == labels[int(model(**inputs, task=ids[1]).logits.argmax())]
    wanted = plain_map(model, ["the quick fox"]).mean(0).tolist()
    assert json.loads(said[-1].replace("'", '"')) == pytest.approx(dict(zip(ids, wanted, strict=True)), abs=1e-5)


def test_published_without_measurements(owner, ids, tmp_path):
    folder = save_fused(fuse("wemoe", ids, base=f"{owner.name}/base", api=owner.api), tmp_path / "fused")
    planned = plan(folder, f"{owner.name}/all", api=owner.api)
    assert "Not measured: neither" in planned.card
    assert "coefficients.png" not in planned.card
    done = publish(folder, f"{owner.name}/all", api=owner.api)
    assert "model.safetensors" in owner.api.list_repo_files(done.repo_id)


def test_saving_a_new_fusion_removes_old_results(owner, ids, tmp_path):
    model = fuse("wemoe", ids, base=f"{owner.name}/base", api=owner.api)
    folder = save_fused(model, tmp_path / "fused")
    measured(model, folder)
    with Image.open(folder / COEFFICIENT_PICTURE) as picture:
        assert picture.size[0] > 1000
    save_fused(model, folder, overwrite=True)
    assert not {"results.json", COEFFICIENT_FILE, COEFFICIENT_PICTURE} & {path.name for path in folder.iterdir()}
    (folder / "results.json").write_text(json.dumps({"tasks": [{"name": "x"}], "systems": []}))
    with pytest.raises(FusionError, match=r"tasks\[0\].metric is missing"):
        plan(folder, f"{owner.name}/all", api=owner.api)
