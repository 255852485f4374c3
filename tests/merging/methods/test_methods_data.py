"""Data-dependent methods: statistics of experts and merges, compared with plain sums in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import TEXTS, bert, gpt2, image_processor, images, llama, make_tokenizer, t5, vit
from transformers import DataCollatorWithPadding, GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_fusion import Expert, FusionError
from hf_fusion.merging.engine.tensors import MemoryReader, Statistic, Tensors, merge_tensors
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods.fisher_regmean import fisher, regmean
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.training.batches import Examples
from hf_fusion.training.fisher import measure_fisher
from hf_fusion.training.gram import measure_gram, measure_gram_merged

ABC = ["a", "b", "c"]
TOKENIZER = make_tokenizer()
WORDS = Dataset.from_dict({"text": [*TEXTS, "a fox", "gate"], "label": [0, 1, 2, 1, 0, 2]})
PROMPTS = Dataset.from_dict(
    {"prompt": [f"<s>{text}" for text in TEXTS], "target": [" fox", " gate", " a dog", " nine"]}
)


def run(function, experts, statistics, **parameters):
    """What a method makes of one tensor."""
    tensors = Tensors("layers.0.weight", None, [MemoryReader(e) for e in experts], statistics=statistics)
    with torch.inference_mode():
        pieces = [values.clone() for _, values in merge_tensors(tensors, function(tensors, **parameters))]
    return torch.cat(pieces).view(tensors.shape)


# ---------------------------------------------------------------- from statistics to a tensor


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_is_the_weighted_mean(normalize):
    torch.manual_seed(0)
    experts = [torch.randn(300, 1000) for _ in range(3)]  # more than a chunk
    measured = [torch.rand(300, 1000) ** 8 * 10.0 ** (-2 * i) for i in range(3)]
    measured[0][:100], measured[1][50:150], measured[2][:120] = 0, 0, 0
    norms, weight = [3.0, 0.5, 1e-3], [1.0, 2.0, 0.5]
    statistics = [Statistic(MemoryReader(f), norm=n) for f, n in zip(measured, norms, strict=True)]
    got = run(fisher, experts, statistics, weight=weight, floor=1e-6, normalize=normalize)
    scale = [w / (n + 1e-6) if normalize else w for w, n in zip(weight, norms, strict=True)]
    shares = [s * (f.double() + 1e-6) for s, f in zip(scale, measured, strict=True)]
    wanted = sum(s * e.double() for s, e in zip(shares, experts, strict=True)) / sum(shares)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-6)
    averaged = run(fisher, experts, [None] * 3, weight=weight)
    wanted = sum(w * e.double() for w, e in zip(weight, experts, strict=True)) / sum(weight)
    torch.testing.assert_close(averaged.double(), wanted, rtol=1e-5, atol=1e-6)


def slow_regmean(experts, inputs, weight, off_diagonal):
    """(Σ w G)⁻¹ Σ w G Wᵀ in double precision, G one row at a time."""
    size = inputs[0].shape[1]
    total, target = torch.zeros(size, size).double(), 0
    for own, x, w in zip(experts, inputs, weight, strict=True):
        gram = sum(torch.outer(row, row) for row in x.double()) / len(x)
        gram = torch.where(torch.eye(size).bool(), gram, gram * off_diagonal) * w
        total, target = total + gram, target + gram @ own.double().T
    return torch.linalg.solve(total, target).T


@pytest.mark.parametrize("off_diagonal", [0.0, 0.6, 0.95, 1.0])
def test_regmean_solves_its_equation(off_diagonal):
    torch.manual_seed(0)
    experts = [torch.randn(6, 16) for _ in range(3)]
    inputs = [torch.randn(40 + i, 16) @ torch.randn(16, 16) for i in range(3)]
    grams, weight = [x.T @ x / len(x) for x in inputs], [1.0, 0.25, 2.0]
    wanted = slow_regmean(experts, inputs, weight, off_diagonal)
    statistics = [Statistic(MemoryReader(g)) for g in grams]
    got = run(regmean, experts, statistics, weight=weight, off_diagonal=off_diagonal)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)
    conv = [Statistic(MemoryReader(g), axis=0) for g in grams]
    transposed = run(regmean, [e.T for e in experts], conv, weight=weight, off_diagonal=off_diagonal)
    torch.testing.assert_close(transposed.T, got)


def test_regmean_averages_where_examples_say_nothing():
    """An input that was always 0, and fewer examples than inputs."""
    torch.manual_seed(0)
    experts = [torch.randn(6, 8) for _ in range(2)]
    inputs = [torch.randn(3, 8) for _ in range(2)]
    for x in inputs:
        x[:, 5] = 0
    statistics = [Statistic(MemoryReader(x.T @ x / 3)) for x in inputs]
    got = run(regmean, experts, statistics, off_diagonal=1.0, weight=[1.0, 1.0])
    torch.testing.assert_close(got[:, 5], (experts[0] + experts[1])[:, 5] / 2)
    for x, expert in zip(inputs, experts, strict=True):  # 6 examples, 7 inputs: all of them can be met
        torch.testing.assert_close(x @ got.T, x @ expert.T, rtol=1e-2, atol=1e-2)
    assert got.abs().max() < 20


def test_mismatched_statistics_are_refused():
    experts, gram = [torch.randn(6, 8)] * 2, Statistic(MemoryReader(torch.eye(8)))
    for function, statistics, weight, message in (
        (regmean, [gram, None], [1.0, 1.0], "statistics of expert 2 lack layers.0.weight"),
        (regmean, [gram, Statistic(MemoryReader(torch.eye(6)))], [1.0, 1.0], "not those of a weight of"),
        (fisher, [gram, gram], [1.0, 1.0], "Fisher information of layers.0.weight is not of"),
        (fisher, [None, None], [0.0, 0.0], "weights of layers.0.weight are all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(function, experts, statistics, weight=weight)


# ---------------------------------------------------------------- from rows to statistics


def slow_fisher(model, inputs, log_probabilities):
    """E_x Σ_y p(y|x) (∇ log p(y|x))², one example, one label at a time, in double precision."""
    model = copy.deepcopy(model).double()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in inputs:
        for weight, index in log_probabilities(model, row, None):
            model.zero_grad()
            log_probabilities(model, row, index).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[name] += weight * p.grad**2 / len(inputs)
    return found


def of_classes(model, row, index):
    log = model(**row).logits[0].log_softmax(-1)
    return [(float(p), i) for i, p in enumerate(log.exp())] if index is None else log[index]


def check(got, wanted):
    assert got.tensors.keys() == wanted.keys() == got.lookup.keys()
    for name, tensor in wanted.items():
        floor = 1e-6 * float(max(t.max() for t in wanted.values()))
        torch.testing.assert_close(got.tensors[name].double(), tensor, rtol=1e-3, atol=floor)
    assert got.norm == pytest.approx(float(torch.stack([t.norm() for t in wanted.values()]).norm()), rel=1e-4)
    assert sum(float(t.sum()) for t in wanted.values()) > 0


def test_fisher_of_a_classifier_counts_all_classes():
    model = bert(ABC)
    rows = [TOKENIZER(text, return_tensors="pt") for text in WORDS["text"]]
    got = measure_fisher(Expert("it", model, processor=TOKENIZER, labels=ABC), WORDS)
    assert got.examples == 6 and got.facts["labels"] == "expected"
    check(got, slow_fisher(model, rows, of_classes))
    assert not any(p.grad is not None for p in model.parameters())


def test_examples_of_one_length_share_a_backward_pass():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(TOKENIZER)}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, pad_token_id=TOKENIZER.pad_token_id)).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rows = WORDS.select([0] * 5 + [1] * 20)
    got = measure_fisher(Expert("it", model, processor=TOKENIZER, labels=ABC), rows, examples=25)
    assert len(calls) <= 1 + 3 + 3  # which labels; whether batches do, of two lengths up to three batches
    inputs = [TOKENIZER(text, return_tensors="pt") for text in rows["text"]]
    check(got, slow_fisher(model, inputs, of_classes))


def test_weights_used_outside_their_module_fall_back_to_autograd():
    """A weight that is used without calling its module: batches would miss a part of its gradient."""
    model = bert(ABC)
    forward = model.forward

    def twice(**inputs):
        output = forward(**inputs)
        output.logits = output.logits + output.logits @ model.classifier.weight[:, :3]
        return output

    model.forward = twice
    rows = [TOKENIZER(text, return_tensors="pt") for text in WORDS["text"]]
    got = measure_fisher(Expert("it", model, processor=TOKENIZER, labels=ABC), WORDS)

    def of_twice(model, row, index):
        logits = model(**row).logits[0]
        log = (logits + logits @ model.classifier.weight[:, :3]).log_softmax(-1)
        return [(float(p), i) for i, p in enumerate(log.exp())] if index is None else log[index]

    model.forward = forward
    check(got, slow_fisher(model, rows, of_twice))


def test_fisher_of_true_and_sampled_labels():
    model = bert(ABC)
    expert = Expert("it", model, processor=TOKENIZER, labels=ABC)
    rows = [{**TOKENIZER(r["text"], return_tensors="pt"), "truth": r["label"]} for r in WORDS]

    def of_truth(model, row, index):
        own = {k: v for k, v in row.items() if k != "truth"}
        return [(1.0, 0)] if index is None else model(**own).logits[0].log_softmax(-1)[row["truth"]]

    check(measure_fisher(expert, WORDS, labels="true"), slow_fisher(model, rows, of_truth))
    many = Dataset.from_dict({"text": ["a dog"] * 300, "label": [0] * 300})
    sampled = measure_fisher(expert, many, labels="sampled", examples=300)
    exact = measure_fisher(expert, many.select([0]))
    name = "classifier.weight"
    error = (sampled.tensors[name] - exact.tensors[name]).norm() / exact.tensors[name].norm()
    assert float(error) < 0.4  # 1 / √300, times what an answer's gradient varies by
    one, again = (measure_fisher(expert, WORDS, labels="sampled", seed=3) for _ in range(2))
    assert all(tensor.equal(again.tensors[name]) for name, tensor in one.tensors.items())


def test_fisher_of_a_regressor():
    model = bert(["score"])
    rows = [TOKENIZER(text, return_tensors="pt") for text in WORDS["text"]]
    scores = Dataset.from_dict({"text": WORDS["text"], "label": [0.5] * 6})

    def squared(model, row, index):
        return [(1.0, 0)] if index is None else model(**row).logits[0, 0]

    got = measure_fisher(Expert("it", model, processor=TOKENIZER, labels=["score"]), scores)
    check(got, slow_fisher(model, rows, squared))


@pytest.mark.parametrize("build", [llama, t5])
def test_fisher_of_a_language_model_counts_the_targets_tokens(build):
    model = build()
    rows = []
    for row in PROMPTS:
        prompt = TOKENIZER(row["prompt"])["input_ids"]
        end = [] if build is t5 else [TOKENIZER.eos_token_id]
        rows.append((torch.tensor([prompt]), torch.tensor([[*TOKENIZER(row["target"])["input_ids"], *end]])))

    def of_target(model, row, index):
        if index is None:
            return [(1.0, 0)]
        prompt, target = row
        if build is t5:
            return -model(input_ids=prompt, labels=target).loss * target.shape[1]
        logits = model(input_ids=torch.cat([prompt, target], 1)).logits[0, prompt.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(1, target.T).sum()

    expert = Expert("it", model, processor=TOKENIZER)
    got = measure_fisher(expert, PROMPTS)
    assert got.facts["labels"] == "true"
    check(got, slow_fisher(model, rows, of_target))
    assert measure_fisher(expert, PROMPTS, labels="sampled").norm > 0
    with pytest.raises(FusionError, match="labels='expected' of it"):
        measure_fisher(expert, PROMPTS, labels="expected")


def slow_gram(model, inputs):
    """XᵀX / N of the inputs of every linear, one example at a time, in double precision."""
    model, seen = copy.deepcopy(model).double(), {}

    def hook(name):
        return lambda module, x: seen.setdefault(name, []).append(x[0].detach().reshape(-1, x[0].shape[-1]))

    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.register_forward_pre_hook(hook(f"{path}.weight"))
    with torch.no_grad():
        for row in inputs:
            model(**{k: v.double() if v.is_floating_point() else v for k, v in row.items()})
    return {name: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for name, x in seen.items()}


def check_gram(got, model, inputs):
    wanted = slow_gram(model, inputs)
    assert got.lookup.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got.tensors[got.lookup[name][0]].double(), tensor, rtol=1e-3, atol=1e-4)


def test_gram_of_texts_and_images():
    model = bert(ABC)
    rows = [dict(TOKENIZER(text, return_tensors="pt")) for text in WORDS["text"]]
    got = measure_gram(Expert("it", model, processor=TOKENIZER, labels=ABC), WORDS)
    check_gram(got, model, rows)
    names = [f"bert.encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")]
    assert {got.lookup[name] for name in names} == {(names[0], 1)}  # one matrix for the three
    assert got.facts["tokens"][names[0]] == sum(row["input_ids"].numel() for row in rows)
    model, processor = vit(ABC), image_processor(16)
    got = measure_gram(
        Expert("it", model, processor=processor, labels=ABC), Dataset.from_dict({"image": images(5)}), batch_size=2
    )
    check_gram(got, model, [dict(processor(images=[image], return_tensors="pt")) for image in images(5)])


def test_gram_matrices_are_summed_in_double_precision():
    """Products of the inputs that the model computes in float32 are exact up to the rounding of the result."""
    model, seen = bert(ABC), []
    path = "bert.encoder.layer.1.output.dense"
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()[0].double()))
    got = measure_gram(Expert("it", model, processor=TOKENIZER, labels=ABC), WORDS, batch_size=1)
    handle.remove()
    x = torch.cat(seen)
    wanted = x.T @ x / len(x)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.tensors[f"{path}.weight"].double(), wanted, rtol=eps / 2, atol=1e-15)


def test_gram_of_embeddings_needs_no_labels():
    model = bert(ABC)
    rows = [dict(TOKENIZER(text)) for text in WORDS["text"]]
    bare = Examples(rows, DataCollatorWithPadding(TOKENIZER), lambda model, inputs: None)
    got = measure_gram(Expert("it", model.bert, processor=TOKENIZER), bare)
    want = measure_gram(Expert("it", model, processor=TOKENIZER, labels=ABC), WORDS)
    assert got.examples == want.examples == 6
    own = "encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(got.tensors[got.lookup[own][0]], want.tensors[want.lookup[f"bert.{own}"][0]])


def test_gram_of_conv1d_has_its_axis():
    model = gpt2(vocabulary=len(TOKENIZER))
    got = measure_gram(Expert("it", model, processor=TOKENIZER), PROMPTS)
    axes = {name: axis for name, (_, axis) in got.lookup.items()}
    assert axes.pop("lm_head.weight") == 1 and set(axes.values()) == {0}
    assert got.tensors["transformer.h.0.mlp.c_proj.weight"].shape == (192, 192)


def test_adapter_is_evaluated_merged_into_its_base(tmp_path):
    base = bert(ABC)
    options = {"r": 2, "target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    merged = adapted.merge_and_unload().requires_grad_(True)
    rows = [dict(TOKENIZER(text, return_tensors="pt")) for text in WORDS["text"]]
    check_gram(measure_gram(tmp_path / "adapter", WORDS), merged, rows)
    check(measure_fisher(tmp_path / "adapter", WORDS), slow_fisher(merged, rows, of_classes))


# ---------------------------------------------------------------- through the engine


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("one", "two")):
        bert(ABC, seed).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def recipe_of(method, folders, **parameters):
    experts = [RecipeExpert(str(f), parameters={"statistics": str(f.with_suffix(".stats"))}) for f in folders]
    return Recipe(method, tuple(experts), parameters=parameters)


def test_recipes_name_the_statistics(folders, tmp_path):
    experts = [load_file(folder / "model.safetensors") for folder in folders]
    with pytest.raises(FusionError, match=r"one.stats has no fisher.safetensors(.|\n)*measure_fisher\(expert, rows\)"):
        merge(recipe_of("fisher", folders), tmp_path / "out")
    measured = [measure_fisher(folder, WORDS) for folder in folders]
    grams = [measure_gram(folder, WORDS) for folder in folders]
    for folder, *all_of_it in zip(folders, measured, grams, strict=True):
        for own in all_of_it:
            own.save(folder.with_suffix(".stats"))
    merge(recipe_of("fisher", folders), tmp_path / "fisher")
    merge(recipe_of("regmean", folders, off_diagonal=0.6), tmp_path / "regmean")
    found = load_file(tmp_path / "fisher" / "model.safetensors")
    for name, tensor in found.items():
        shares = [own.tensors[name].double() + 1e-6 for own in measured]
        wanted = sum(s * e[name].double() for s, e in zip(shares, experts, strict=True)) / sum(shares)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5)
    found, linears = load_file(tmp_path / "regmean" / "model.safetensors"), 0
    for name, tensor in found.items():
        wanted = (experts[0][name] + experts[1][name]).double() / 2
        if name in grams[0].lookup:
            own = [g.tensors[g.lookup[name][0]].double() for g in grams]
            own = [torch.where(torch.eye(len(g)).bool(), g, 0.6 * g) for g in own]
            target = sum(g @ e[name].double().T for g, e in zip(own, experts, strict=True))
            wanted, linears = torch.linalg.solve(sum(own), target).T, linears + 1
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-3, atol=1e-4)
    assert linears == 14
    bare = Recipe("regmean", tuple(RecipeExpert(str(folder)) for folder in folders))
    with pytest.raises(FusionError, match="regmean needs statistics of .*one"):
        merge(bare, tmp_path / "out")
    with pytest.raises(FusionError, match="linear has no parameter 'statistics'"):
        merge(recipe_of("linear", folders), tmp_path / "out")


def test_regmean_plus_plus_uses_inputs_from_merged_layers(folders, tmp_path):
    """Against layers that are called one by one, as the paper has it."""
    other = Dataset.from_dict({"text": ["lazy dog", "fox", "said the router to the gate"], "label": [0, 1, 2]})
    found = measure_gram_merged(folders, [WORDS, other], off_diagonal=0.9)
    for folder, own in zip(folders, found, strict=True):
        own.save(folder.with_suffix(".stats"))
    merge(recipe_of("regmean", folders, off_diagonal=0.9), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")

    models, merged = [bert(ABC, seed).double() for seed in range(2)], bert(ABC, 5).double()
    average = {n: (t + models[1].state_dict()[n]) / 2 for n, t in models[0].state_dict().items()}
    merged.load_state_dict(average)
    states = []
    for rows in (WORDS, other):
        texts = [TOKENIZER(text, return_tensors="pt").input_ids for text in rows["text"]]
        states.append([merged.bert.embeddings(ids).detach() for ids in texts])
    for number, layer in enumerate(merged.bert.encoder.layer):
        own, grams = [model.bert.encoder.layer[number] for model in models], []
        for expert, rows in zip(own, states, strict=True):
            seen = {}
            handles = [
                m.register_forward_pre_hook(
                    lambda m, x, n=n, seen=seen: seen.setdefault(n, []).append(x[0][0].detach())
                )
                for n, m in expert.named_modules()
                if isinstance(m, torch.nn.Linear)
            ]
            for row in rows:
                expert(row)
            for handle in handles:
                handle.remove()
            grams.append({n: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for n, x in seen.items()})
        for name in grams[0]:
            pair = [torch.where(torch.eye(len(g[name])).bool(), g[name], 0.9 * g[name]) for g in grams]
            target = sum(g @ e.get_submodule(name).weight.T for g, e in zip(pair, own, strict=True))
            layer.get_submodule(name).weight.data = torch.linalg.solve(sum(pair), target).T
        states = [[layer(row) for row in rows] for rows in states]
        states = [[(row[0] if isinstance(row, tuple) else row).detach() for row in rows] for rows in states]
    wanted = merged.state_dict()
    for name in got:
        if ".layer." in name or "embeddings" in name:
            torch.testing.assert_close(got[name].double(), wanted[name], rtol=1e-3, atol=1e-3)
    plain = [measure_gram(folder, rows) for folder, rows in zip(folders, (WORDS, other), strict=True)]
    name = "bert.encoder.layer.1.output.dense.weight"
    assert (plain[0].tensors[name] - found[0].tensors[name]).abs().max() > 0.01
