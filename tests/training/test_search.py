"""Gradient-free searches: adapter weights as in LoraHub, and greedy soups."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import TEXTS, bert, gpt2, llama, make_tokenizer

from hf_fusion import Expert, FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.training.search import greedy_soup, lorahub, search_weights

TOKENIZER = make_tokenizer()
PROMPTS = Dataset.from_dict(
    {"prompt": [f"<s>{text}" for text in TEXTS], "target": [" fox", " gate", " a dog", " nine"]}
)


# ---------------------------------------------------------------- weights


def test_the_search_finds_a_minimum_it_can_reach():
    wanted, seen = [0.8, -0.4, 0.0], []

    def loss(weights):
        seen.append(weights)
        return sum((w - v) ** 2 for w, v in zip(weights, wanted, strict=True))

    found = search_weights(loss, ["a", "b", "c"], l1=0.0, steps=80)
    assert found.weights == pytest.approx(wanted, abs=0.05) and found.loss < 0.01
    assert found.start == pytest.approx(0.8) and found.evaluations == len(seen) <= 80
    assert seen[0] == [0.0] * 3 and all(abs(w) <= 1.5 for weights in seen for w in weights)
    far = search_weights(lambda w: (w[0] - 9) ** 2, ["a"], l1=0.0)
    assert far.weights == [1.5]  # the limit
    # d/dw (w - 1)² + 2 |w| = 0 at w = 0: a penalty that leaves nothing
    assert search_weights(lambda w: (w[0] - 1) ** 2, ["a"], l1=2.0).weights[0] == pytest.approx(0, abs=0.05)
    assert search_weights(loss, ["a", "b", "c"], steps=1).weights == [0.0] * 3
    assert search_weights(loss, ["a", "b", "c"]) == search_weights(loss, ["a", "b", "c"])


def test_weights_that_break_the_model_are_not_chosen():
    found = search_weights(lambda w: float("nan") if w[0] > 0.3 else 1 - w[0], ["a"], l1=0.0)
    assert 0 <= found.weights[0] <= 0.3 and found.loss == found.loss
    with pytest.raises(FusionError, match="loss with all weights 0 is nan"):
        search_weights(lambda w: float("nan"), ["a"])


def test_without_scipy_there_is_a_hint(monkeypatch):
    for name in ("scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FusionError, match=r"needs scipy(.|\n)*pip install 'hf_fusion\[bench\]'"):
        search_weights(lambda w: 0.0, ["a"])


def save_adapter(folder, base, model, number, **options):
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    torch.manual_seed(number)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft_model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


def test_lorahub_finds_the_adapter_that_knows_the_task(tmp_path):
    """One of three adapters was trained on the rows: it gets most of the weight, and the recipe says the same."""
    model = llama(vocabulary=len(TOKENIZER))
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_alpha": 4}
    noise = [save_adapter(tmp_path / f"noise{i}", tmp_path / "base", model, i, **options) for i in range(2)]
    torch.manual_seed(7)
    taught = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    optimizer = torch.optim.Adam([p for p in taught.parameters() if p.requires_grad], lr=0.05)
    rows = []
    for row in PROMPTS:
        prompt, target = TOKENIZER(row["prompt"])["input_ids"], TOKENIZER(row["target"])["input_ids"]
        target = [*target, TOKENIZER.eos_token_id]
        rows.append((torch.tensor([prompt + target]), torch.tensor([[-100] * len(prompt) + target])))
    for _ in range(30):
        optimizer.zero_grad()
        sum(taught(input_ids=ids, labels=labels).loss for ids, labels in rows).backward()
        optimizer.step()
    taught.save_pretrained(tmp_path / "taught")
    file = tmp_path / "taught" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))

    found = lorahub([*noise, tmp_path / "taught"], PROMPTS)
    assert found.weights[2] > 0.5 > max(abs(w) for w in found.weights[:2])
    assert found.loss < found.start - 0.3 and found.evaluations <= 40
    merge(found.recipe, tmp_path / "merged")
    merged = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "merged").eval()
    with torch.no_grad():  # the mean over the rows' own means, all of them in one batch of LoraHub's
        counts = torch.tensor([int((labels != -100).sum()) for _, labels in rows]).float()
        losses = torch.stack([merged(input_ids=ids, labels=labels).loss for ids, labels in rows])
    assert found.loss == pytest.approx(float((losses * counts).sum() / counts.sum()), rel=1e-4)


def test_lorahub_refuses_adapters_it_cannot_sum(tmp_path):
    model = bert(["no", "yes"])
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    headed = [save_adapter(tmp_path / f"headed{i}", tmp_path / "base", model, i, **options) for i in range(2)]
    rows = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]})
    with pytest.raises(FusionError, match="headed1 saves classifier.* in full"):
        lorahub(headed, rows)
    with pytest.raises(FusionError, match="base is not an adapter"):
        lorahub([tmp_path / "base", *headed], rows)


# ---------------------------------------------------------------- soups


def trained(seed, steps, rows, model=None):
    """A classifier some steps away from a start that all share."""
    model = model or bert(["no", "yes"])
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = TOKENIZER(list(rows["text"]), padding=True, return_tensors="pt")
    for _ in range(steps):
        kept = torch.rand(len(rows)) < 0.5
        if kept.any():
            own = {k: v[kept] for k, v in inputs.items()}
            optimizer.zero_grad()
            model(**own, labels=torch.tensor(rows["label"])[kept]).loss.backward()
            optimizer.step()
    return model.eval()


ROWS = Dataset.from_dict(
    {"text": [f"{text} {i}" for i in range(8) for text in TEXTS], "label": [int(i % 3 == 0) for i in range(32)]}
)


def accuracy(model, rows=ROWS):
    with torch.no_grad():
        logits = model(**TOKENIZER(list(rows["text"]), padding=True, return_tensors="pt")).logits
    return float((logits.argmax(-1) == torch.tensor(rows["label"])).float().mean())


def slow_soup(models):
    """The paper's recipe 1 as a plain loop, which averages the whole list for each candidate."""
    order = sorted(range(len(models)), key=lambda i: -accuracy(models[i]))
    mixed, chosen, best = copy.deepcopy(models[0]), [], -1.0
    for index in order:
        states = [models[i].state_dict() for i in [*chosen, index]]
        mixed.load_state_dict({name: sum(s[name] for s in states) / len(states) for name in states[0]})
        if accuracy(mixed) >= best:
            chosen, best = [*chosen, index], accuracy(mixed)
    return order, chosen, best


