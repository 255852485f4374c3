"""A published WEMoE in a fresh process without hf_fusion and peft, and with an empty cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from models.test_wemoe import SHAPES, first, shuffled
from models.test_wemoe_experts import different_labels
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_fused import TEXT, base_expert, bert_base, experts_of

from hf_fusion import WEMoEModel

LOAD = """
import json, sys
sys.modules["hf_fusion"] = sys.modules["peft"] = None  # as if they were not installed
import torch, transformers
for case in json.load(open("{cases}")):
    auto = getattr(transformers, case["auto"])
    model = auto.from_pretrained(case["repo"], revision=case["revision"], trust_remote_code=True)
    own = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert own == [name for name, _ in model.named_parameters() if ".router." in f".{{name}}"], own
    inputs = torch.load(case["folder"] + "/inputs.pt")
    with torch.no_grad():
        if case["generates"]:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        else:
            output = model(**inputs, **case["options"])
            out = output["logits_per_image"] if "logits_per_image" in output else output[0]
    torch.save(out, case["folder"] + "/answer.pt")
    if case["again"]:
        model.push_to_hub(case["again"])  # its code travels on
classify = transformers.pipeline("text-classification", model="wemoe/heads", trust_remote_code=True)
one = classify("the quick fox", top_k=None)
classify.model.task = "me/task-2"
print([sorted(row["label"] for row in rows) for rows in (one, classify("the quick fox", top_k=None))])
"""
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "features": "AutoModel",
}
CASES = {
    "llama": {},
    "gpt2": {"task_vectors": "bfloat16"},
    "t5 gated": {"task_vectors": "low-rank", "energy": 0.6},
    "bart": {"task_vectors": "low-rank-bfloat16", "rank": 4},
    "bert": {"task_vectors": "sparse", "shared_router": True},
    "vit": {"task_vectors": "low-rank", "rank": 4, "routing": "smile"},
    "clip": {"modules": "attention"},
    "heads": {},
}


@pytest.mark.slow
def test_fresh_process_gives_bitwise_equal_outputs(hub, fresh_python, tmp_path):
    api = HfApi(endpoint=hub.endpoint, token=hub.token("wemoe"))
    cases, wanted = [], {}
    for kind, how in CASES.items():
        options = {"task": "me/task-2"} if kind == "heads" else {}
        if kind == "heads":
            (base, experts), inputs = different_labels(), TEXT
        else:
            build, _, inputs = SHAPES[kind]
            base = build()
            experts = experts_of(base)
        experts = [replace(expert, processor=make_tokenizer()) for expert in experts]
        model = shuffled(WEMoEModel.from_experts(experts, base_expert(base), **how))
        generates = model.config.head in ("causal-lm", "seq2seq-lm")
        inputs = {k: v for k, v in inputs.items() if not (generates and k == "decoder_input_ids")}
        with torch.no_grad():
            if generates:
                wanted[kind] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            else:
                wanted[kind] = first(model(**inputs, **options))
        folder, repo = tmp_path / kind, f"wemoe/{kind.replace(' ', '-')}"
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        api.create_repo(repo)
        commit = api.upload_folder(repo_id=repo, folder_path=folder).oid
        torch.save(inputs, folder / "inputs.pt")
        case = {"repo": repo, "revision": commit, "folder": str(folder), "generates": generates, "options": options}
        cases.append({**case, "auto": AUTO[model.config.head], "again": "wemoe/again" if kind == "llama" else ""})
    cases.append({**cases[0], "repo": "wemoe/again", "revision": "main", "auto": "AutoModel", "again": ""})
    cases[-1]["folder"] = str(tmp_path / "again")
    shutil.copytree(tmp_path / "llama", tmp_path / "again")
    wanted["again"] = wanted["llama"]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = fresh_python(LOAD.format(cases=tmp_path / "cases.json"), hub, token=hub.token("wemoe"))
    for kind, answer in wanted.items():
        assert torch.equal(torch.load(tmp_path / kind / "answer.pt"), answer), kind
    assert done.stdout.strip().endswith("[['a', 'b'], ['a', 'c', 'e', 'f']]")  # a pipeline answers for the task set


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = bert_base()
    folder = tmp_path_factory.mktemp("saved") / "model"
    WEMoEModel.from_experts(experts_of(base), base_expert(base)).save_pretrained(folder, max_shard_size="40KB")
    return folder


def files(folder):
    return sorted(folder.glob("*.safetensors"))


def without_a_tensor(folder):
    tensors = load_file(files(folder)[1])
    dropped = next(iter(tensors))
    del tensors[dropped]
    save_file(tensors, files(folder)[1], metadata={"format": "pt"})


def truncated(folder):
    content = files(folder)[1].read_bytes()
    files(folder)[1].write_bytes(content[: len(content) // 2])


def swapped(folder):
    files(folder)[1].write_bytes(files(folder)[0].read_bytes())


def resized(folder):
    tensors = load_file(files(folder)[1])
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.dim() > 1)
    tensors[name] = tensor[1:].contiguous()
    save_file(tensors, files(folder)[1], metadata={"format": "pt"})


def an_expert_less(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["experts"][1]
    (folder / "config.json").write_text(json.dumps(config))


def gone(folder):
    files(folder)[1].unlink()


def of_another_model(folder):
    """The same names and shapes, as another fusion of the same base has them."""
    WEMoEModel.from_experts(experts_of(bert_base(), scale=0.4), base_expert(bert_base())).save_pretrained(
        folder.with_name("other"), max_shard_size="40KB"
    )
    for name, file in zip(files(folder), files(folder.with_name("other")), strict=True):
        tensors = load_file(name)
        if any("task_vector" in key or "vectors" in key for key in tensors):
            assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in load_file(file).items()}
            name.write_bytes(file.read_bytes())
            return
    raise AssertionError("no shard holds task vectors")


@pytest.mark.parametrize(
    "spoil", [without_a_tensor, truncated, swapped, resized, an_expert_less, gone, of_another_model]
)
def test_a_wrong_file_is_an_error(spoil, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    assert len(files(folder)) > 2
    WEMoEModel.from_pretrained(folder)
    spoil(folder)
    with pytest.raises(
        ValueError, match="lacks weights|unknown weights|another model's|cut off|in the files|to have a file"
    ):
        WEMoEModel.from_pretrained(folder)
