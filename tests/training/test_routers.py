"""Training routers: trained parameters, the collapse guard, resuming; and AdaMerging's coefficients."""

from __future__ import annotations

import copy
import itertools
import math

import datasets
import pytest
import torch
from tiny import SUMS, TEXTS, bert, gpt2, images, make_tokenizer, t5
from tiny_fused import base_expert, bert_base, clip, experts_of
from tiny_routed import save_base, save_lora
from torch.utils.data import default_collate
from transformers import CLIPImageProcessorPil, CLIPProcessor

from hf_fusion import Expert, FusionError, WEMoEModel, adapt_routers, fit_routers
from hf_fusion.merging.in_memory import merge_states, merge_to_start_from
from hf_fusion.models.configuration_wemoe import ARITHMETIC
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.adaptation import diagnose, mean_of
from hf_fusion.training.batches import Examples, zero_shot_examples
from hf_fusion.training.routers import _distillation_loss, _entropy_loss
from hf_fusion.training.starts import METHODS, SCALINGS, Start, choose_start, predict_rows, start_from

REVIEWS = datasets.Dataset.from_dict(
    {"text": [f"{text} {i}" for i in range(6) for text in TEXTS], "label": [0, 1, 1, 0] * 6}
)
WORDS = datasets.Dataset.from_dict(
    {
        "prompt": ["the quick brown", "experts are", "a stitch in time", "said the router"] * 4,
        "target": [" fox jumps", " fused into one model", " saves nine", " to the gate"] * 4,
    }
)
FEW = {"steps": 12, "batch_size": 4, "learning_rate": 1e-2}


def classifiers(count: int = 2) -> list[Expert]:
    found = experts_of(bert_base(), count, ["no", "yes"], scale=0.5)
    for expert in found:
        expert.processor = make_tokenizer()
    return found


def merged(**options) -> WEMoEModel:
    return WEMoEModel.from_experts(classifiers(), base=base_expert(bert_base()), **options)


def suite(model) -> dict[str, datasets.Dataset]:
    return dict.fromkeys(model.experts, REVIEWS)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"router_layers": 0}, {"shared_router": True}], ids=str)
def test_only_routers_change_and_entropy_falls(options):
    model = merged(**options)
    before = state(model)
    facts = adapt_routers(model, suite(model), loss="entropy", diversity=0, guard=False, **FEW)
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert moved
    assert all("router." in name for name in moved)
    assert facts.steps == 12
    assert sum(h.entropy for h in facts.after.values()) < sum(h.entropy for h in facts.before.values())
    assert model.config.adaptation["rows"] == dict.fromkeys(model.experts, 18)  # a quarter of 24 is held out
    again = merged(**options)
    adapt_routers(again, suite(again), loss="entropy", diversity=0, guard=False, **FEW)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("diversity", [0, 0.5])
def test_the_loss_is_entropy_less_the_entropy_of_the_mean(diversity):
    """The gradient matches that of the written-out formula, for both tasks and rows of different lengths."""
    model, plain = merged(router_layers=1), merged(router_layers=1)
    tokens = make_tokenizer()(list(REVIEWS["text"][:4]), padding=True, return_tensors="pt")
    total = torch.zeros(())
    for task in plain.experts:
        p = plain(**tokens, task=task).logits.softmax(-1)
        total = total - (p * p.log()).sum(-1).mean() + diversity * (p.mean(0) * p.mean(0).log()).sum()
    total.backward()
    loss = _entropy_loss(model, diversity, dict.fromkeys(model.experts, tokens))
    loss.backward()
    torch.testing.assert_close(loss, total)
    room = SUMS * max(float(own.grad.abs().max()) for own in plain.parameters() if own.requires_grad)
    for (name, own), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if own.requires_grad:
            assert wanted.grad.norm() > 0, name
            torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-4, atol=room, msg=name)


@pytest.mark.long
def test_the_collapse_guard_stops_and_restores():
    model, plain = merged(), merged()
    start = state(model)
    options = {"loss": "entropy", "diversity": 0, "steps": 60, "learning_rate": 0.1}
    guarded = adapt_routers(model, suite(model), **options)
    without = adapt_routers(plain, suite(plain), guard=False, **options)
    assert mean_of(without.after, "divergence") > mean_of(without.before, "divergence") + 0.5  # the loss does collapse
    assert (without.stopped, without.steps) == (None, 60)
    assert mean_of(guarded.after, "kappa") >= mean_of(guarded.before, "kappa")
    assert guarded.steps in [0, *(check["step"] for check in guarded.history)]
    assert guarded.history[-1]["learning_rate"] < guarded.learning_rate
    assert model.config.adaptation["stopped"] == guarded.stopped
    if guarded.steps == 0:
        assert "raise diversity" in guarded.stopped
        assert all(tensor.equal(start[name]) for name, tensor in model.state_dict().items())


