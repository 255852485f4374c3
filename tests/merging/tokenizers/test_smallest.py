"""Vocabularies of different sizes truncated to the smallest, as by mergekit without a tokenizer setting."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_fusion import FusionError
from hf_fusion.merging.merge import merge
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import SMALLEST, Recipe, RecipeExpert

WORDS = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(3, 40))]
ROWS = {"base": 40, "chat": 42, "padded": 48}


def tokenizer(added=(), eos="</s>"):
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([*WORDS[:3], *added])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token=eos)


@pytest.fixture
def folders(tmp_path):
    added = {"base": (), "chat": ("<|im_start|>", "<|im_end|>"), "padded": ("<extra>",)}
    for seed, (name, rows) in enumerate(ROWS.items()):
        model = llama(seed, vocabulary=rows)
        if name == "chat":
            model.generation_config.eos_token_id = [2, 41]
        model.save_pretrained(tmp_path / name)
        own = tokenizer(added[name], "<|im_end|>" if name == "chat" else "</s>")
        own.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ROWS}


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def mergekits(tmp_path, folders, method="linear", base=None, **more):
    """A recipe in mergekit's words, without a tokenizer."""
    models_ = [{"model": folder, "parameters": {"weight": 1.0}} for folder in folders]
    recipe = {"merge_method": method, "models": models_, "dtype": "float32", **more}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | ({"base_model": base} if base else {})))
    return load_recipe(tmp_path / "recipe.yaml")


def test_rows_are_cut_by_id_and_lost_tokens_are_named(folders, tmp_path, caplog):
    recipe = mergekits(tmp_path, folders.values())
    with caplog.at_level(logging.WARNING):
        report = merge(recipe, tmp_path / "out")
    assert (
        "chat has 42 rows of tokens, the smallest vocabulary 40: cut to that, it loses '<|im_start|>', '<|im_end|>'"
        in (caplog.text)
    )
    assert "padded has 48 rows of tokens, the smallest vocabulary 40: cut to that, it loses '<extra>'" in caplog.text
    out, own = weights(tmp_path / "out"), [weights(folder) for folder in folders.values()]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(out[name], sum(each[name][:40] for each in own) / 3, rtol=1e-6, atol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 40
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer().get_vocab()
    assert report.recipe.tokenizer == SMALLEST and load_recipe(tmp_path / "out") == report.recipe


def test_the_first_models_tokenizer_and_configs_lose_them_too(folders, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        merge(mergekits(tmp_path, [folders["chat"], folders["base"]]), tmp_path / "out")
    cut = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert cut.get_vocab() == tokenizer().get_vocab() and len(cut) == 40
    assert "<|im_end|>" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert max(cut("word3 <|im_end|> word39")["input_ids"]) < 40
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == [2]
    assert "eos_token_id names '<|im_end|>'" in caplog.text


def test_task_vectors_are_cut_to_the_base(folders, tmp_path):
    merge(mergekits(tmp_path, [folders["chat"]], "task_arithmetic", folders["base"]), tmp_path / "out")
    chat, out = weights(folders["chat"]), weights(tmp_path / "out")
    torch.testing.assert_close(out["lm_head.weight"], chat["lm_head.weight"][:40], rtol=1e-5, atol=1e-6)


def test_models_of_equal_size_are_unchanged(folders, tmp_path):
    recipe = mergekits(tmp_path, [folders["base"], folders["base"]])
    report = merge(recipe, tmp_path / "out")
    assert report.recipe.tokenizer is None
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


def test_rows_are_cut_without_tokenizers(tmp_path, caplog):
    for seed, (name, rows) in enumerate(ROWS.items()):
        llama(seed, vocabulary=rows).save_pretrained(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        merge(mergekits(tmp_path, [str(tmp_path / name) for name in ROWS]), tmp_path / "out")
    assert weights(tmp_path / "out")["lm_head.weight"].shape[0] == 40
    assert "it loses no token of its tokenizer" in caplog.text


def test_native_recipes_request_it_by_name(folders, tmp_path):
    experts = tuple(map(RecipeExpert, folders.values()))
    with pytest.raises(FusionError, match="do not match"):
        merge(Recipe("linear", experts), tmp_path / "out")
    merge(Recipe("linear", experts, tokenizer=SMALLEST), tmp_path / "out")
    assert weights(tmp_path / "out")["lm_head.weight"].shape[0] == 40


def test_pieces_and_merges_are_cut_or_refused(tmp_path):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    for seed, (name, rows) in enumerate({"large": 280, "small": 265}.items()):
        llama(seed, vocabulary=max(rows, made.get_vocab_size()) if name == "large" else rows).save_pretrained(
            tmp_path / name
        )
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(tmp_path / "large")
    folders = [str(tmp_path / "large"), str(tmp_path / "small")]
    merge(mergekits(tmp_path, folders), tmp_path / "out")
    cut = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(cut) == 265
    ids = cut("the quick brown fox")["input_ids"]
    assert max(ids) < 265 and cut.decode(ids) == "the quick brown fox"
    made.add_special_tokens(["<end>"])
    number = made.token_to_id("<end>")
    made.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", number)])
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(tmp_path / "large")
    llama(vocabulary=number + 1).save_pretrained(tmp_path / "large")
    with pytest.raises(FusionError, match="cannot do without '<end>', which the smallest vocabulary, of 265, lacks"):
        merge(mergekits(tmp_path, folders), tmp_path / "refused")
