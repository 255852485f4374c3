"""PHATGOOSE and WEMoE generate like dense models: all options, and the stored generation config."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models.test_phatgoose import LLAMA, T5, experts_of
from models.test_wemoe import fused as wemoe_of
from tiny import gpt2, llama, merged, t5
from tiny_fused import IDS, MASK, base_expert
from tiny_fused import experts_of as fine_tunes_of
from tiny_routed import save_base, save_lora
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_fusion import PhatgooseForGeneration, PhatgooseRouter, WEMoEForGeneration, WEMoEModel, load_experts

INPUTS = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
BASES = {"llama": (llama, LLAMA), "gpt2": (gpt2, ("c_attn", "c_fc")), "t5": (t5, T5)}
LENGTH = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
OPTIONS = {
    "greedy": LENGTH,
    "beams": {**LENGTH, "num_beams": 3, "num_return_sequences": 2},
    "samples": {**LENGTH, "do_sample": True, "num_return_sequences": 3, "top_k": 5},
    "penalties": {**LENGTH, "repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
    "an object": {"generation_config": GenerationConfig(**LENGTH, num_beams=2)},
}


def prompts(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK} if kind == "t5" else INPUTS


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", BASES)
def test_router_of_one_expert_generates_like_the_expert(kind, options):
    build, targets = BASES[kind]
    (expert,) = experts_of(build(), [(4, targets)])
    dense, router = merged(expert.model, expert.adapter, []), PhatgooseRouter.from_experts([expert], top_k=1)
    inputs, answers = prompts(kind), []
    for model in (router, dense):
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **options))
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [OPTIONS["beams"], OPTIONS["penalties"]], ids=["beams", "penalties"])
def test_row_equals_what_the_merged_model_generates(kind, options):
    model = wemoe_of(kind)[0]
    inputs = prompts(kind)
    positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)} if kind == "gpt2" else {}
    start = {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)} if kind == "t5" else {}
    together = model.generate(**inputs, **options).chunk(3)
    for row in range(3):
        given = {name: value[row : row + 1] for name, value in (inputs | positions | start).items()}
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(model.merge_for(given).generate(**one, **options), together[row])


def families(kind: str = "llama"):
    build, targets = BASES[kind]
    yield PhatgooseRouter.from_experts(experts_of(build(), [(4, targets), (3, targets)]))
    yield wemoe_of(kind)[0]


def test_candidates_of_an_assistant_change_nothing():
    inputs = {"input_ids": IDS[:1].repeat(1, 3)}
    for model in families():
        wanted = model.generate(**inputs, **LENGTH)
        for how in ({"assistant_model": llama(1)}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(model.generate(**inputs, **LENGTH, **how), wanted)


def test_outputs_and_arguments_by_position():
    for model in families():
        listed = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(6, 4, 2)])
        config = GenerationConfig(max_new_tokens=4, return_dict_in_generate=True, output_scores=True, num_beams=2)
        found = model.generate(INPUTS["input_ids"], config, listed, attention_mask=INPUTS["attention_mask"])
        assert len(found.scores) == 4 and found.beam_indices.shape == (3, 4)
        assert found.sequences.shape == (3, 10)
        embeddings = model.backbone.get_input_embeddings()(INPUTS["input_ids"])
        plain = model.generate(**INPUTS, **LENGTH)[:, 6:]
        given = {"inputs_embeds": embeddings, "attention_mask": INPUTS["attention_mask"]}
        assert torch.equal(model.generate(**given, **LENGTH), plain)


BASE = {"eos_token_id": [2, 250], "max_new_tokens": 7, "repetition_penalty": 1.2}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_generation_config_of_the_base_travels(kind, tmp_path):
    build, targets = BASES[kind]
    base = build()
    for name, value in BASE.items():
        setattr(base.generation_config, name, value)
    router = PhatgooseRouter.from_experts(experts_of(base, [(4, targets), (3, targets)]))
    fused = WEMoEModel.from_experts(fine_tunes_of(base), base_expert(base))
    inputs = prompts(kind)
    for model, family in ((router, PhatgooseForGeneration), (fused, WEMoEForGeneration)):
        wanted = model.generate(**inputs)
        folder = tmp_path / family.__name__
        model.save_pretrained(folder)
        family.from_pretrained(folder).save_pretrained(folder / "again")
        loaded = family.from_pretrained(folder / "again").eval()
        for each in (model, loaded):
            assert {name: getattr(each.generation_config, name) for name in BASE} == BASE
        assert torch.equal(loaded.generate(**inputs), wanted)
    assert {name: getattr(fused.merge_for(task="me/expert-0").generation_config, name) for name in BASE} == BASE


def test_settings_shared_by_experts_override_the_base(tmp_path):
    base = llama()
    base.generation_config.repetition_penalty = 1.2
    experts = fine_tunes_of(base)
    for k, expert in enumerate(experts):
        expert.model.generation_config = copy.deepcopy(base.generation_config)
        expert.model.generation_config.eos_token_id = [2, 250]
        expert.model.generation_config.temperature = (
            0.7  # as published: without do_sample, which a new one must not have
        )
        expert.model.generation_config.max_new_tokens = 5 + k
    model = WEMoEModel.from_experts(experts, base_expert(base))
    said = model.generation_config
    assert (said.eos_token_id, said.repetition_penalty, said.max_new_tokens) == ([2, 250], 1.2, None)
    assert base.generation_config.eos_token_id == 2
    model.save_pretrained(tmp_path / "saved")
    assert WEMoEForGeneration.from_pretrained(tmp_path / "saved").generation_config.temperature == 0.7


def test_generation_config_of_an_adapter_is_read(tmp_path):
    base = save_base(tmp_path / "base")
    folders = [save_lora(tmp_path / name, str(base), seed) for seed, name in enumerate(("one", "two"))]
    for folder, length in zip(folders, (5, 6), strict=True):
        values = {"eos_token_id": [2, 250], "max_new_tokens": length, "validate": "no method of ours"}
        (folder / "generation_config.json").write_text(json.dumps(values))
    experts = load_experts(folders)
    assert experts[1].generation["max_new_tokens"] == 6
    router = PhatgooseRouter.from_experts(experts)
    assert (router.generation_config.eos_token_id, router.generation_config.max_new_tokens) == ([2, 250], None)
    router.save_pretrained(tmp_path / "router")
    assert PhatgooseForGeneration.from_pretrained(tmp_path / "router").generation_config.eos_token_id == [2, 250]
    (exported,) = load_experts([router.to_adapter(tmp_path / "exported")])
    assert exported.generation["eos_token_id"] == [2, 250]


def test_a_base_by_reference_keeps_it_too(tmp_path):
    base = save_base(tmp_path / "cache" / "models--me--base" / "snapshots" / ("a" * 40))
    router = PhatgooseRouter.from_experts(load_experts([save_lora(tmp_path / "one", str(base))]), top_k=1)
    router.generation_config.max_new_tokens = 3
    router.config.base, router.config.base_by_reference = {"id": "me/base", "revision": "a" * 40}, True
    router.save_pretrained(tmp_path / "router")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    loaded = PhatgooseForGeneration.from_pretrained(tmp_path / "router", **where).eval()
    assert loaded.generation_config.max_new_tokens == 3
    assert torch.equal(loaded.generate(**INPUTS), router.generate(**INPUTS))


def test_pages_of_several_sequences():
    router, model = families()
    given = [[5, 9, 33, 7, 100], [8, 4], [45, 3, 17]]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    pages = ContinuousBatchingConfig(num_blocks=8, block_size=16, max_batch_tokens=64)  # not all memory there is
    settings = GenerationConfig(**options)
    found = router.generate_batch(given, settings, continuous_batching_config=pages, warmup=False)
    for row, output in zip(given, found.values(), strict=True):
        alone = router.generate(torch.tensor([row]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(row) :].tolist()
    with pytest.raises(ValueError, match="WEMoEForGeneration merges weights for every sequence, .* call generate"):
        model.generate_batch(given)
    with pytest.raises(ValueError, match="without cache_implementation='paged'"):
        model.generate(IDS, GenerationConfig(cache_implementation="paged"))


def test_a_negative_prompt_is_routed_as_a_prompt():
    """Classifier-free guidance by hand: both prompts read without a cache, each routed by itself."""
    _, model = families()
    prompt, negative = IDS[:1], IDS[1:2, :4]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "guidance_scale": 1.7}
    found = model.generate(prompt, negative_prompt_ids=negative, **options)[0, 6:]
    wanted: list[int] = []
    for _ in range(4):
        both = []
        for start in (prompt, negative):
            tokens = torch.cat([start, torch.tensor([wanted], dtype=torch.long)], 1)
            reads = (torch.arange(tokens.shape[1]) < start.shape[1])[None]
            with torch.no_grad():
                both.append(model(input_ids=tokens, prompt_mask=reads, use_cache=False).logits[0, -1].log_softmax(-1))
        scores = 1.7 * (both[0] - both[1]) + both[1]
        scores[2] = float("-inf")  # the end
        wanted.append(int(scores.argmax()))
    assert found.tolist() == wanted
    with pytest.raises(ValueError, match="negative_prompt_ids are longer than the prompts: pad these on the left"):
        model.generate(negative, negative_prompt_ids=prompt, **options)
    with pytest.raises(ValueError, match="guidance_scale: without a cache"):
        model.generate(prompt, negative_prompt_ids=negative, use_cache=False, **options)


def test_trainer_pads_generated_tokens(tmp_path):
    rows = [{"input_ids": IDS[k], "attention_mask": MASK[k], "labels": IDS[k]} for k in range(3)]
    settings = {"predict_with_generate": True, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    for model in families("t5"):
        assert model.config.pad_token_id == 0
        trainer = Seq2SeqTrainer(model, Seq2SeqTrainingArguments(str(tmp_path), **settings), eval_dataset=rows)
        predictions = torch.as_tensor(trainer.predict(rows, max_length=7).predictions)
        own = model.generate(IDS, attention_mask=MASK, max_length=7)
        assert torch.equal(predictions[:, : own.shape[1]], own)
        assert (predictions[:, own.shape[1] :] == 0).all()
