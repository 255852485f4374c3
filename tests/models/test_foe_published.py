"""A published FoE in a fresh process without hf_fusion and with an empty cache."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from tiny import TEXTS, bert, gpt2, grey_processor, image_processor, images, llama, make_tokenizer, resnet, t5, vit

from hf_fusion import Expert, FoEModel

ABC = ["a", "b", "c"]

LOAD = """
import sys, types
sys.modules["hf_fusion"] = None  # as if it were not installed
import pickle, torch, transformers
model = transformers.{auto}.from_pretrained("{repo}", revision="{revision}", trust_remote_code=True)
inputs, generate = pickle.load(open("{inputs}", "rb"))
with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False) if generate else model(**inputs).logits
torch.save(out, "{answer}")
{then}
"""


def text_model(tokenizer) -> tuple[FoEModel, dict]:
    lower = make_tokenizer(330, lower=True)
    experts = [
        Expert("me/one", bert(ABC), processor=tokenizer, labels=ABC),
        Expert("me/two", bert(ABC, seed=1), processor=lower, labels=ABC),
    ]
    model = FoEModel.from_experts(experts)
    return model, dict(model.processor(text=TEXTS))


def image_model(tokenizer) -> tuple[FoEModel, dict]:
    experts = [
        Expert("me/vit", vit(ABC), processor=image_processor(16), labels=ABC),
        Expert("me/resnet", resnet(ABC), processor=image_processor(24), labels=ABC),
        Expert("me/grey", vit(ABC, seed=2, channels=1), processor=grey_processor(16), labels=ABC),
    ]
    model = FoEModel.from_experts(experts)
    return model, dict(model.processor(images=images()))


def causal_model(tokenizer) -> tuple[FoEModel, dict]:
    experts = [
        Expert("me/llama", llama(), processor=tokenizer),
        Expert("me/gpt2", gpt2(vocabulary=len(tokenizer)), processor=tokenizer),  # its head is tied to its embeddings
    ]
    for expert, penalty in zip(experts, (1.5, 3.0), strict=True):  # what the stranger's process must find
        expert.model.generation_config.repetition_penalty = penalty
    model = FoEModel.from_experts(experts, mode="selection")
    return model, dict(model.processor(text=TEXTS))


def seq2seq_model(tokenizer) -> tuple[FoEModel, dict]:
    model = FoEModel.from_experts(
        [Expert(f"me/t5-{i}", t5(i), processor=tokenizer) for i in range(2)], mode="selection"
    )
    return model, dict(model.processor(text=TEXTS))


# What a notebook shows of the model travels with it.
NOTEBOOK = (
    "model.record_routing = True; model(**inputs); "
    "assert all('</table>' in each._repr_html_() for each in (model.summary(), model.routing_trace()))"
)
KINDS = {
    "text": (text_model, "AutoModelForSequenceClassification", False),
    "image": (image_model, "AutoModelForImageClassification", False),
    "causal": (causal_model, "AutoModelForCausalLM", False),
    "causal-generate": (causal_model, "AutoModelForCausalLM", True),
    "seq2seq-generate": (seq2seq_model, "AutoModelForSeq2SeqLM", True),
}


# A fresh process takes ten seconds: the others go the way of this one.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k != "text" else k for k in KINDS],
)
def test_fresh_process_gives_bitwise_equal_outputs(kind, hub, fresh_python, tokenizer, tmp_path):
    build, auto, generates = KINDS[kind]
    model, inputs = build(tokenizer)
    with torch.no_grad():
        model.fuser.output.bias.copy_(torch.linspace(0, 0.2, len(model.fuser.output.bias)))
        wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False) if generates else model(**inputs).logits
    api = HfApi(endpoint=hub.endpoint, token=hub.token(f"foe-{kind}"))
    repo, again = f"foe-{kind}/fused", f"foe-{kind}/again"
    push(api, model, repo, tmp_path / "first")
    sha = api.model_info(repo).sha
    broken = FoEModel(model.config)  # main moves on to other weights
    broken._processor = model.processor
    push(api, broken, repo, tmp_path / "second")
    assert api.model_info(repo).sha != sha

    import pickle

    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps((inputs, generates)))
    files = {"inputs": tmp_path / "inputs.pkl", "answer": tmp_path / "answer.pt"}
    push_again = f'model.push_to_hub("{again}"); {NOTEBOOK}' if not generates else ""
    code = LOAD.format(auto=auto, repo=repo, revision=sha, then=push_again, **files)
    fresh_python(code, hub, token=api.token)
    assert torch.equal(torch.load(files["answer"]), wanted)
    if push_again:  # what was loaded and pushed again still loads, code, processor and all
        files["answer"].unlink()
        then = f'transformers.AutoProcessor.from_pretrained("{again}", trust_remote_code=True)'
        fresh_python(LOAD.format(auto="AutoModel", repo=again, revision="main", then=then, **files), hub)
        assert torch.equal(torch.load(files["answer"]), wanted)


def push(api: HfApi, model: FoEModel, repo: str, folder) -> None:
    model.save_pretrained(folder)
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)


PIPELINES = """
import sys
sys.modules["hf_fusion"] = None
from transformers import pipeline
from PIL import Image
pipe = pipeline("{task}", model="{repo}", trust_remote_code=True)
print("ANSWER", [(row["label"], round(row["score"], 5)) for row in pipe({value}, top_k=3)])
"""


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("text", "text-classification"),
        pytest.param("image", "image-classification", marks=pytest.mark.slow),
    ],
)
def test_pipelines_take_plain_text_and_images(kind, task, hub, fresh_python, tokenizer, tmp_path):
    model, _ = KINDS[kind][0](tokenizer)
    api = HfApi(endpoint=hub.endpoint, token=hub.token(f"pipe-{kind}"))
    push(api, model, f"pipe-{kind}/fused", tmp_path / "model")
    image = images(1)[0]
    image.save(tmp_path / "image.png")
    inputs = model.processor(text=[TEXTS[0]]) if kind == "text" else model.processor(images=[image])
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(-1)[0]
    wanted = sorted(((model.config.id2label[i], score) for i, score in enumerate(scores.tolist())), key=lambda x: -x[1])
    value = repr(TEXTS[0]) if kind == "text" else f'Image.open("{tmp_path / "image.png"}")'
    done = fresh_python(PIPELINES.format(task=task, repo=f"pipe-{kind}/fused", value=value), hub)
    answer = eval(done.stdout.partition("ANSWER ")[2])
    assert [label for label, _ in answer] == [label for label, _ in wanted]
    assert [score for _, score in answer] == pytest.approx([score for _, score in wanted], abs=2e-5)