@pytest.mark.long
def test_experts_are_distilled():
    """The loss is 0 if the model predicts as its experts do, and training lowers it."""
    model = merged()
    name, tokens = model.experts[0], make_tokenizer()(list(REVIEWS["text"]), padding=True, return_tensors="pt")

    def batch(student, task) -> dict[str, torch.Tensor]:
        with torch.no_grad(), student.using(task):
            return {**tokens, "expert_logits": student(**tokens, task=task).logits}

    with torch.no_grad():
        with model.using(name):
            assert _distillation_loss(model, 0.0, {name: batch(model, name)}) == pytest.approx(0, abs=1e-6)
        p, q = batch(model, name)["expert_logits"].softmax(-1), model(**tokens, task=name).logits.softmax(-1)
        wanted = float((p * (p / q).log()).sum(-1).mean())
        assert _distillation_loss(model, 0.0, {name: batch(model, name)}) == pytest.approx(wanted, rel=1e-4)
    for student in (model, CoefficientMerge(classifiers(), bert_base())):
        both = {task: batch(student, task) for task in student.experts}
        with torch.no_grad():
            before = float(_distillation_loss(student, 0.0, both))
        adapt_routers(student, suite(student), steps=40, learning_rate=1e-2, batch_size=8, guard=False)
        with torch.no_grad():
            assert float(_distillation_loss(student, 0.0, both)) < before / 2


@pytest.mark.long
def test_a_learning_rate_that_is_too_high_is_halved():
    """The first steps ruin the model; each return to the best routers halves the rate, and nothing is lost."""
    model = merged()
    facts = adapt_routers(model, suite(model), steps=60, batch_size=4, learning_rate=3.0)
    rates = [check["learning_rate"] for check in facts.history]
    assert rates[0] == 3.0
    assert rates[-1] <= 1.5
    assert all(later in (rate, rate / 2) for rate, later in itertools.pairwise(rates))
    assert mean_of(facts.after, "divergence") <= mean_of(facts.before, "divergence")


def test_the_experts_themselves_are_the_teachers():
    """Without them the teacher of a WEMoE lacks what the expert changed outside the MLPs."""
    experts, base = classifiers(), base_expert(bert_base())
    model = WEMoEModel.from_experts(experts, base=base)
    tokens = make_tokenizer()(list(REVIEWS["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = {expert.name: expert.model(**tokens).logits for expert in experts}
    rows = Examples([{key: tokens[key][row] for key in tokens} for row in range(len(REVIEWS))], default_collate, None)
    reference = CoefficientMerge(experts, base)
    for name, logits in wanted.items():
        everything = range(len(REVIEWS))
        with reference.using(name), model.using(name):
            torch.testing.assert_close(predict_rows(reference, name, rows, everything, 5), logits)
            assert not predict_rows(model, name, rows, everything, 5).allclose(logits, atol=1e-3)
    facts = adapt_routers(model, suite(model), experts=experts, base=base, **FEW)
    assert mean_of(facts.after, "divergence") < mean_of(facts.before, "divergence")
    with pytest.raises(FusionError, match="those of the model") as error:
        adapt_routers(model, suite(model), experts=experts[::-1], base=base, **FEW)
    assert "in their order" in error.value.hint


@pytest.mark.long
def test_diversity_keeps_predictions_balanced():
    plain, spread = merged(), merged()
    options = {"loss": "entropy", "guard": False, "steps": 60, "learning_rate": 0.1}
    without = adapt_routers(plain, suite(plain), diversity=0, **options)
    kept = adapt_routers(spread, suite(spread), diversity=1, **options)
    for task in plain.experts:
        assert kept.after[task].confidence <= without.after[task].confidence + 1e-3


@pytest.mark.long
def test_an_interrupted_run_resumes(tmp_path):
    whole, killed = merged(), merged()
    facts = adapt_routers(whole, suite(whole), **FEW)
    folder = tmp_path / "run"
    adapt_routers(killed, suite(killed), output_dir=folder, **FEW)
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "trainer_state.json").unlink()  # killed while it wrote this one
    again = merged()
    assert adapt_routers(again, suite(again), output_dir=folder, **FEW).history == facts.history
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    other = merged()
    with pytest.raises(FusionError, match="holds checkpoints of another run"):
        adapt_routers(other, suite(other), output_dir=folder, **FEW | {"learning_rate": 0.5})


@pytest.mark.long
def test_labels_train_routers():
    model = merged()
    own = model.experts[0]
    rows = REVIEWS.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))

    def right() -> float:
        tokens = make_tokenizer()(list(REVIEWS["text"]), padding=True, return_tensors="pt")
        with torch.no_grad():
            log = model(**tokens, task=own).logits.log_softmax(-1)
        return float(log[range(len(log)), REVIEWS["label"]].mean())

    before = right()
    facts = fit_routers(model, {own: rows}, steps=30, learning_rate=3e-2)
    assert facts.loss == "labels"
    assert right() > before + 0.01