@pytest.mark.long
def test_greedy_soup_matches_the_paper(tmp_path):
    models = [trained(seed, steps, ROWS) for seed, steps in ((0, 12), (1, 3), (2, 8), (3, 0))]
    models.append(bert(["no", "yes"], seed=9))  # from another start: no average with it is good
    folders = []
    for number, model in enumerate(models):
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        TOKENIZER.save_pretrained(folders[-1])
    order, chosen, best = slow_soup(models)
    soup = greedy_soup(folders, ROWS)
    assert soup.names == [str(folders[i]) for i in order]
    assert soup.scores == pytest.approx([accuracy(models[i]) for i in order])
    assert soup.chosen == [str(folders[i]) for i in chosen] and soup.score == pytest.approx(best)
    assert 1 <= len(chosen) < len(models)
    merge(soup.recipe, tmp_path / "soup")
    merged = load_file(tmp_path / "soup" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(models[i].state_dict()[name] for i in chosen) / len(chosen))
    assert greedy_soup(folders[:1], ROWS).chosen == [str(folders[0])]


def test_soups_of_language_models_and_mismatched_inputs():
    experts = [Expert(f"me/{i}", gpt2(i, vocabulary=len(TOKENIZER)), processor=TOKENIZER) for i in range(2)]
    soup = greedy_soup(experts, PROMPTS)  # tied embeddings; scored by tokens
    assert soup.chosen[0] == soup.names[0] and soup.score >= soup.scores[0] >= soup.scores[1]
    one = Expert("me/one", bert(["no", "yes"]), processor=TOKENIZER, labels=["no", "yes"])
    other = Expert("me/other", bert(["yes", "no"]), processor=TOKENIZER, labels=["yes", "no"])
    wide = Expert("me/wide", bert(["no", "yes"], hidden=48), processor=TOKENIZER, labels=["no", "yes"])
    with pytest.raises(FusionError, match="me/other has the labels"):
        greedy_soup([one, other], ROWS)
    with pytest.raises(FusionError, match=r"has no bert.embeddings.word_embeddings.weight of \[400, (32|48)\]"):
        greedy_soup([one, wide], ROWS)
    with pytest.raises(FusionError, match="the list is empty"):
        greedy_soup([], ROWS)
