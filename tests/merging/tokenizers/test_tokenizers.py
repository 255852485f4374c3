"""Models with different tokenizers: the union of their tokens, aligned embeddings, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import CORPUS, llama, t5
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_fusion import FusionError
from hf_fusion.merging.engine.tensors import MemoryReader
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.merging.tokenizers.aligned_embeddings import AVERAGE, ZERO, AlignedReader, RowSources
from hf_fusion.merging.tokenizers.chat_templates import TEMPLATES
from hf_fusion.recipe import Recipe, RecipeExpert, Slice, SliceSource

OTHER_CORPUS = ["quantum chemistry of large molecules", "molecules and chemistry, quantum by quantum", *CORPUS]
SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer(corpus, size, added=()):
    """A byte-level BPE trained on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": list(added)})
    return fast


@pytest.fixture
def folders(tmp_path):
    """A base; a fine-tune with two tokens more, in a padded embedding; and one with words of its own."""
    made = {
        "base": tokenizer(CORPUS, 290),
        "chat": tokenizer(CORPUS, 290, ["<|im_start|>", "<|im_end|>"]),
        "science": tokenizer(OTHER_CORPUS, 310, ["<|mol|>"]),
    }
    for seed, (name, own) in enumerate(made.items()):
        rows = len(own) + (6 if name == "chat" else 0)
        model = llama(seed, vocabulary=rows)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.generation_config.eos_token_id = [2]
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in made}


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def recipe_of(folders, tokenizer, base="base", method="task_arithmetic", **parameters):
    experts = tuple(RecipeExpert(folder) for name, folder in folders.items() if name != base)
    return Recipe(method, experts, folders.get(base), parameters, tokenizer=tokenizer)


