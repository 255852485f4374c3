"""Generation by a FoE of language models equals the chosen expert's `generate`, with all options."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from tiny import adapter, gpt2, llama, make_tokenizer, merged, t5
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer, pipeline

from hf_fusion import Expert, FoEForGeneration, FoEModel

TEXTS = ["the quick brown fox", "a dog", "the lazy dog sleeps all day", "jumps"]
CHOICE = torch.tensor([1, 0, 1, 0])
OWN = [{"max_new_tokens": 5, "repetition_penalty": 1.3}, {"max_new_tokens": 9, "num_beams": 3, "pad_token_id": 7}]


def settled(model, **settings):
    model.generation_config = GenerationConfig(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | settings)
    return model


def causal(tokenizer, *settings) -> list[Expert]:
    models = [llama(), gpt2(vocabulary=len(tokenizer))]
    return [
        Expert(f"me/{k}", settled(model, **own), processor=tokenizer)
        for k, (model, own) in enumerate(zip(models, settings or ({}, {}), strict=True))
    ]


def of_one_base(tokenizer, *settings) -> list[Expert]:
    base = settled(llama(), max_new_tokens=6)
    return [
        Expert(f"me/{k}", base, adapter(base, 4, None, k, ["q_proj", "v_proj"]), tokenizer, generation=own)
        for k, own in enumerate(settings or (None, None))
    ]


def seq2seq(tokenizer, *settings) -> list[Expert]:
    tokens = {"decoder_start_token_id": 0}
    return [
        Expert(f"me/{k}", settled(t5(k), **tokens, **own), processor=tokenizer)
        for k, own in enumerate(settings or ({}, {}))
    ]


def alone(expert: Expert):
    """The expert as a model of its own."""
    if expert.adapter is None:
        return expert.model
    model = merged(expert.model, expert.adapter, [])
    model.generation_config = GenerationConfig(
        **{**expert.model.generation_config.to_dict(), **(expert.generation or {})}
    )
    return model


def prompts(model: FoEModel) -> dict[str, torch.Tensor]:
    tokens = model.processor(text=TEXTS)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def by_expert(experts, inputs, choice=CHOICE, **options):
    """What each expert generates for the rows that are its own."""
    for k, expert in enumerate(experts):
        rows = (choice == k).nonzero()[:, 0]
        yield rows, alone(expert).generate(**{name: value[rows] for name, value in inputs.items()}, **options)


def padded(experts, inputs, choice=CHOICE, each=1, **options) -> torch.Tensor:
    """The same as one tensor, padded by each expert's own token."""
    parts = list(by_expert(experts, inputs, choice, **options))
    width = max(part.shape[1] for _, part in parts)
    result = torch.zeros(len(choice) * each, width, dtype=torch.long)
    for (rows, part), expert in zip(parts, experts, strict=True):
        places = torch.cat([torch.arange(each) + row * each for row in rows.tolist()])
        result[places] = torch.nn.functional.pad(
            part, (0, width - part.shape[1]), value=alone(expert).generation_config.pad_token_id
        )
    return result


