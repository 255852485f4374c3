"""transformers' interface in the three families: embeddings, resizing, activation checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.test_phatgoose import SHAPES as ROUTED
from models.test_phatgoose import experts_of as adapters_of
from models.test_wemoe import shuffled
from tiny import adapter, bert, gpt2, image_processor, llama, make_tokenizer, t5, vit
from tiny_fused import IDS, MASK, PIXELS, base_expert, clip
from tiny_fused import experts_of as fine_tunes_of
from transformers import BertConfig, BertForTokenClassification, BertModel, Trainer, TrainingArguments

from hf_fusion import Expert, FoEModel, PhatgooseRouter, WEMoEModel

TEXT = {"input_ids": IDS, "attention_mask": MASK}
SEQ2SEQ = {**TEXT, "decoder_input_ids": IDS[:, :4]}
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SIZES)).eval()


def reader() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def classifier(seed: int = 0) -> Any:
    return bert(["x", "y"], seed)


# head -> base, what adapters adapt, inputs
HEADS: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, torch.Tensor]]] = {
    "causal-lm": (llama, ROUTED["llama"][1][0][1], TEXT),
    "causal-lm tied": (gpt2, ("c_attn", "c_fc"), TEXT),
    "seq2seq-lm": (t5, ROUTED["t5"][1][0][1], SEQ2SEQ),
    "sequence-classification": (classifier, ("query", "value"), TEXT),
    "token-classification": (tagger, ("query", "dense"), TEXT),
    "image-classification": (lambda: vit(["x", "y"]), ("q_proj", "fc1"), {"pixel_values": PIXELS}),
    "features": (reader, ("query", "value"), TEXT),
}
WORDS = [head for head in HEADS if head != "image-classification"]


def router(head: str, **options: Any) -> Any:
    build, targets, _ = HEADS[head]
    classes = 3 if head == "sequence-classification" else None
    return PhatgooseRouter.from_experts(adapters_of(build(), [(4, targets), (3, targets)], classes), **options)


def wemoe(head: str, **options: Any) -> Any:
    base = HEADS[head][0]()
    return shuffled(WEMoEModel.from_experts(fine_tunes_of(base), base_expert(base), **options))


def foe(head: str) -> Any:
    """Adapters of one model."""
    build, targets, _ = HEADS[head]
    base, labels = build(), ["x", "y"] if head.endswith("classification") else []
    processor = image_processor(16) if head.startswith("image") else make_tokenizer()
    experts = [Expert(f"me/{k}", base, adapter(base, 4, len(labels), k, targets), processor, labels) for k in range(2)]
    return FoEModel.from_experts(experts, mode="output" if labels else "selection")


FOE_HEADS = ("causal-lm", "causal-lm tied", "seq2seq-lm", "sequence-classification", "image-classification")
FAMILIES = {f"{build.__name__} {head}": (build, head) for build in (router, wemoe) for head in HEADS}
FAMILIES |= {f"foe {head}": (foe, head) for head in FOE_HEADS}


def dense_of(model: Any) -> Any:
    return model.backbones[0].model if isinstance(model, FoEModel) else model.backbone


def first(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def reloaded(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize(("build", "head"), FAMILIES.values(), ids=FAMILIES)
def test_embeddings_are_the_inner_models(build, head, tmp_path):
    model, inputs = build(head), HEADS[head][2]
    dense = dense_of(model)
    assert model.get_input_embeddings() is dense.get_input_embeddings()
    assert model.get_output_embeddings() is dense.get_output_embeddings()
    assert (model.get_output_embeddings() is None) == ("-lm" not in head)
    with torch.no_grad():
        before = first(model(**inputs))
    if head == "image-classification":
        with pytest.raises(ValueError, match=rf"{type(model).__name__}.* pixel_values"):
            model.resize_token_embeddings(500)
        return
    old = model.get_input_embeddings().num_embeddings
    torch.manual_seed(0)
    resized = model.resize_token_embeddings(old + 9)
    assert resized is model.get_input_embeddings() and resized.num_embeddings == old + 9
    assert model.resize_token_embeddings() is resized
    head_of = model.get_output_embeddings()
    if head_of is not None:
        assert head_of.weight.shape[0] == old + 9
        assert (head_of.weight is resized.weight) == (head in ("causal-lm tied", "seq2seq-lm"))
        model.tie_weights()
        assert (model.get_output_embeddings().weight is resized.weight) == (head in ("causal-lm tied", "seq2seq-lm"))
    with torch.no_grad():
        after = first(model(**inputs))
        # products with more columns may be summed in another order: some units of float32 in logits of size 1
        assert torch.allclose(after[..., : before.shape[-1]], before, rtol=1e-5, atol=1e-5)
        new = {**inputs, "input_ids": inputs["input_ids"].clone()}
        new["input_ids"][0, 1] = old + 8
        wanted = first(model(**new))
        assert not torch.equal(wanted, after)
        again = reloaded(model, tmp_path / "resized")
        assert torch.equal(first(again(**new)), wanted)
    stored = again.config.backbones[0]["config"] if isinstance(model, FoEModel) else again.config.backbone
    assert stored["vocab_size"] == old + 9 and again.get_input_embeddings().num_embeddings == old + 9
    again.set_input_embeddings(again.get_input_embeddings())
    smaller = again.resize_token_embeddings(old - 3, pad_to_multiple_of=8)
    assert smaller.num_embeddings % 8 == 0
    with torch.no_grad():
        kept = {**inputs, "input_ids": inputs["input_ids"].clamp(max=old - 4)}
        assert torch.allclose(
            first(again(**kept))[..., : old - 4], first(model(**kept))[..., : old - 4], rtol=1e-5, atol=1e-5
        )


def test_several_models_have_several_embeddings(tokenizer, tmp_path):
    experts = [
        Expert("me/llama", llama(), processor=tokenizer),
        Expert("me/gpt2", gpt2(vocabulary=300), processor=tokenizer),
    ]
    model = FoEModel.from_experts(experts, mode="selection")
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with pytest.raises(
            NotImplementedError,
            match=rf"FoEForGeneration.{name} needs a single model, .* model.backbones\[k\].model.{name}",
        ):
            getattr(model, name)()
    inputs, old = dict(model.processor(text=["the quick fox", "a dog"])), len(tokenizer)
    before = model.generate(**inputs, choice=[0, 1], max_new_tokens=4)
    model.resize_token_embeddings(old + 5, mean_resizing=False)
    assert [each.model.get_input_embeddings().num_embeddings for each in model.backbones] == [old + 5] * 2
    assert model.config.vocabularies == [old + 5] == model.processor.vocabularies
    for each in (model, reloaded(model, tmp_path)):
        options = {"max_new_tokens": 4, "suppress_tokens": list(range(old, old + 5))}
        assert torch.equal(each.generate(**inputs, choice=[0, 1], **options), before)
        assert each.generate(**inputs, choice=[0, 1], max_new_tokens=1, suppress_tokens=list(range(old)))[0, -1] >= old
    assert [plan["config"]["vocab_size"] for plan in model.config.backbones] == [old + 5] * 2


def test_two_towers_name_theirs():
    base = clip()
    fused = WEMoEModel.from_experts(fine_tunes_of(base), base_expert(base))
    for model in (fused, PhatgooseRouter.from_experts(adapters_of(base, [(4, ("q_proj",)), (3, ("fc1",))]))):
        with pytest.raises(
            NotImplementedError, match=r"get_input_embeddings: CLIPModel .* model.backbone.text_model.get"
        ):
            model.get_input_embeddings()


def test_refusals_to_resize_give_a_reason(tokenizer):
    two = [
        Expert("me/one", llama(), processor=tokenizer),
        Expert("me/two", llama(1, vocabulary=330), processor=make_tokenizer(330, lower=True)),
    ]
    with pytest.raises(ValueError, match="FoEForGeneration: its experts have different tokenizers; resize each"):
        FoEModel.from_experts(two, mode="selection").resize_token_embeddings(400)
    by_reference = router("causal-lm")
    by_reference.config.base, by_reference.config.base_by_reference = {"id": "me/base", "revision": "a" * 40}, True
    with pytest.raises(ValueError, match=r"fetches its base from me/base, .*model.config.base_by_reference = False"):
        by_reference.resize_token_embeddings(400)
    base = llama()
    routed = PhatgooseRouter.from_experts(adapters_of(base, [(4, ("q_proj", "lm_head")), (4, ("lm_head",))]))
    with pytest.raises(ValueError, match="PhatgooseForGeneration: its experts adapt the output of tokens"):
        routed.resize_token_embeddings(400)
    upscaled = WEMoEModel.from_experts(fine_tunes_of(base), base_expert(base), modules=r"lm_head$")
    with pytest.raises(ValueError, match="WEMoEForGeneration: the output embeddings are up-scaled"):
        upscaled.resize_token_embeddings(400)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # T5's attention
            module.dropout = 0.0
    return model


def gradients(model: Any, *losses: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(loss() for loss in losses).backward()  # type: ignore[union-attr]  # all forwards come first
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same sums, added up in another order: some hundred units of float32 of what is added."""
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * largest), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("build", "head"), [row for row in FAMILIES.values() if row[0] is not foe])
def test_checkpoints_change_no_gradient(build, head, reentrant):
    """Two forwards of other rows before one backward, the second with coefficients that were given."""
    model, inputs = without_dropout(build(head)), HEADS[head][2]
    model.train()
    cache = {} if "-lm" not in head else {"use_cache": False}
    other = {name: value.flip(0)[:2] for name, value in inputs.items()}

    def plain() -> torch.Tensor:
        return first(model(**inputs, **cache)).float().square().sum()

    def given() -> torch.Tensor:
        with model.using([0.25, 0.75] if build is router else [0.2, 0.3, 0.4]):
            return first(model(**other, **cache)).float().square().sum()

    wanted = gradients(model, plain, given)
    assert any("router" in name or "gates" in name for name in wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    same(gradients(model, plain, given), wanted)
    model.record_routing = 64 if build is router else True
    gradients(model, plain)
    trace = model.routing_trace()
    if build is wemoe:
        assert len(trace.layers) == len(model.units)


@pytest.mark.parametrize("build", [router, wemoe])
def test_the_trainer_checkpoints(build, tmp_path):
    model, head = build("sequence-classification"), "sequence-classification"
    rows = [{"input_ids": IDS[k], "attention_mask": MASK[k], "labels": torch.tensor(k % 2)} for k in range(3)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2}
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=rows).train()
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert any(("router" if build is wemoe else "gates") in name for name in moved), head


def test_foe_explains_why_it_cannot_checkpoint(tmp_path):
    model = foe("sequence-classification")
    with pytest.raises(ValueError, match="FoEModel trains its fuser alone; .* leave gradient checkpointing out"):
        model.gradient_checkpointing_enable()
    rows = [{"input_ids": IDS[0], "attention_mask": MASK[0], "labels": torch.tensor(0)}]
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="leave gradient checkpointing out"):
        Trainer(model, arguments, train_dataset=rows).train()


@pytest.mark.parametrize(("build", "head"), FAMILIES.values(), ids=FAMILIES)
def test_inputs_can_require_gradients(build, head):
    model, inputs = build(head), HEADS[head][2]
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert first(model(**inputs)).requires_grad
    model.disable_input_require_grads()
    assert not first(model(**inputs)).requires_grad