@pytest.mark.parametrize("base", [gpt2, t5], ids=["causal", "seq2seq"])
def test_language_models_learn_from_targets(base):
    experts = experts_of(base(), 2, scale=0.5)
    for expert in experts:
        expert.processor = make_tokenizer()
    model = WEMoEModel.from_experts(experts, base=base_expert(base()), router_layers=1)
    with pytest.raises(FusionError, match="has no classes that could be learned without labels") as error:
        adapt_routers(model, {model.experts[0]: WORDS})
    assert "fit_routers" in error.value.hint
    before = state(model)
    fit_routers(model, dict.fromkeys(model.experts, WORDS), **FEW)
    moved = [name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])]
    assert moved
    assert all("router." in name for name in moved)


def test_clip_adapts_by_texts_for_classes():
    base = clip()
    experts = experts_of(base, 2)
    model = WEMoEModel.from_experts(experts, base=base_expert(base), modules=r"vision_model.*fc[12]")
    processor = CLIPProcessor(CLIPImageProcessorPil(size=16, crop_size=16), make_tokenizer())
    pictures = datasets.Dataset.from_dict({"image": images(8)})
    rows = zero_shot_examples(processor, pictures, ["a fox", "a dog", "the gate"])
    facts = adapt_routers(model, dict.fromkeys(model.experts, rows), loss="entropy", diversity=0, guard=False, **FEW)
    assert all(facts.after[task].entropy < facts.before[task].entropy for task in model.experts)