KINDS = {"causal": causal, "of one base": of_one_base, "seq2seq": seq2seq}
OPTIONS = {
    "greedy": {"max_new_tokens": 6, "do_sample": False},
    "no cache": {"max_new_tokens": 6, "do_sample": False, "use_cache": False},
    "beams": {"max_new_tokens": 6, "do_sample": False, "num_beams": 3},
    "some of the beams": {"max_new_tokens": 6, "do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    "constrained": {"max_new_tokens": 6, "repetition_penalty": 2.0, "bad_words_ids": [[5], [9]], "min_new_tokens": 4},
    "an object": {"generation_config": GenerationConfig(max_new_tokens=4, no_repeat_ngram_size=2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_row_equals_what_its_expert_generates(kind, options, tokenizer):
    experts = KINDS[kind](tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model)
    each = options.get("num_return_sequences", 1)
    wanted = padded(experts, inputs, each=each, **options)
    assert torch.equal(model.generate(**inputs, choice=CHOICE, **options), wanted)
    if kind != "of one base":  # an expert that is alone returns the very same tensor
        assert torch.equal(
            model.generate(**inputs, choice=[1] * 4, **options), experts[1].model.generate(**inputs, **options)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_of_one_expert_equals_the_plain_expert(kind, tokenizer):
    experts = KINDS[kind](tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs, options = prompts(model), {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5, "top_k": 20}
    one = alone(experts[1])
    torch.manual_seed(0)
    wanted = one.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, choice=torch.ones(4, dtype=torch.long), **options), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_are_put_together(kind, beams, tokenizer):
    experts = KINDS[kind](tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "num_return_sequences": min(beams, 2)}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    inputs = prompts(model)
    # an adapter beside its base rounds otherwise than one folded into it: some 1e-7 of logits of size 1 in each layer
    same = partial(torch.allclose, rtol=0, atol=1e-5) if kind == "of one base" else torch.equal
    found = model.generate(**inputs, choice=CHOICE, **options)
    assert found.past_key_values is None
    transitions = model.compute_transition_scores(
        found.sequences, found.scores, getattr(found, "beam_indices", None), normalize_logits=beams == 1
    )
    for rows, own in by_expert(experts, inputs, **options):
        assert type(found) is type(own)
        each = len(own.sequences) // len(rows)
        places = torch.cat([torch.arange(each) + row * each for row in rows.tolist()])
        assert torch.equal(found.sequences[places, : own.sequences.shape[1]], own.sequences)
        for name in ("scores", "logits"):
            steps = getattr(own, name)
            wide = torch.cat([torch.arange(beams) + row * beams for row in rows.tolist()])
            for step, wanted in enumerate(steps):
                assert same(getattr(found, name)[step][wide, : wanted.shape[1]], wanted)
                assert (getattr(found, name)[step][wide, wanted.shape[1] :] == float("-inf")).all()
        if beams > 1:
            assert same(found.sequences_scores[places], own.sequences_scores)
        lone = experts[0].model.compute_transition_scores(
            own.sequences, own.scores, getattr(own, "beam_indices", None), normalize_logits=beams == 1
        )
        assert same(transitions[places, : lone.shape[1]], lone)


def test_shorter_generations_are_padded(tokenizer):
    """The one stops after two tokens, the other goes on: what is missing is padding of probability 1."""
    experts = causal(tokenizer, {"max_new_tokens": 2}, {"max_new_tokens": 4, "pad_token_id": 7})
    model = FoEModel.from_experts(experts, mode="selection")
    found = model.generate(**prompts(model), choice=CHOICE, return_dict_in_generate=True, output_scores=True)
    length = prompts(model)["input_ids"].shape[1]
    assert (found.sequences[CHOICE == 0, length + 2 :] == 0).all()
    assert len(found.scores) == 4
    assert (found.scores[3][CHOICE == 0, 0] == 0).all()
    assert (found.scores[3][CHOICE == 0, 1:] == float("-inf")).all()
    wanted = experts[1].model.generate(
        **{name: value[CHOICE == 1] for name, value in prompts(model).items()},
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(found.scores[3][CHOICE == 1], wanted.scores[3])


def test_one_expert_keeps_its_cache_and_states(tokenizer):
    experts = causal(tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_hidden_states": True}
    inputs = prompts(model)
    found = model.generate(**inputs, choice=[0] * 4, **options)
    wanted = experts[0].model.generate(**inputs, **options)
    assert torch.equal(found.hidden_states[2][1], wanted.hidden_states[2][1])
    longer = {
        "input_ids": found.sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1),
    }
    further = model.generate(**longer, choice=[0] * 4, past_key_values=found.past_key_values, max_new_tokens=2)
    assert torch.equal(further, experts[0].model.generate(**longer, max_new_tokens=2))


def test_rows_of_every_argument(tokenizer):
    experts = seq2seq(tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model) | {"decoder_input_ids": torch.tensor([[0, 5], [0, 6], [0, 7], [0, 8]])}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, choice=CHOICE, **options), padded(experts, inputs, **options))
    encoded = experts[1].model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    given = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
    wanted = experts[1].model.generate(**given, **options)
    assert torch.equal(model.generate(**given, choice=[1] * 4, **options), wanted)
    some = model.generate(**inputs, encoder_outputs=encoded, choice=CHOICE, **options)[CHOICE == 1]
    here = {name: value[CHOICE == 1] for name, value in inputs.items()}
    own = experts[1].model.generate(**here, **options)
    assert torch.equal(some[:, : own.shape[1]], own)


def test_embeddings_guidance_and_constraints_by_row(tokenizer):
    experts = of_one_base(tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs, options = prompts(model), {"max_new_tokens": 4, "do_sample": False}
    embedded = {"inputs_embeds": experts[0].model.get_input_embeddings()(inputs["input_ids"])}
    embedded["attention_mask"] = inputs["attention_mask"]
    assert torch.equal(model.select(embedded), model.select(inputs))
    assert torch.equal(model.generate(**embedded, choice=CHOICE, **options), padded(experts, embedded, **options))
    guided = inputs | {
        "negative_prompt_ids": inputs["input_ids"].flip(0),
        "negative_prompt_attention_mask": inputs["attention_mask"].flip(0),
    }
    guide = options | {"guidance_scale": 1.5}
    assert torch.equal(model.generate(**guided, choice=CHOICE, **guide), padded(experts, guided, **guide))
    found = model.generate(**inputs, choice=CHOICE, prefix_allowed_tokens_fn=lambda row, ids: [10 + row], **options)
    length = inputs["input_ids"].shape[1]
    assert found[:, length:].tolist() == [[10 + row] * 4 for row in range(4)]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + 3
    moved = inputs | {"position_ids": positions}
    assert torch.equal(model.generate(**moved, choice=CHOICE, **options), padded(experts, moved, **options))


class Always(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token, self.rows = token, []

    def __call__(self, input_ids, scores):
        self.rows.append(len(input_ids))
        return scores.scatter(1, torch.full((len(scores), 1), self.token), 1e9)


def test_objects_serve_one_expert_at_a_time(tokenizer, capsys):
    experts = causal(tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs, always = prompts(model), Always(42)
    length = inputs["input_ids"].shape[1]
    # third by position, as other models take it
    found = model.generate(
        inputs["input_ids"], GenerationConfig(max_new_tokens=2), LogitsProcessorList([always]), choice=CHOICE
    )
    assert found[:, length:].tolist() == [[42, 42]] * 4 and always.rows == [2] * 4
    stopped = model.generate(
        **inputs,
        choice=CHOICE,
        max_new_tokens=8,
        stopping_criteria=[lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)],
    )
    assert stopped.shape[1] == length + 1
    assert model.generate(**inputs, choice=CHOICE, max_new_tokens=10**4, max_time=1e-9).shape[1] == length + 1
    one = {name: value[:1] for name, value in inputs.items()}
    model.generate(**one, max_new_tokens=3, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out
    wanted = experts[0].model.generate(**one, assistant_model=experts[1].model, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(**one, choice=[0], assistant_model=experts[1].model, max_new_tokens=6, do_sample=False), wanted
    )
    text = tokenizer.decode(experts[0].model.generate(**one, max_new_tokens=8)[0, length:])
    for given in (tokenizer, model.processor):
        written = model.generate(**one, choice=[0], max_new_tokens=8, stop_strings=[text[3:6]], tokenizer=given)
        assert written.shape[1] < length + 8


REFUSED = {
    "past_key_values": ({"past_key_values": "a cache"}, "past_key_values cannot be divided between me/0 and me/1"),
    "streamer": ({"streamer": object()}, "streamer cannot be divided between me/0 and me/1: pass choice="),
    "pixels": ({"pixel_values": torch.ones(7, 3)}, "pixel_values cannot be divided"),
    "states": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: me/0 and me/1 have"),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation='paged' serves one model"),
    "choice": ({"choice": [0, 1]}, "choice must name one of 2 experts for each of 4 prompts"),
    "nobody": ({"choice": [0, 1, 2, 0]}, "choice must name one of 2 experts"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_choices_are_refused(options, message, tokenizer):
    model = FoEModel.from_experts(causal(tokenizer), mode="selection")
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(model), **{"choice": CHOICE, "max_new_tokens": 2} | options)


def test_experts_that_differ_in_the_shape_of_their_answers_are_named(tokenizer):
    model = FoEModel.from_experts(causal(tokenizer, {}, {"num_beams": 2, "num_return_sequences": 2}), mode="selection")
    inputs = prompts(model)
    with pytest.raises(ValueError, match="me/0 and me/1 differ in num_return_sequences: pass num_return_sequences="):
        model.generate(**inputs, choice=CHOICE, max_new_tokens=2)
    assert len(model.generate(**inputs, choice=CHOICE, max_new_tokens=2, num_return_sequences=1)) == 4
    with pytest.raises(ValueError, match="me/0 and me/1 differ in num_beams: pass num_beams="):
        model.generate(**inputs, choice=CHOICE, num_return_sequences=1, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="FoEForGeneration has an expert for each prompt, .* call generate"):
        model.generate_batch([[5, 9]])
    with pytest.raises(ValueError, match="no expert can be selected: pass choice="):
        model.generate(max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_experts_generation_config_travels(kind, tokenizer, tmp_path):
    settings = [{**OWN[0], "eos_token_id": [2, 250]}, OWN[1]]
    experts = KINDS[kind](tokenizer, *settings)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model)
    wanted = padded(experts, inputs)
    assert torch.equal(model.generate(**inputs, choice=CHOICE), wanted)
    model.save_pretrained(tmp_path / "first")
    loaded = FoEForGeneration.from_pretrained(tmp_path / "first").eval()
    loaded.save_pretrained(tmp_path / "again")
    again = FoEForGeneration.from_pretrained(tmp_path / "again").eval()
    for each in (loaded, again):
        assert torch.equal(each.generate(**inputs, choice=CHOICE), wanted)
        assert each.config.experts[0]["generation"]["eos_token_id"] == [2, 250]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["experts"][1]["generation"]["num_beams"] == 3


def test_stops_at_either_of_two_tokens(tokenizer, tmp_path):
    """What an expert writes third becomes its second token of the end."""
    (expert, other) = causal(tokenizer, {"max_new_tokens": 8, "min_new_tokens": 3}, {})
    inputs = {"input_ids": torch.tensor([[5, 9, 33]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    third = int(expert.model.generate(**inputs)[0, 5])
    expert.model.generation_config.eos_token_id = [2, third]
    expert.model.generation_config.min_new_tokens = None
    wanted = expert.model.generate(**inputs)
    assert wanted.shape[1] <= 6
    model = FoEModel.from_experts([expert, other], mode="selection")
    assert torch.equal(model.generate(**inputs, choice=[0]), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(FoEForGeneration.from_pretrained(tmp_path).generate(**inputs, choice=[0]), wanted)


def test_changed_generation_settings_apply_to_every_expert(tokenizer, tmp_path):
    experts = causal(tokenizer, *OWN)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model)
    length = inputs["input_ids"].shape[1]
    mine = copy.deepcopy(model.generation_config)
    assert mine.max_new_tokens == 5  # the first expert's word
    assert torch.equal(model.generate(**inputs, choice=CHOICE, generation_config=mine), padded(experts, inputs))
    model.generation_config.max_new_tokens = 3
    assert model.generate(**inputs, choice=CHOICE).shape[1] == length + 3
    mine.max_new_tokens = 2
    assert model.generate(**inputs, generation_config=mine, choice=CHOICE).shape[1] == length + 2
    plain = GenerationConfig(max_new_tokens=5)  # said, though it is what the first expert says by itself
    assert model.generate(**inputs, generation_config=plain, choice=[1] * 4).shape[1] == length + 5
    model.save_pretrained(tmp_path)
    loaded = FoEForGeneration.from_pretrained(tmp_path)
    assert loaded.generate(**inputs, choice=CHOICE).shape[1] == length + 3
    model.generation_config.max_new_tokens = None
    assert torch.equal(model.generate(**inputs, choice=CHOICE), padded(experts, inputs, max_new_tokens=None))
    model.generation_config = GenerationConfig(max_new_tokens=7)
    assert torch.equal(model.generate(**inputs, choice=CHOICE), padded(experts, inputs, max_new_tokens=7))
    model.config.experts[1]["generation"]["num_beams"] = 1
    options = {"max_new_tokens": 7, "num_beams": 1}
    assert torch.equal(model.generate(**inputs, choice=[1] * 4), experts[1].model.generate(**inputs, **options))


def test_an_experts_generation_config_can_be_edited(tokenizer, tmp_path):
    model = FoEModel.from_experts(causal(tokenizer, {"max_new_tokens": 3}, {"max_new_tokens": 5}), mode="selection")
    inputs = prompts(model)
    model.config.experts[0]["generation"]["max_new_tokens"] = 4
    model.generation_config.min_new_tokens = 3
    model.save_pretrained(tmp_path)
    for each in (model, FoEForGeneration.from_pretrained(tmp_path)):
        assert each.generation_config.max_new_tokens == 4
        for expert, length in enumerate((4, 5)):
            tokens = each.generate(**inputs, choice=[expert] * 4, eos_token_id=None)
            assert tokens.shape[1] == inputs["input_ids"].shape[1] + length
        assert each.generation_config.min_new_tokens == 3


def test_pipeline_uses_the_generation_settings_of_experts(tokenizer):
    experts = causal(tokenizer, {"max_new_tokens": 3, "do_sample": False}, {"max_new_tokens": 5, "do_sample": False})
    model = FoEModel.from_experts(experts, mode="selection")
    for k, expert in enumerate(experts):
        with torch.no_grad():
            model.fuser.output.bias.copy_(torch.eye(2)[k] * 1e3)
        fused, own = (pipeline("text-generation", each, tokenizer=tokenizer) for each in (model, expert.model))
        assert fused(TEXTS[0]) == own(TEXTS[0])


def test_experts_with_different_tokenizers(tokenizer, tmp_path):
    """The second model has 40 more rows than its tokenizer, and writes them too."""
    lower = make_tokenizer(330, lower=True)
    experts = [
        Expert("me/one", settled(llama(), max_new_tokens=4), processor=tokenizer),
        Expert(
            "me/two", settled(llama(1, vocabulary=len(lower) + 40), max_new_tokens=6, pad_token_id=3), processor=lower
        ),
        Expert("me/three", settled(gpt2(2, vocabulary=len(tokenizer)), max_new_tokens=5), processor=tokenizer),
    ]
    model = FoEModel.from_experts(experts, mode="selection")
    assert model.config.vocabularies == [300, len(lower) + 40]
    inputs = dict(model.processor(text=TEXTS))
    choice = torch.tensor([1, 0, 2, 1])
    second = {name: inputs[f"{name}_1"][choice == 1] for name in ("input_ids", "attention_mask")}
    wanted = experts[1].model.generate(**second, return_dict_in_generate=True, output_scores=True)
    model.save_pretrained(tmp_path)
    for each in (model, FoEForGeneration.from_pretrained(tmp_path)):
        found = each.generate(**inputs, choice=choice, return_dict_in_generate=True, output_scores=True)
        own = wanted.sequences + 300
        assert torch.equal(found.sequences[choice == 1, : own.shape[1]], own)
        assert (found.sequences[choice == 1, own.shape[1] :] == 303).all()
        assert torch.equal(found.scores[2][choice == 1, 300:], wanted.scores[2])
        assert (found.scores[2][choice == 1, :300] == float("-inf")).all()
        one = each.generate(**inputs, choice=[1] * 4, return_dict_in_generate=True, output_scores=True)
        fused = each.compute_transition_scores(one.sequences, one.scores, normalize_logits=True)
        tokens = {name: inputs[f"{name}_1"] for name in ("input_ids", "attention_mask")}
        alone_1 = experts[1].model.generate(**tokens, return_dict_in_generate=True, output_scores=True)
        lone = experts[1].model.compute_transition_scores(alone_1.sequences, alone_1.scores, normalize_logits=True)
        # a softmax over 300 more columns of probability 0 adds up in another order
        assert torch.allclose(fused, lone, rtol=0, atol=1e-5)
    for name in ("eos_token_id", "bad_words_ids"):
        with pytest.raises(
            ValueError, match=rf"{name} consists of token ids, .* model.config.experts\[k\]\['generation'\]"
        ):
            model.generate(**inputs, choice=choice, **{name: [[5]]})
    with pytest.raises(ValueError, match="tokenizer is for one tokenizer, but me/one and me/two have different ones"):
        model.generate(**inputs, choice=choice, stop_strings="a", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="position_ids is for the first tokenizer: pass position_ids_1 too"):
        model.generate(**inputs, choice=choice, position_ids=inputs["attention_mask"].cumsum(1))
    heard = []

    class Ear:
        put = staticmethod(lambda ids: heard.extend(ids.flatten().tolist()))
        end = staticmethod(lambda: heard.append(None))

    one = {name: value[:1] for name, value in inputs.items()}
    streamed = model.generate(**one, choice=[1], streamer=Ear())
    assert [*streamed[0].tolist(), None] == heard


def test_logits_of_experts_whose_vocabularies_are_not_equally_padded(tokenizer):
    experts = [
        Expert("me/one", llama(), processor=tokenizer),
        Expert("me/two", gpt2(vocabulary=304), processor=tokenizer),
    ]
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model)
    with torch.no_grad():
        out = model(**inputs, choice=CHOICE, labels=inputs["input_ids"])
        assert torch.equal(
            out.logits[CHOICE == 0, :, :300], llama()(**{k: v[CHOICE == 0] for k, v in inputs.items()}).logits
        )
    assert out.logits.shape[-1] == 304 == model.config.get_text_config().vocab_size
    assert (out.logits[CHOICE == 0, :, 300:] == float("-inf")).all() and out.loss.isfinite()


def test_a_foe_that_was_saved_without_them_generates_by_its_models_configs(tokenizer, tmp_path):
    experts = causal(tokenizer)
    model = FoEModel.from_experts(experts, mode="selection")
    inputs = prompts(model)
    wanted = padded(experts, inputs, max_new_tokens=12)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for row in config["experts"]:
        assert row.pop("generation")["eos_token_id"] == 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(old))
    loaded = FoEForGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**inputs, choice=CHOICE, max_new_tokens=12), wanted)