def rows_of(folders, names, tensor, merged):
    """What every model should have for each of the merged tokens, the plain way: {model: {token: row}}."""
    own = {name: AutoTokenizer.from_pretrained(folders[name]).get_vocab() for name in names}
    stored = {name: weights(folders[name])[tensor].float() for name in names}
    found = {name: {} for name in names}
    for token in merged:
        have = [name for name in names if token in own[name]]
        base = "base" if "base" in have and len(have) > 1 else have[0] if len(have) == 1 else None
        for name in names:
            if token in own[name]:
                found[name][token] = stored[name][own[name][token]]
            elif base:
                found[name][token] = stored[base][own[base][token]]
            elif have:
                found[name][token] = torch.stack([stored[n][own[n][token]] for n in have]).mean(0)
            else:
                found[name][token] = torch.zeros(stored[name].shape[1])
    return found


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_union_of_all_tokens(folders, tmp_path, tensor):
    merge(recipe_of(folders, "union", scaling=0.4), tmp_path / "out")
    own = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    vocab = merged.get_vocab()
    assert set(vocab) == {token for each in own.values() for token in each.get_vocab()}
    assert {token: vocab[token] for token in own["base"].get_vocab()} == own["base"].get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    rows = rows_of(folders, list(folders), tensor, vocab)
    out = weights(tmp_path / "out")[tensor]
    assert out.shape[0] == len(vocab)
    for token, number in vocab.items():
        base, *others = (rows[name][token] for name in folders)
        wanted = base + 0.4 * sum(other - base for other in others)
        torch.testing.assert_close(out[number], wanted, rtol=1e-5, atol=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == len(vocab) == loaded.get_input_embeddings().num_embeddings
    assert loaded(torch.tensor([merged("<|im_start|>molecules<|mol|>")["input_ids"]])).logits.isfinite().all()


def test_a_union_cuts_texts_into_the_others_words_and_their_special_tokens(folders, tmp_path):
    merge(recipe_of(folders, "union"), tmp_path / "out")
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = AutoTokenizer.from_pretrained(folders["base"])
    text = "quantum chemistry of molecules"
    assert len(merged.tokenize(text)) < len(own.tokenize(text))
    assert merged.tokenize("dog<|im_end|>") == [*own.tokenize("dog"), "<|im_end|>"]
    for text in ("quantum chemistry of lazy dogs", "<s>née 7 äöü</s>"):
        assert merged.decode(merged(text, add_special_tokens=False)["input_ids"]) == text
    assert "<|mol|>" not in merged.decode(merged("<|mol|>")["input_ids"], skip_special_tokens=True)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert "vocab.json" not in files and "tokenizer.json" in files


def test_the_base_and_one_of_the_experts(folders, tmp_path):
    merge(recipe_of(folders, "base", scaling=1.0), tmp_path / "as base")
    assert (tmp_path / "as base" / "tokenizer.json").read_bytes() == Path(
        folders["base"], "tokenizer.json"
    ).read_bytes()
    own = AutoTokenizer.from_pretrained(folders["base"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "as base").config.vocab_size == len(own)
    merge(recipe_of(folders, folders["science"], scaling=0.0), tmp_path / "as science")
    science = AutoTokenizer.from_pretrained(tmp_path / "as science")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "as science")
    assert science.get_vocab() == AutoTokenizer.from_pretrained(folders["science"]).get_vocab()
    assert loaded.generation_config.eos_token_id == [science.get_vocab()["</s>"]]
    # λ = 0: the base's own rows, and those of the expert for what the base lacks
    base, out = weights(folders["base"])["lm_head.weight"], weights(tmp_path / "as science")["lm_head.weight"]
    theirs, known = weights(folders["science"])["lm_head.weight"], own.get_vocab()
    for token, number in science.get_vocab().items():
        torch.testing.assert_close(out[number], base[known[token]] if token in known else theirs[number])


def test_tokenizer_of_another_model(folders, tmp_path):
    (tmp_path / "alone").mkdir()
    AutoTokenizer.from_pretrained(folders["science"]).save_pretrained(tmp_path / "alone")
    recipe = recipe_of({name: folders[name] for name in ("base", "chat")}, str(tmp_path / "alone"))
    report = merge(recipe, tmp_path / "out")
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert vocab == AutoTokenizer.from_pretrained(folders["science"]).get_vocab()
    assert report.recipe.tokenizer == str(tmp_path / "alone")
    out = weights(tmp_path / "out")["lm_head.weight"]
    assert not out[vocab["<|mol|>"]].any()  # neither has it
    assert out[vocab["Ġ"]].any()


def test_special_tokens_get_the_numbers_of_the_tokenizer_that_is_taken(folders, tmp_path):
    """A model whose end of text has another number takes it along."""
    file = Path(folders["science"], "tokenizer.json")
    content = json.loads(file.read_text())
    swap = {"</s>": 0, "<pad>": 2}
    content["model"]["vocab"] |= swap
    for token in content["added_tokens"]:
        token["id"] = swap.get(token["content"], token["id"])
    content["added_tokens"].sort(key=lambda token: token["id"])
    file.write_text(json.dumps(content))
    report = merge(recipe_of(folders, folders["science"]), tmp_path / "out")
    config = json.loads((report.folder / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 2)
    assert json.loads((report.folder / "generation_config.json").read_text())["eos_token_id"] == [0]


def test_rows_of_tokens_by_rule_and_padding(folders, tmp_path):
    tokens = {
        "<|im_end|>": {"source": folders["chat"], "force": True},
        "<|new|>": {"source": {"kind": "model_token", "model": folders["chat"], "token": "<|im_start|>"}},
        "<|seven|>": {"source": {"kind": "model_token", "model": folders["science"], "token_id": 7}},
        "</s>": {"source": {"kind": "zero"}, "force": True},
    }
    recipe = recipe_of(folders, {"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}, scaling=0.5)
    report = merge(recipe, tmp_path / "out")
    assert load_recipe(tmp_path / "out") == report.recipe
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    out = weights(tmp_path / "out")["lm_head.weight"]
    size = len(vocab)
    assert out.shape[0] == -(-size // 64) * 64 > size
    chat, science = (weights(folders[name])["lm_head.weight"] for name in ("chat", "science"))
    own = AutoTokenizer.from_pretrained(folders["chat"]).get_vocab()
    same = {"<|im_end|>": chat[own["<|im_end|>"]], "<|new|>": chat[own["<|im_start|>"]], "<|seven|>": science[7]}
    for token, row in {**same, "</s>": torch.zeros(32)}.items():
        torch.testing.assert_close(out[vocab[token]], row, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[size:], out[:size].mean(0).expand(len(out) - size, -1), rtol=1e-4, atol=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(out)


def test_missing_tokens_without_a_base_are_averaged(folders, tmp_path):
    names = ["chat", "science", "base"]
    others = {name: folders[name] for name in names}
    merge(recipe_of(others, "union", base=None, method="linear"), tmp_path / "out")
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    own = {name: AutoTokenizer.from_pretrained(folder).get_vocab() for name, folder in others.items()}
    out = weights(tmp_path / "out")["model.embed_tokens.weight"]
    stored = {name: weights(folder)["model.embed_tokens.weight"] for name, folder in others.items()}
    two = 0
    for token, number in vocab.items():
        rows = [stored[name][own[name][token]] for name in names if token in own[name]]
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(out[number], mean, rtol=1e-5, atol=1e-6)  # then the mean of all three is that mean
        two += len(rows) == 2
    assert two > 3


def test_slices_of_models_with_unlike_tokenizers(folders, tmp_path):
    """What is before the layers is the first slice's, what is behind the last's: each with rows for all tokens."""
    slices = tuple(Slice((SliceSource(folders[name], (0, 1)),)) for name in ("chat", "science"))
    experts = (RecipeExpert(folders["chat"]), RecipeExpert(folders["science"]))
    merge(Recipe("passthrough", experts, slices=slices, tokenizer="union"), tmp_path / "out")
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    own = {name: AutoTokenizer.from_pretrained(folders[name]).get_vocab() for name in ("chat", "science")}
    out = weights(tmp_path / "out")
    tensors = {"model.embed_tokens.weight": ("chat", "science"), "lm_head.weight": ("science", "chat")}
    for tensor, (first, other) in tensors.items():
        stored = {name: weights(folders[name])[tensor] for name in own}
        for token, number in vocab.items():
            name = first if token in own[first] else other
            assert out[tensor][number].equal(stored[name][own[name][token]]), (tensor, token)


def test_adapter_with_added_tokens(folders, tmp_path):
    """PEFT saves embeddings that grew whole, beside the adapter; its tokenizer knows their tokens."""
    base, more = AutoModelForCausalLM.from_pretrained(folders["base"]), tokenizer(CORPUS, 290, ["<|tool|>"])
    base.resize_token_embeddings(len(more), mean_resizing=False)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    adapted.save_pretrained(tmp_path / "tool")
    more.save_pretrained(tmp_path / "tool")
    experts = (RecipeExpert(str(tmp_path / "tool")),)
    merge(Recipe("task_arithmetic", experts, folders["base"], {"scaling": 0.5}, tokenizer="union"), tmp_path / "out")
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    out = weights(tmp_path / "out")["lm_head.weight"]
    saved = adapted.get_base_model().lm_head.modules_to_save["default"].weight
    torch.testing.assert_close(out[vocab["<|tool|>"]], saved[more.get_vocab()["<|tool|>"]])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == len(vocab) == len(more)


def test_a_piecewise_tokenizer_and_words(tmp_path):
    """Unigram pieces lie in a list by number; WordPiece has prefixes. Both are united as texts need it."""
    for kind, corpora in {"unigram": (CORPUS, OTHER_CORPUS), "wordpiece": (CORPUS, OTHER_CORPUS)}.items():
        folders = {}
        for seed, corpus in enumerate(corpora):
            if kind == "unigram":
                made = Tokenizer(models.Unigram())
                made.pre_tokenizer = pre_tokenizers.Metaspace()
                trainer = trainers.UnigramTrainer(
                    vocab_size=60 + 20 * seed, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>"
                )
            else:
                made = Tokenizer(models.WordPiece(unk_token="<unk>"))
                made.pre_tokenizer = pre_tokenizers.Whitespace()
                trainer = trainers.WordPieceTrainer(vocab_size=80 + 30 * seed, special_tokens=["<unk>", *SPECIAL])
            made.train_from_iterator(corpus, trainer)
            own = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")
            own.add_tokens([f"[{name}]" for name in ("shared", f"own{seed}")])
            name = f"{kind}{seed}"
            llama(seed, vocabulary=len(own)).save_pretrained(tmp_path / name)
            own.save_pretrained(tmp_path / name)
            folders[name] = str(tmp_path / name)
        merge(recipe_of(folders, "union", base=f"{kind}0"), tmp_path / kind)
        merged = AutoTokenizer.from_pretrained(tmp_path / kind)
        first, second = (AutoTokenizer.from_pretrained(folder) for folder in folders.values())
        vocab = merged.get_vocab()
        assert set(vocab) == set(first.get_vocab()) | set(second.get_vocab())
        assert {token: vocab[token] for token in first.get_vocab()} == first.get_vocab()
        assert "[own1]" in merged.tokenize("quantum [own1] chemistry")
        assert "".join(merged.tokenize("quantum")).strip("▁") == "quantum"
        assert len(merged.tokenize("quantum chemistry")) < len(first.tokenize("quantum chemistry"))
        state = weights(tmp_path / kind)["lm_head.weight"]
        assert state.shape[0] == len(vocab)


def test_runs_of_rows_are_read_like_rows():
    torch.manual_seed(0)
    stored = [torch.randn(20, 3), torch.randn(30, 3)]
    models_ = np.array([0, 0, 0, 1, 1, AVERAGE, AVERAGE, ZERO, 0, 1])
    rows = np.array([4, 5, 7, 0, 1, 0, 0, 0, 19, 29])
    averaged = {5: [(0, 2), (1, 3)], 6: [(1, 9)]}
    aligned = AlignedReader([MemoryReader(tensor) for tensor in stored], RowSources.of(models_, rows, averaged), 13, 10)
    wanted = torch.stack([stored[max(m, 0)][r] for m, r in zip(models_, rows, strict=True)])
    wanted[5], wanted[6], wanted[7] = (stored[0][2] + stored[1][3]) / 2, stored[1][9], 0
    wanted = torch.cat([wanted, wanted.mean(0).expand(3, 3)]).view(-1)
    for start in range(39):
        for stop in range(start + 1, 40):
            out = torch.full((stop - start,), float("nan"))
            aligned.read(start, out)
            torch.testing.assert_close(out, wanted[start:stop])


def test_chat_templates(folders, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rendered = {
        "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "mistral": "<s> [INST] Be kind.\n\nHi [/INST]",
        "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\n",
        "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]",
    }
    assert rendered.keys() == TEMPLATES.keys()
    own = AutoTokenizer.from_pretrained(folders["chat"])
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}!"
    own.save_pretrained(folders["chat"])
    rendered |= {folders["chat"]: "Be kind.Hi!", "auto": "Be kind.Hi!", "{{ messages | length }}": "2"}
    for number, (template, wanted) in enumerate(rendered.items()):
        recipe = Recipe("passthrough", (RecipeExpert(folders["chat"]),), chat_template=template)
        merge(recipe, tmp_path / str(number))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
        text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == wanted, template
    with pytest.raises(FusionError, match="chat_template: 'chatlm' is neither a known template nor one of the models"):
        merge(Recipe("passthrough", (RecipeExpert(folders["chat"]),), chat_template="chatlm"), tmp_path / "out")


def test_tokenizers_that_cannot_be_merged(folders, tmp_path):
    def refused(recipe, message):
        with pytest.raises(FusionError, match=message):
            merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    for tokenizer_, message in {
        "missing": ({"source": "union", "tokens": {"<x>": {"source": "nobody/model"}}}, "not one of the merged models"),
        "key": ({"source": "union", "pad": 8}, "tokenizer.pad is not a supported key"),
        "rule": ({"tokens": {"<x>": {"from": "base"}}}, r"tokenizer\.tokens\.<x>\.from is not a supported key"),
        "absent": ({"tokens": {"<x>": {"source": folders["base"]}}}, "has no token '<x>'"),
        "number": ({"pad_to_multiple_of": "8"}, "pad_to_multiple_of is '8'"),
        "row": (
            {"tokens": {"<x>": {"source": {"kind": "model_token", "model": folders["base"], "token_id": 999}}}},
            "has no token 999",
        ),
    }.values():
        refused(recipe_of(folders, tokenizer_), message)
    plain = {name: folders[name] for name in ("base", "science")}
    refused(recipe_of(plain, None), r"against \[290, 32\]")  # never guessed: the table names the option
    t5().save_pretrained(tmp_path / "t5")
    refused(recipe_of({"t5": str(tmp_path / "t5")} | folders, "union", base="t5"), "t5 has no tokenizer.json")
    made = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folders["science"])
    refused(recipe_of(plain, "union"), r"\(byte-level BPE\) and .*science \(WordLevel\) cannot be united")
    file = Path(folders["science"], "tokenizer.json")
    prefixed = json.loads(Path(folders["base"], "tokenizer.json").read_text())
    prefixed["model"]["continuing_subword_prefix"] = "<x>"  # the library panics: its merges have no such prefix
    file.write_text(json.dumps(prefixed))
    refused(recipe_of(plain, "union"), "science: tokenizer.json is not valid")
    file.write_text("{}")
    refused(recipe_of(plain, "union"), "science: tokenizer.json is not valid")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "dare_ties"])
def test_padding_of_the_model_whose_tokenizer_is_taken_stays(method, tmp_path):
    """With tokenizers that are alike, as a merge by number: padding is merged like any other row."""
    for seed, name in enumerate(("base", "one", "two")):
        llama(seed, vocabulary=304).save_pretrained(tmp_path / name)
        tokenizer(CORPUS, 290).save_pretrained(tmp_path / name)
    assert len(tokenizer(CORPUS, 290)) < 300
    experts = tuple(RecipeExpert(str(tmp_path / name)) for name in ("one", "two"))
    base = str(tmp_path / "base") if MERGE_METHODS[method].base else None
    parameters = {"t": 0.4} if method == "slerp" else {}
    sources = (None, "base", str(tmp_path / "two"), {"source": "base", "pad_to_multiple_of": 16})
    for number, source in enumerate(sources):
        merge(Recipe(method, experts, base, parameters, tokenizer=source), tmp_path / f"out-{number}")
    by_number = weights(tmp_path / "out-0")
    for out in tmp_path.glob("out-*"):
        found = weights(out)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 304
        assert all(torch.equal(found[name], by_number[name]) for name in by_number)


def test_padding_that_others_have_tokens_for(folders, tmp_path):
    """The base's rows without a token, one of them between tokens; an expert's own row only where it has no token."""
    base = llama(0, vocabulary=304)
    base.save_pretrained(folders["base"])
    del folders["science"]
    merge(recipe_of(folders, "base", scaling=1.0), tmp_path / "out")
    start, expert, found = (
        weights(folder)["model.embed_tokens.weight"] for folder in (folders["base"], folders["chat"], tmp_path / "out")
    )
    tokens, theirs = (len(AutoTokenizer.from_pretrained(folders[name])) for name in ("base", "chat"))
    assert found.shape == start.shape and tokens + 2 == theirs and len(expert) == theirs + 6
    torch.testing.assert_close(found[:tokens], expert[:tokens])
    torch.testing.assert_close(found[tokens:theirs], start[tokens:theirs])  # the expert's mean other tokens
    torch.testing.assert_close(found[theirs : theirs + 6], expert[theirs:])
    torch.testing.assert_close(found[theirs + 6 :], start[theirs + 6 :])  # the expert has none
