"""Token ids in configurations of a merged model with another tokenizer."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from hf_fusion import FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.merging.tokenizers.token_ids import TokenIdMap
from hf_fusion.recipe import Recipe, RecipeExpert

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "fox", "dog", "gate", "router", "lazy", "quick"]
SPECIAL = WORDS[:6]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(words, eos="</s>"):
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([word for word in words if word in SPECIAL or word == eos])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )


def llava():
    """A vision-language model whose image token is found by its number."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(
        **SIZES, vocab_size=len(WORDS), num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def move(tmp_path, model, words, eos="</s>", **files):
    """The model with another tokenizer's numbers for the same tokens."""
    model.save_pretrained(tmp_path / "model")
    tokenizer(WORDS).save_pretrained(tmp_path / "model")
    for name, content in files.items():
        (tmp_path / "model" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "other").mkdir()
    tokenizer(words, eos).save_pretrained(tmp_path / "other")
    recipe = Recipe("passthrough", (RecipeExpert(str(tmp_path / "model")),), tokenizer=str(tmp_path / "other"))
    return merge(recipe, tmp_path / "out").folder


def test_vision_language_model_with_another_tokenizer(tmp_path):
    model, words = llava(), ["lazy", *WORDS[::-1], "new", "words"]
    words = list(dict.fromkeys(words))
    processor = {"processor_class": "LlavaProcessor", "image_token": "<image>", "image_token_id": 4, "patch_size": 4}
    out = move(tmp_path, model, words, processor_config=processor)
    merged = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    assert merged.config.image_token_index == words.index("<image>")
    assert merged.config.text_config.vocab_size == len(words)
    assert merged.config.text_config.eos_token_id == words.index("</s>")
    assert json.loads((out / "processor_config.json").read_text()) == {
        **processor,
        "image_token_id": words.index("<image>"),
    }
    text = "<s> fox <image> <image> <image> <image> dog gate"
    pixels = torch.randn(1, 3, 8, 8)
    logits = []
    for folder, each in ((tmp_path / "model", model), (out, merged)):
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
        with torch.no_grad():
            logits.append(each(input_ids=ids, pixel_values=pixels).logits[0])
    new = [words.index(word) for word in WORDS]
    torch.testing.assert_close(logits[1][:, new], logits[0], rtol=1e-5, atol=1e-5)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES, vocab_size=len(WORDS), num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    )


def test_lists_pairs_and_sequences_of_a_generation_config(tmp_path):
    model, words = llama(), WORDS[::-1]
    new = {number: words.index(word) for number, word in enumerate(WORDS)}
    own = {
        "eos_token_id": [2, 7],
        "suppress_tokens": [6, 7, 11],
        "begin_suppress_tokens": [8],
        "bad_words_ids": [[6, 7], [8]],
        "sequence_bias": [[[6, 9], -1.5], [[10], 2.0]],
        "forced_eos_token_id": 2,
        "max_new_tokens": 4,
        "num_beams": 2,
    }
    out = move(tmp_path, model, words, generation_config={"bos_token_id": 1, "pad_token_id": 0, **own})
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == [new[2], new[7]] and (found.bos_token_id, found.pad_token_id) == (new[1], new[0])
    assert found.suppress_tokens == [new[6], new[7], new[11]] and found.begin_suppress_tokens == [new[8]]
    assert found.bad_words_ids == [[new[6], new[7]], [new[8]]]
    assert [[list(sequence), bias] for sequence, bias in found.sequence_bias] == [
        [[new[6], new[9]], -1.5],
        [[new[10]], 2.0],
    ]
    assert (found.forced_eos_token_id, found.max_new_tokens, found.num_beams) == (new[2], 4, 2)


def test_removed_special_token_falls_back_to_the_tokenizer(tmp_path, caplog):
    model, words = llama(), ["<end>" if word == "</s>" else word for word in WORDS if word not in ("dog", "<video>")]
    own = {"eos_token_id": 2, "suppress_tokens": [6, 7], "bad_words_ids": [[7, 6], [8]]}
    with caplog.at_level(logging.WARNING):
        out = move(tmp_path, model, words, eos="<end>", generation_config=own)
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == words.index("<end>") == AutoConfig.from_pretrained(out).eos_token_id
    assert found.suppress_tokens == [words.index("fox")] and found.bad_words_ids == [[words.index("gate")]]
    assert "eos_token_id names '</s>'" in caplog.text and "it is now '<end>'" in caplog.text
    assert "suppress_tokens names 'dog'" in caplog.text


def test_a_token_that_the_model_needs_and_the_tokenizer_lacks_is_refused(tmp_path):
    words = [word for word in WORDS if word != "<image>"]
    with pytest.raises(
        FusionError, match="config.json: image_token_index is '<image>', which the tokenizer .*other does"
    ):
        move(tmp_path, llava(), words)
    assert not (tmp_path / "out").exists()


OLD = {number: f"t{number}" for number in range(20)}
NUMBERS = TokenIdMap(OLD, frozenset({1, 2, 3, 4}), {token: 100 - n for n, token in OLD.items()}, {}, 20, "other")
TABLE = {
    # by its key
    "image_token_id": (7, 93),
    "video_token_index": (8, 92),
    "boi_token_index": (9, 91),
    "stop_token_ids": ([5, 6], [95, 94]),
    "visual_indicator_token_ids": ([5, 6], [95, 94]),
    "lang_to_id": ({"<|en|>": 5}, {"<|en|>": 95}),
    "forced_decoder_ids": ([[1, 5], [2, None]], [[1, 95], [2, None]]),
    "force_words_ids": ([[[5, 6], [7]], [[8]]], [[[95, 94], [93]], [[92]]]),
    "eos_token_id": ([2], [98]),
    # by its value too: the number of a special token
    "eos_index": (2, 98),
    "im_start_id": (4, 96),
    "image_patch_id": (12, 12),
    # neither
    "num_image_tokens": (4, 4),
    "mm_tokens_per_image": (2, 2),
    "head_in_index": (2, 2),
    "max_new_tokens": (3, 3),
    "ignore_index": (1, 1),
    "codec_bos_id": (2, 2),
    "codebook_pad_token_id": (2, 2),
    "mask_index": (-1, -1),
    "use_image_token": (True, True),
    "image_token": ("<image>", "<image>"),
    "label2id": ({"eos_index": 2}, {"eos_index": 2}),
    "vision_config": ({"pad_token_id": 1}, {"pad_token_id": 1}),
    "text_config": ({"vocab_size": 20, "pad_token_id": 1}, {"vocab_size": 20, "pad_token_id": 99}),
    "decoder": ({"vocab_size": 1024, "pad_token_id": 1}, {"vocab_size": 1024, "pad_token_id": 1}),
    "task_specific_params": ({"x": {"forced_bos_token_id": 1}}, {"x": {"forced_bos_token_id": 99}}),
    "pad_token_id": (None, None),
    "sequence_bias": ([[[5], 1.0]], [[[95], 1.0]]),
}


@pytest.mark.parametrize("key", TABLE)
def test_only_token_ids_are_updated(key):
    before, after = TABLE[key]
    assert NUMBERS.update_ids({key: before}, "config.json") == {key: after}