def test_bf16_and_tasks_of_unequal_size():
    model = merged()
    rows = {model.experts[0]: REVIEWS, model.experts[1]: REVIEWS.select(range(5))}
    facts = adapt_routers(model, rows, loss="entropy", diversity=0, guard=False, bf16=True, **FEW)
    assert facts.rows == {model.experts[0]: 18, model.experts[1]: 4}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_fewer_rows_than_a_step_takes_are_repeated():
    model = merged()
    before = state(model)
    facts = adapt_routers(model, {model.experts[0]: REVIEWS.select(range(6))}, steps=3, guard=False)
    assert (facts.steps, facts.rows) == (3, {model.experts[0]: 5})  # one is held out
    assert any(not tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_diagnostics():
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    both = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    one = diagnose(sure, both)
    assert (one.confidence, one.agreement, one.kappa) == (pytest.approx(1), 0.5, 0)
    assert one.divergence == pytest.approx(25)
    two = diagnose(both, both)
    assert (two.entropy, two.divergence) == (pytest.approx(0, abs=1e-6), 0)
    assert (two.agreement, two.kappa) == (1, 1)
    assert diagnose(torch.zeros(3, 2), torch.zeros(3, 2)).entropy == pytest.approx(math.log(2))


def test_kappa_tells_collapse_from_skewed_classes():
    """By hand: seven rows in ten of one class; all of that class agree on 70 % and know nothing."""
    rows = lambda classes: 9 * torch.eye(3)[torch.tensor(classes)]  # noqa: E731
    expert = rows([0] * 7 + [1] * 2 + [2])
    collapsed = diagnose(rows([0] * 10), expert)
    assert (collapsed.agreement, collapsed.kappa) == (pytest.approx(0.7), pytest.approx(0, abs=1e-6))
    learned = diagnose(rows([0] * 7 + [1] * 3), expert)  # agreement .9, by chance .7·.7 + .3·.2 = .55
    assert learned.kappa == pytest.approx((0.9 - 0.55) / 0.45)
    permuted = diagnose(rows([1] * 7 + [0] * 3), expert)  # agreement 0, by chance .3·.7 + .7·.2 = .35
    assert permuted.kappa == pytest.approx(-0.35 / 0.65)
    assert diagnose(rows([0, 0, 1]), rows([0, 0, 0])).kappa == pytest.approx(2 / 3)  # an expert of one class


def test_training_starts_from_the_static_merge_that_agrees_most():
    """Compared with every candidate, each measured by itself."""
    experts, base = classifiers(), base_expert(bert_base())
    merge, tokens = CoefficientMerge(experts, base), make_tokenizer()(list(REVIEWS["text"]), padding=True)
    rows = Examples(
        [{key: torch.tensor(tokens[key][row]) for key in tokens} for row in range(len(REVIEWS))], default_collate, None
    )
    batch = default_collate(rows.rows)
    states = [expert.model.state_dict() for expert in experts]
    trunk = {
        name: tensor
        for name, tensor in base.model.state_dict().items()
        if not name.startswith(("classifier", "bert.pooler"))
    }
    merges = {(ARITHMETIC, scaling): merge_states(ARITHMETIC, trunk, states, scaling=scaling) for scaling in SCALINGS}
    for method in METHODS:
        state, scaling = merge_to_start_from(method, None, trunk, states)
        merges[method, scaling] = state
    with torch.no_grad():
        wanted = {expert.name: expert.model(**batch).logits for expert in experts}
        scores = {}
        for key, state in merges.items():
            found = {}
            for expert in experts:
                model = copy.deepcopy(expert.model)
                model.load_state_dict(state, strict=False)
                found[expert.name] = diagnose(model(**batch).logits, wanted[expert.name])
            scores[key] = mean_of(found, "kappa") - mean_of(found, "divergence")
    assert len(set(scores.values())) > 1  # the merge matters
    indices = dict.fromkeys(wanted, range(len(REVIEWS)))
    for task_vectors in ("exact", "sparse"):
        model = WEMoEModel.from_experts(experts, base=base, task_vectors=task_vectors)
        start = choose_start(model, merge, dict.fromkeys(wanted, rows), indices, wanted, 5)
        of = [score for key, score in scores.items() if task_vectors == "exact" or key[0] == ARITHMETIC]
        assert scores[start.method, start.scaling] == pytest.approx(max(of))


@pytest.mark.parametrize("storage", ["exact", "bfloat16"])
def test_a_model_that_starts_elsewhere_equals_one_built_so(storage):
    """By task arithmetic with another λ, by TIES, and back again."""
    experts, base = classifiers(), base_expert(bert_base())
    model = WEMoEModel.from_experts(experts, base=base, task_vectors=storage)
    for method, scaling in ((ARITHMETIC, 0.7), ("ties", 0.6), (ARITHMETIC, 0.5), ("iso_c", None)):
        reference, start = CoefficientMerge(experts, base), Start(method, scaling)
        if method != ARITHMETIC:
            tensors, used = merge_to_start_from(method, scaling, *reference.states())
            start = Start(method, used, tensors)
        start_from(model, reference, start)
        built = WEMoEModel.from_experts(experts, base=base, task_vectors=storage, merge=method, scaling=scaling)
        assert (model.config.merge, model.config.scaling) == (built.config.merge, built.config.scaling)
        for name, tensor in built.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_coefficients_start_from_any_merge_and_keep_the_experts():
    experts, base = classifiers(), base_expert(bert_base())
    merge, unchanged = (CoefficientMerge(experts, base) for _ in range(2))
    ties = merge_states("ties", *merge.states())
    start_from(merge, merge, Start("ties", 1.0, ties))
    for name, tensor in merge.tensors_now().items():
        torch.testing.assert_close(tensor, ties[name])
    for expert in experts:
        with merge.using(expert.name), unchanged.using(expert.name):
            for name, tensor in merge.tensors_now().items():
                torch.testing.assert_close(tensor, unchanged.tensors_now()[name])


def test_errors_name_the_option():
    model = merged()
    with pytest.raises(FusionError, match="there is no expert 'sst2'") as error:
        adapt_routers(model, {"sst2": REVIEWS})
    assert model.experts[0] in error.value.hint
    with pytest.raises(FusionError, match="no rows to learn from"):
        adapt_routers(model, {})
    for option in ({"steps": 0}, {"loss": "sure"}, {"learning_rate": -1.0}, {"diversity": -1}):
        with pytest.raises(FusionError, match=next(iter(option))):
            adapt_routers(model, suite(model), **option)
    with pytest.raises(FusionError, match="no text"):
        adapt_routers(model, {model.experts[0]: REVIEWS.rename_column("text", "sentence")})
    with pytest.raises(FusionError, match=r"holds \[7\]"):
        fit_routers(model, {model.experts[0]: datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 7, 0]})})
    smile = merged(task_vectors="low-rank", rank=4, routing="smile")
    with pytest.raises(FusionError, match="no routers to train"):
        adapt_routers(smile, suite(smile))
    scorers = experts_of(bert(["score"]), 2, ["score"])
    for expert in scorers:
        expert.processor = make_tokenizer()
    regression = WEMoEModel.from_experts(scorers, base=base_expert(bert(["score"])))
    with pytest.raises(FusionError, match="is a regression"):
        adapt_routers(regression, suite(regression))


