"""WEMoE's language models: routed by the prompt; cached equals uncached, scoring equals generation."""

from __future__ import annotations

import copy

import pytest
import torch
from models.test_wemoe import close, fused
from tiny import llama
from tiny_fused import IDS, MASK

GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "answers": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    "static cache": {"cache_implementation": "static", "do_sample": False},
}
LANGUAGE = ("llama", "gpt2", "opt", "t5", "t5 gated", "bart")


def prompts(kind: str) -> dict[str, torch.Tensor]:
    """Decoders are padded on the left."""
    turned = (0,) if kind in ("t5", "t5 gated", "bart") else (1,)
    return {
        "input_ids": IDS.flip(1) if turned == (1,) else IDS,
        "attention_mask": MASK.flip(1) if turned == (1,) else MASK,
    }


def positions(kind: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What generate() passes to GPT-2, whose forward counts padding."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if kind == "gpt2" else {}


@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("how", GENERATION)
def test_cached_generation_equals_uncached(kind, how):
    if how == "static cache" and kind == "gpt2":
        pytest.skip("GPT-2 has no static cache in transformers")
    model = fused(kind)[0]
    options = {"min_new_tokens": 8, "max_new_tokens": 8, **GENERATION[how]}
    answers = []
    for use_cache in (True, False):
        if not use_cache:
            options.pop("cache_implementation", None)
        torch.manual_seed(0)
        answers.append(model.generate(**prompts(kind), **options, use_cache=use_cache))
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_prompt_generation_equals_the_merged_dense_model(kind):
    model, base, _, units, _ = fused(kind)
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    together = model.generate(**prompts(kind), **options)
    for row in range(3):
        given = {name: tensor[row : row + 1] for name, tensor in prompts(kind).items()}
        extra = {"decoder_input_ids": together[row : row + 1, :1]} if model.config.is_encoder_decoder else {}
        dense = model.merge_for({**given, **extra, **positions(kind, given["attention_mask"])})
        assert type(dense) is type(base)
        assert torch.equal(dense.generate(**given, **options)[0], together[row])
    # and what each would without the others
    real = prompts(kind)["attention_mask"][2].bool()
    alone = model.generate(
        input_ids=prompts(kind)["input_ids"][2:, real], max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert torch.equal(alone[0, -6:], together[2, -6:])


@pytest.mark.parametrize("storage", ["bfloat16", "sparse", "low-rank", "low-rank-bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_storages_are_decoded_as_they_are_read(kind, storage):
    model = fused(kind, task_vectors=storage, **({"rank": 5} if storage.startswith("low-rank") else {}))[0]
    worst = 2**-9 if storage == "low-rank-bfloat16" else 1e-5  # one prompt is decoded with weights merged in fp32
    with torch.no_grad():
        for rows in (1, 3):  # low rank: one prompt is merged, several are not
            whole = model(input_ids=IDS[:rows], prompt_mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * rows)).logits
            cache = model(input_ids=IDS[:rows, :3], use_cache=True).past_key_values
            got = model(input_ids=IDS[:rows, 3:], past_key_values=cache).logits
            assert close(got, whole[:, 3:]) <= worst


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scoring_a_prompt_and_its_answer_equals_generating_it(kind):
    model = fused(kind)[0]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_scores": True}
    made = model.generate(**prompts(kind), **options, return_dict_in_generate=True)
    sequences, mask = made.sequences, torch.nn.functional.pad(prompts(kind)["attention_mask"], (0, 5), value=1)
    scores = torch.stack(made.scores, 1)  # (B, 5, V); generate() forbids the end before min_new_tokens
    labels = sequences.clone()
    labels[:, :6] = -100
    prompt = torch.zeros_like(mask)
    prompt[:, :6] = 1
    with torch.no_grad():
        whole = {"input_ids": sequences, "attention_mask": mask, **positions(kind, mask)}
        by_mask = model(**whole, prompt_mask=prompt).logits[:, 5:-1]
        by_labels = model(**whole, labels=labels).logits[:, 5:-1]
        read_whole = model(**whole).logits[:, 5:-1]
    allowed = scores.isfinite()
    assert close(by_mask[allowed], scores[allowed]) <= 1e-5
    assert torch.equal(by_labels, by_mask)
    assert close(read_whole[allowed], scores[allowed]) > 1e-4  # a router that reads the answer too decides otherwise


def test_teacher_forcing_equals_generating_in_sequence_to_sequence_models():
    model = fused("t5 gated")[0]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_scores": True}
    made = model.generate(input_ids=IDS, attention_mask=MASK, **options, return_dict_in_generate=True)
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=made.sequences[:, :-1]).logits
    scores = torch.stack(made.scores, 1)
    allowed = scores.isfinite()
    assert close(got[allowed], scores[allowed]) <= 1e-5


def test_cache_keeps_the_coefficients_of_its_prompt():
    model = fused("llama")[0]
    with torch.no_grad():
        whole = model(input_ids=IDS[:2], prompt_mask=torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)).logits
        output = model(input_ids=IDS[:2, :3], use_cache=True)
        other = model(input_ids=IDS[1:, :3], use_cache=True)  # another sequence in between changes nothing
        cache = copy.deepcopy(output.past_key_values)
        for position in range(3, 6):
            output = model(input_ids=IDS[:2, position : position + 1], past_key_values=cache)
            assert close(output.logits[:, 0], whole[:, position]) <= 1e-5
        assert other.past_key_values is not cache
        strange = llama()(input_ids=IDS[:2], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the cache was not filled by this model"):
            model(input_ids=IDS[:2, :1], past_key_values=strange)


def test_decoding_merges_once_for_each_prompt(monkeypatch):
    from hf_fusion.models.linears_wemoe import UpscaledLinear

    model, _, _, units, _ = fused("llama")
    merged = []
    monkeypatch.setattr(
        UpscaledLinear, "merge", lambda self, w, merge=UpscaledLinear.merge: merged.append(len(w)) or merge(self, w)
    )
    model.generate(**prompts("llama"), num_beams=4, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert merged == [3] * sum(map(len, units.values()))  # 3 prompts, not 12 beams; and not again for each token


def test_prompts_in_chunks_are_refused():
    model = fused("llama")[0]
    with pytest.raises(ValueError, match="read in chunks cannot be routed"):
        model.generate(input_ids=IDS[:1], max_new_tokens=2, prefill_chunk_size=2)
