"""PhatgooseRouter compared with PEFT, for each kind of base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.phatgoose_reference import reference
from models.test_phatgoose import IDS, MASK, SHAPES, experts_of
from models.test_phatgoose_published import heads_of_different_labels
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SUMS, bert, gpt2, llama, t5, vit
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, RobertaConfig, RobertaForSequenceClassification

from hf_fusion import Expert, PhatgooseRouter
from hf_fusion.hub.lora import read_adapter
from hf_fusion.types import Gates

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TEXT_AND_PIXELS = {"input_ids": IDS[:, :5], "attention_mask": MASK.flip(1)[:, :5], **PIXELS}  # 4 patches and a class


def clip_config() -> CLIPConfig:
    text = {"vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 2, **SIZES}
    return CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **SIZES}, projection_dim=16)


def random(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def clip() -> CLIPModel:
    return random(lambda: CLIPModel(clip_config()))


def clip_vision() -> CLIPVisionModel:
    return random(lambda: CLIPVisionModel(clip_config().vision_config))


def roberta() -> RobertaForSequenceClassification:
    config = RobertaConfig(vocab_size=300, pad_token_id=1, num_labels=2, **SIZES)
    return random(lambda: RobertaForSequenceClassification(config))


def answer(output: Any) -> torch.Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(output[name] for name in names if name in output)


# what PEFT is told -> base, its LoraConfig, inputs, dtype the adapter is saved in
ADAPTERS: dict[str, tuple[Callable[[], Any], dict, dict, torch.dtype]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}, TEXT, torch.float32),
    "t5": (
        t5,
        {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"},
        {**TEXT, "decoder_input_ids": IDS[:, :4]},
        torch.float32,
    ),
    "bert": (
        lambda: bert(["x", "y"]),
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
        TEXT,
        torch.float32,
    ),
    "a head of two linears": (
        roberta,
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        TEXT,
        torch.float32,
    ),
    "vit": (
        lambda: vit(["x", "y"]),
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        PIXELS,
        torch.float32,
    ),
    "clip": (
        clip,
        {"target_modules": ["q_proj", "v_proj", "fc1", "visual_projection"]},
        TEXT_AND_PIXELS,
        torch.float32,
    ),
    "clip vision": (clip_vision, {"target_modules": ["q_proj", "v_proj", "fc1"]}, PIXELS, torch.float32),
    # PEFT saves the linear under this LoRA as well
    "lm_head": (llama, {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}, TEXT, torch.float32),
    "saved": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        TEXT,
        torch.float32,
    ),
    "half, rsLoRA": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 5},
        TEXT,
        torch.bfloat16,
    ),
}


def peft_expert(folder: Path, build: Callable[[], Any], options: dict, dtype: torch.dtype, base: Any) -> Expert:
    """An adapter as PEFT saves it, read without PEFT."""
    torch.manual_seed(1)
    adapted = get_peft_model(build(), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    lora = read_adapter(folder, "me/peft")
    gates = Gates({path: torch.randn(a.shape[1]) for path, (a, _) in lora.lora.items()})
    return Expert("me/peft", base, lora, gates=gates, labels=["x", "y"] if "classifier" in str([*lora.saved]) else [])


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_expert_equals_peft_and_so_does_its_export(name, tmp_path):
    build, options, inputs, dtype = ADAPTERS[name]
    expert = peft_expert(tmp_path / "own", build, options, dtype, build())
    router = PhatgooseRouter.from_experts([expert], top_k=1)
    router.to_adapter(tmp_path / "exported")
    real = MASK.bool() if build is llama or build is gpt2 else slice(None)
    with torch.no_grad():
        got, plain = answer(router(**inputs))[real], answer(build()(**inputs))[real]
        for folder in ("own", "exported"):
            want = answer(PeftModel.from_pretrained(build(), tmp_path / folder).eval()(**inputs))[real]
            assert float((got - want).norm() / want.norm()) < 5e-6, folder
    assert float((got - plain).norm() / plain.norm()) > 0.1


def test_texts_and_images_are_routed_separately():
    """A batch of five tokens, some of them padding, beside five patches: CLIP against the plain loop."""
    base = clip()
    experts = experts_of(base, [(4, ("q_proj", "fc1")), (2, ("q_proj", "v_proj")), (3, ("fc1",))])
    router = PhatgooseRouter.from_experts(experts)
    router.record_routing = 4096
    with torch.no_grad():
        got, want = (model(**TEXT_AND_PIXELS) for model in (router, reference(base, experts, 2).model))
        for side in ("image_embeds", "text_embeds"):
            assert float((got[side] - want[side]).norm() / want[side].norm()) < 1e-5, side
        assert {path.partition(".")[0] for path in router.routing_trace().modules} == {"vision_model", "text_model"}
        alone = router.backbone.get_image_features(**PIXELS).pooler_output  # right after a padded text
    assert torch.allclose(nn.functional.normalize(alone), got.image_embeds, atol=SUMS)


def test_an_input_that_was_encoded_earlier_keeps_its_padding():
    router = PhatgooseRouter.from_experts(experts_of(t5(), SHAPES["t5"][1]))
    other = MASK.clone()
    other[0, 2:] = 0
    target = {"decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        want = router(**TEXT, **target).logits
        encoded = router.get_encoder()(**TEXT)
        router.get_encoder()(input_ids=IDS, attention_mask=other)
        got = router(encoder_outputs=encoded, attention_mask=MASK, **target).logits
    assert torch.equal(got, want)


def test_a_mask_may_be_given_by_position():
    router = PhatgooseRouter.from_experts(heads_of_different_labels()[1])
    with torch.no_grad():
        assert torch.equal(router(IDS, MASK).logits, router(**TEXT).logits)


@pytest.mark.parametrize("kind", ["llama mixed", "t5", "heads"])
def test_loaded_router_with_changed_experts_equals_a_new_one(kind, tmp_path):
    experts = heads_of_different_labels()[1] if kind == "heads" else experts_of(SHAPES[kind][0](), SHAPES[kind][1])
    inputs = TEXT if kind == "heads" else SHAPES[kind][2]
    PhatgooseRouter.from_experts(experts[:2]).save_pretrained(tmp_path / "two")
    family = type(PhatgooseRouter.from_experts(experts[:2]))
    router = family.from_pretrained(tmp_path / "two").eval()
    router.add_experts(experts[2:])
    router.save_pretrained(tmp_path / "all")
    again = family.from_pretrained(tmp_path / "all").eval()
    with torch.no_grad():
        want = PhatgooseRouter.from_experts(experts)(**inputs).logits
        assert torch.equal(router(**inputs).logits, want)
        assert torch.equal(again(**inputs).logits, want)
        again.remove_experts([experts[0].name])
        assert torch.equal(again(**inputs).logits, PhatgooseRouter.from_experts(experts[1:])(**inputs).logits)
    assert again.config.id2label == PhatgooseRouter.from_experts(experts[1:]).config.id2label