# ---------------------------------------------------------------- AdaMerging


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_initial_coefficients_are_task_arithmetic(granularity):
    experts, base = classifiers(3), bert_base()
    model = CoefficientMerge(experts, base, granularity, scaling=0.4)
    start, fine = base.state_dict(), [expert.model.state_dict() for expert in experts]
    dense = model.dense(experts[1].name)
    for name, tensor in dense.state_dict().items():
        if "classifier" in name or "pooler" in name:
            assert tensor.equal(fine[1][name])
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, start[name] + 0.4 * sum(own[name] - start[name] for own in fine))
    tokens = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens, task=experts[1].name).logits, dense(**tokens).logits)
    assert len(model.table()) == (1 if granularity == "task" else len(model.tensors))


@pytest.mark.long
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_coefficients_are_trained_like_routers(granularity):
    experts, base = classifiers(), bert_base()
    model = CoefficientMerge(experts, base, granularity)
    before = state(model)
    facts = adapt_routers(model, suite(model), loss="entropy", diversity=0, guard=False, **FEW)
    moved = [name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])]
    assert moved == ["coefficients"]
    assert sum(h.entropy for h in facts.after.values()) < sum(h.entropy for h in facts.before.values())
    assert model.config.adaptation["steps"] == 12


def test_the_coefficients_gradient_is_the_product_with_the_task_vector():
    experts, base = classifiers(), bert_base()
    model = CoefficientMerge(experts, base, "layer")
    tokens = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    model(**tokens).logits.square().mean().backward()
    dense = model.dense()
    dense(**tokens).logits.square().mean().backward()
    start, fine = base.state_dict(), [expert.model.state_dict() for expert in experts]
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for row, name in zip(model.coefficients.grad, model.tensors, strict=True):
        wanted = torch.stack([(gradients[name] * (own[name] - start[name])).sum() for own in fine])
        room = SUMS * float(model.coefficients.grad.abs().max())
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=room)


def test_using_replaces_the_learned_coefficients_temporarily():
    experts, base = classifiers(3), bert_base()
    model = CoefficientMerge(experts, base, "layer", scaling=0.4)
    tokens = make_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        learned = model(**tokens).logits
        with model.merged(), model.using(experts[2].name):
            own = model(**tokens, task=experts[2].name).logits
            torch.testing.assert_close(own, experts[2].model(**tokens).logits)
            torch.testing.assert_close(model.dense(experts[2].name)(**tokens).logits, own)
        assert model(**tokens).logits.equal(learned)
    for wrong, message in (("nobody", "no expert 'nobody'"), ([1.0], "1 coefficients were given")):
        with pytest.raises(ValueError, match=message), model.using(wrong):
            pass


def test_adapters_and_misfits(tmp_path):
    base = save_base(tmp_path / "base")
    for seed in range(2):
        save_lora(tmp_path / str(seed), str(base), seed=seed, targets=("up_proj", "q_proj"), gates=False)
    model = CoefficientMerge([tmp_path / "0", tmp_path / "1"], granularity="task")
    assert model.coefficients.shape == (2,)
    assert all("up_proj" in name or "q_proj" in name for name in model.tensors)
    with pytest.raises(FusionError, match="no granularity 'tensor'"):
        CoefficientMerge([tmp_path / "0"], granularity="tensor")
    stranger = Expert("me/gpt2", gpt2(), processor=make_tokenizer())
    with pytest.raises(FusionError, match="me/gpt2 is a GPT2LMHeadModel"):
        CoefficientMerge([*classifiers(1), stranger], bert_base())
    broken = copy.deepcopy(classifiers(1)[0])
    with torch.no_grad():
        broken.model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(FusionError, match="has NaN or Inf"):
        CoefficientMerge([broken], bert_base())
