"""Gates: the formula, frozen weights, learning, resuming, and both replacements for missing gates."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SUMS, adapter, bert, gpt2, image_processor, images, llama, make_tokenizer, t5, vit
from torch import nn

from hf_fusion import Expert, FusionError, train_gates
from hf_fusion.hub.gates_file import gate_sizes
from hf_fusion.hub.lora import read_adapter
from hf_fusion.training.gates import arrow_prototypes, average_activation, gated
from hf_fusion.types import Adapter

LABELS = ["no", "yes", "may be"]
train_paper_gates = partial(train_gates, gates="paper")
PROMPTS = ["the quick brown", "experts are", "a stitch in time", "said the router"]
TARGETS = [" fox jumps", " fused into one model", " saves nine", " to the gate"]
IDS = torch.tensor([[5, 9, 40, 3, 77, 12], [8, 44, 3, 9, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
SEQUENCES = {**TEXT, "labels": IDS.masked_fill(IDS == 0, -100)}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}

# name -> the base, the linears an adapter of it changes, classes of its saved head, a batch
SHAPES = {
    "llama": (llama, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], None, SEQUENCES),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], None, SEQUENCES),
    "t5": (t5, ["SelfAttention.q", "EncDecAttention.k", "EncDecAttention.o", "wi", "wo"], None, SEQUENCES),
    "bert": (lambda: bert(["a", "b"]), ["query", "value", "output.dense"], 3, TEXT),
    "vit": (lambda: vit(["a", "b"]), ["q_proj", "v_proj", "query", "value", "fc1", "dense"], 3, PIXELS),
}
WORDS = datasets.Dataset.from_dict({"prompt": PROMPTS * 4, "target": TARGETS * 4})
REVIEWS = datasets.Dataset.from_dict(
    {"text": ["a fox", "a dog", "the gate", "one model"] * 4, "label": ["yes", "no", "may_be", "yes"] * 4}
)
PICTURES = datasets.Dataset.from_dict(
    {"image": images(8), "label": [0, 1, 2, 1] * 2},
    features=datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["NO", "Yes", "May-Be"])}
    ),
)


def make(name: str) -> Expert:
    """An expert of a shape, with random weights."""
    build, targets, classes, _ = SHAPES[name]
    base = build()
    processor = image_processor(16) if name == "vit" else make_tokenizer()
    return Expert(f"me/{name}", base, adapter(base, 4, classes, 1, targets), processor, LABELS if classes else [])


class Gated(nn.Module):
    """The paper's formula in plain words; x (…, d_in)."""

    def __init__(self, linear, a, b, gate):
        super().__init__()
        self.linear, self.a, self.b, self.gate, self.weight = linear, a, b, gate, linear.weight

    def forward(self, x):
        share = torch.sigmoid(x @ self.gate)[..., None]
        if self.a is None:
            return share * self.linear(x)
        return self.linear(x) + share * (x @ (self.b @ self.a).T)


def by_hand(expert: Expert, gates: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the base, rebuilt with the formula."""
    model, parameters = copy.deepcopy(expert.model), {}
    for name, tensor in expert.adapter.saved.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(tensor.clone()))
    for path, gate in gates.items():
        parent, _, key = path.rpartition(".")
        parameters[path] = nn.Parameter(gate.to(model.dtype))
        halves = expert.adapter.lora.get(path, (None, None))
        setattr(model.get_submodule(parent), key, Gated(model.get_submodule(path), *halves, parameters[path]))
    return model.eval(), parameters


def random_gates(expert: Expert) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {p: torch.randn(n, generator=generator) for p, n in gate_sizes(expert.adapter, expert.model).items()}


def fill(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for path, parameter in parameters.items():
            parameter.copy_(values[path])


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_is_that_of_the_formula(name):
    expert = make(name)
    expert.model.double()
    expert.adapter.lora = {path: (a.double(), b.double()) for path, (a, b) in expert.adapter.lora.items()}
    expert.adapter.saved = {key: tensor.double() for key, tensor in expert.adapter.saved.items()}
    batch = {key: value.double() if value.is_floating_point() else value for key, value in SHAPES[name][3].items()}
    values = random_gates(expert)
    plain, wanted = by_hand(expert, values)
    score = plain(**batch).logits.square().mean()
    score.backward()
    with gated(expert) as parameters:
        assert list(parameters) == list(values)
        fill(parameters, values)
        ours = expert.model(**batch).logits.square().mean()
        ours.backward()
        assert [p for p in expert.model.parameters() if p.requires_grad or p.grad is not None] == []
    torch.testing.assert_close(ours, score, rtol=1e-10, atol=0)
    for path, parameter in parameters.items():
        assert wanted[path].grad.norm() > 0, path
        error = (parameter.grad - wanted[path].grad).norm() / wanted[path].grad.norm()
        assert error < 1e-6, (path, float(error))


def snapshot(model: nn.Module) -> dict:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identities": [id(parameter) for parameter in model.parameters()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def assert_same(before: dict, after: dict) -> None:
    for name, tensor in before.pop("weights").items():
        assert tensor.equal(after["weights"][name]), name
    assert before == {key: value for key, value in after.items() if key != "weights"}


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("fails", [False, True])
def test_base_is_unchanged(name, fails):
    expert = make(name)
    expert.model.train()
    next(expert.model.parameters()).requires_grad_(False)
    before = snapshot(expert.model)
    data = WORDS if name == "llama" else REVIEWS
    if fails:
        expert.adapter.lora[next(iter(expert.adapter.lora))][1].fill_(torch.nan)
        with pytest.raises(FusionError, match=f"the loss of me/{name} on this data is not finite"):
            train_paper_gates(expert, data, steps=2)
    else:
        train_paper_gates(expert, data, steps=2)
        average_activation(expert, data)
    assert_same(before, snapshot(expert.model))


def learned() -> Expert:
    """A Llama and an adapter that has really learned `WORDS`."""
    base = llama()
    torch.manual_seed(0)
    for parameter in base.parameters():  # a fresh model's hidden states are too small to learn from in a moment
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(base), config)
    tokenizer = make_tokenizer()
    batch = tokenizer([p + t + "</s>" for p, t in zip(PROMPTS, TARGETS)], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Expert("me/learned", base, read_adapter(folder, "me/learned"), tokenizer)


@pytest.mark.long
def test_gates_respond_to_inputs_of_their_task():
    expert = learned()
    gates = train_paper_gates(expert, WORDS, batch_size=8)
    assert gates.kind == "trained"
    assert gates.facts["steps"] == 100
    assert gates.facts["examples"] == len(WORDS)
    assert gates.facts["loss_after"] < 0.9 * gates.facts["loss_before"]
    opened = []
    hooks = [
        expert.model.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, gate=gate: opened.append(torch.sigmoid(inputs[0] @ gate).mean().item())
        )
        for path, gate in gates.vectors.items()
    ]
    ids = expert.processor(PROMPTS[0] + TARGETS[0], return_tensors="pt")
    expert.model(**ids)
    for hook in hooks:
        hook.remove()
    assert sum(opened) / len(opened) > 0.6  # 0.5 before


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "data"),
    [("llama", WORDS), ("gpt2", WORDS), ("t5", WORDS), ("bert", REVIEWS), ("vit", PICTURES)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_expert_trains(name, data):
    expert = make(name)
    gates = train_paper_gates(expert, data, steps=30, batch_size=8, learning_rate=2e-2)
    assert {path: len(gate) for path, gate in gates.vectors.items()} == gate_sizes(expert.adapter, expert.model)
    assert ("classifier" in gates.vectors) == bool(SHAPES[name][2])
    assert all(gate.dtype == torch.float32 and gate.norm() > 0 for gate in gates.vectors.values())
    assert gates.facts["loss_after"] < gates.facts["loss_before"]
    again = train_paper_gates(expert, data, steps=30, batch_size=8, learning_rate=2e-2)
    assert all(gate.equal(again.vectors[path]) for path, gate in gates.vectors.items())


def test_pairs_of_texts_and_targets_of_a_regression():
    expert = make("bert")
    pairs = REVIEWS.add_column("text_pair", ["and so on"] * len(REVIEWS))
    one, two = (train_paper_gates(expert, data, steps=2) for data in (REVIEWS, pairs))
    assert any(not one.vectors[path].equal(two.vectors[path]) for path in one.vectors)
    head = {"classifier.weight": torch.randn(1, 32), "classifier.bias": torch.zeros(1)}
    scorer = Expert("me/score", expert.model, Adapter(expert.adapter.lora, head), expert.processor)
    scored = datasets.Dataset.from_dict({"text": REVIEWS["text"], "label": [0.25, 0.5, 0.75, 1.0] * 4})
    assert train_paper_gates(scorer, scored, steps=20, learning_rate=2e-2).facts["loss_after"] < 1e3


def test_the_prompt_and_the_padding_have_no_part_in_the_loss():
    """The same targets beside other padding give the same loss; other prompt labels could not."""
    expert = make("llama")
    one = train_paper_gates(expert, WORDS.select([0]), steps=1)
    long = datasets.Dataset.from_dict({"prompt": PROMPTS[:1] * 2, "target": TARGETS[:1] * 2})
    two = train_paper_gates(expert, long, steps=1)
    assert one.facts["loss_before"] == pytest.approx(two.facts["loss_before"], rel=SUMS)
    tokenizer = expert.processor
    prompt, target = tokenizer(PROMPTS[0])["input_ids"], tokenizer(TARGETS[0])["input_ids"] + [2]
    plain, _ = by_hand(expert, {path: torch.zeros(n) for path, n in gate_sizes(expert.adapter, expert.model).items()})
    logits = plain(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    assert one.facts["loss_before"] == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor(target)).item())


@pytest.mark.long
def test_bf16():
    """A base in bf16, and autocast over one in fp32: the gates themselves stay fp32 and come out alike."""
    expert = learned()
    single = train_paper_gates(expert, WORDS, batch_size=8)
    autocast = train_paper_gates(expert, WORDS, batch_size=8, bf16=True, use_cpu=True)
    half = Expert("me/half", copy.deepcopy(expert.model).bfloat16(), expert.adapter, expert.processor)
    for gates in (autocast, train_paper_gates(half, WORDS, batch_size=8)):
        assert all(gate.dtype == torch.float32 for gate in gates.vectors.values())
        assert gates.facts["loss_after"] < 0.95 * gates.facts["loss_before"]
        flat = [torch.cat(list(each.vectors.values())) for each in (single, gates)]
        assert torch.cosine_similarity(*flat, dim=0) > 0.9


def test_interrupted_run_resumes(tmp_path):
    expert = make("llama")
    options = {"steps": 20, "batch_size": 2, "max_length": 32}
    whole = train_paper_gates(expert, WORDS, **options)
    folder = tmp_path / "run"
    train_paper_gates(expert, WORDS, output_dir=folder, **options)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-20"]
    size = sum(path.stat().st_size for path in (folder / "checkpoint-20").glob("*.safetensors"))
    numbers = sum(gate.numel() for gate in whole.vectors.values())
    assert size < 4 * numbers + 4000  # the gates and a header: nothing of the base
    (folder / "checkpoint-20" / "trainer_state.json").unlink()  # killed while it wrote this one
    again = train_paper_gates(expert, WORDS, output_dir=folder, **options)
    assert all(gate.equal(again.vectors[path]) for path, gate in whole.vectors.items())
    assert again.facts == whole.facts
    with pytest.raises(FusionError, match=r"holds checkpoints of another run \(seed=0\)") as error:
        train_paper_gates(expert, WORDS, output_dir=folder, seed=1, **options)
    assert "output_dir" in error.value.hint
    expert.adapter.lora[next(iter(expert.adapter.lora))][0].add_(1)
    with pytest.raises(FusionError, match="another run"):
        train_paper_gates(expert, WORDS, output_dir=folder, **options)
    (folder / "gate_training.json").unlink()
    with pytest.raises(FusionError, match="another run"):
        train_paper_gates(expert, WORDS, output_dir=folder, **options)


def test_untrainable_experts_are_refused():
    expert = make("llama")
    full = Expert("me/full", expert.model, None, expert.processor)
    for call in (lambda: train_paper_gates(full, WORDS), lambda: arrow_prototypes(full)):
        with pytest.raises(FusionError, match="me/full is a full model"):
            call()
    mute = Expert("me/mute", expert.model, expert.adapter)
    with pytest.raises(FusionError, match="me/mute has no tokenizer"):
        train_paper_gates(mute, WORDS)
    for data, message in [
        (WORDS.select([]), "the data set for me/llama is empty"),
        (WORDS.remove_columns("target"), "no target"),
    ]:
        with pytest.raises(FusionError, match=message):
            train_paper_gates(expert, data)
        with pytest.raises(FusionError, match=message):
            average_activation(expert, data)
    classifier = make("bert")
    rows = REVIEWS.to_dict()["text"]
    for column, message in [
        (
            ["no", "yes", "perhaps", "never"] * 4,
            r"column 'label' holds \['never', 'perhaps'\], but the labels of me/bert",
        ),
        ([0, 1, 2, 3] * 4, r"holds \[3\]"),
    ]:
        with pytest.raises(FusionError, match=message):
            train_paper_gates(classifier, datasets.Dataset.from_dict({"text": rows, "label": column}))
    with pytest.raises(FusionError, match="no text"):
        train_paper_gates(classifier, REVIEWS.rename_column("text", "sentence"))
    for option in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": -1.0}):
        with pytest.raises(FusionError, match=f"{next(iter(option))}=.*: it must be greater than 0"):
            train_paper_gates(expert, WORDS, **option)
    headless = Expert("me/headless", expert.model.model, expert.adapter, expert.processor)
    with pytest.raises(FusionError, match="me/headless is a LlamaModel"):
        train_paper_gates(headless, WORDS)


def test_infinite_learning_rate_is_reported():
    with pytest.raises(FusionError, match="became NaN or Inf") as error:
        train_paper_gates(make("llama"), WORDS, steps=3, learning_rate=float("inf"))
    assert "learning_rate" in error.value.hint


@pytest.mark.parametrize("name", SHAPES)
def test_average_activation_is_the_mean_over_all_tokens(name):
    expert = make(name)
    data = {"bert": REVIEWS, "vit": PICTURES}.get(name, WORDS)
    gates = average_activation(expert, data, examples=7, batch_size=3)
    assert gates.kind == "average"
    assert gates.vectors.keys() == gate_sizes(expert.adapter, expert.model).keys()

    model, _ = by_hand(expert, {path: torch.zeros(n) for path, n in gate_sizes(expert.adapter, expert.model).items()})
    seen: dict[str, list[torch.Tensor]] = {}
    for path in gates.vectors:  # one row at a time, the adapter fully on
        module = model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda module, inputs, path=path: seen.setdefault(path, []).extend(inputs[0].flatten(0, -2))
        )
        if module.a is not None:
            module.b = 2 * module.b  # the formula's gates are half open
    for row in data.select(range(7)):
        with torch.no_grad():
            model(**plain_inputs(expert, row))
    for path, vectors in seen.items():
        torch.testing.assert_close(gates.vectors[path], torch.stack(vectors).mean(0), rtol=1e-4, atol=1e-5)


def plain_inputs(expert: Expert, row: dict) -> dict[str, torch.Tensor]:
    """One example without any of our code."""
    if "image" in row:
        return expert.processor(images=[row["image"]], return_tensors="pt")
    if "text" in row:
        return expert.processor(row["text"], return_tensors="pt")
    prompt, target = (expert.processor(row[column])["input_ids"] for column in ("prompt", "target"))
    if expert.model.config.is_encoder_decoder:
        return {"input_ids": torch.tensor([prompt]), "labels": torch.tensor([target])}
    return {"input_ids": torch.tensor([prompt + target + [2]])}


@pytest.mark.parametrize("name", SHAPES)
def test_arrow_prototypes_are_the_top_right_singular_vectors(name):
    expert = make(name)
    gates = arrow_prototypes(expert)
    assert gates.kind == "arrow"
    assert gates.vectors.keys() == gate_sizes(expert.adapter, expert.model).keys()
    for path, vector in gates.vectors.items():
        a, b = expert.adapter.lora.get(path, (expert.adapter.saved.get(f"{path}.weight"), None))
        dense = a if b is None else b @ a
        top = torch.linalg.svd(dense).Vh[0]
        assert abs(vector @ top).item() == pytest.approx(1, abs=1e-5)
        assert vector[vector.abs().argmax()] > 0
        assert vector.norm().item() == pytest.approx(1, abs=1e-6)


def test_the_prototype_of_an_update_that_is_none():
    """Ranks above the layer's own sizes are fine too."""
    base = llama()
    lora = {
        "model.layers.0.self_attn.q_proj": (torch.randn(64, 32), torch.zeros(32, 64)),
        "model.layers.0.self_attn.k_proj": (torch.randn(64, 32), torch.randn(16, 64)),
    }
    gates = arrow_prototypes(Expert("me/odd", base, Adapter(lora)))
    wide, zero = gates.vectors.values()
    a, b = lora["model.layers.0.self_attn.k_proj"]
    assert abs(wide @ torch.linalg.svd(b @ a).Vh[0]).item() == pytest.approx(1, abs=1e-4)
    assert zero.eq(0).all()


def test_finished_run_repeats_with_equal_gates(tmp_path):
    first, again = (
        train_paper_gates(make("llama"), WORDS, steps=5, batch_size=2, output_dir=tmp_path, use_cpu=True)
        for _ in range(2)
    )
    assert all(gate.equal(again.vectors[path]) for path, gate in first.vectors.items())
    assert first.facts == again.facts


RUN = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import torch
from accelerate import PartialState
from test_gates import WORDS, make
from test_gates import train_paper_gates
print("START", flush=True)
gates = train_paper_gates(make("llama"), WORDS, steps={steps}, batch_size={batch}, output_dir={folder!r}, use_cpu=True)
state = PartialState()
if state.is_main_process:
    torch.save((gates.vectors, state.num_processes), {answer!r})
"""


def script(tmp_path: Path, name: str, steps: int, batch: int, folder: str | None = None) -> Path:
    here = Path(__file__).parent
    file = tmp_path / f"{name}.py"
    paths = {"tests": str(here.parent), "here": str(here), "answer": str(tmp_path / f"{name}.pt")}
    file.write_text(RUN.format(steps=steps, batch=batch, folder=folder, **paths))
    return file


@pytest.mark.slow
def test_killed_run_resumes_to_equal_gates(tmp_path):
    """kill -9 at three moments, then run once more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = script(tmp_path, "quiet", 300, 2)
    subprocess.run([sys.executable, str(quiet)], env=environment, check=True, capture_output=True, timeout=240)
    file = script(tmp_path, "killed", 300, 2, str(tmp_path / "run"))
    for attempt in range(1, 4):
        process = subprocess.Popen([sys.executable, str(file)], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "START\n"
        time.sleep(0.6 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (tmp_path / "killed.pt").unlink(missing_ok=True)
    subprocess.run([sys.executable, str(file)], env=environment, check=True, capture_output=True, timeout=240)
    wanted, again = (torch.load(tmp_path / f"{name}.pt")[0] for name in ("quiet", "killed"))
    assert all(gate.equal(again[path]) for path, gate in wanted.items())


@pytest.mark.slow
def test_two_processes_train_the_same_as_one(tmp_path):
    """`accelerate launch` over two CPU processes with half the batch each, all rows in every batch: the same gates."""
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    found = []
    for name, processes, arguments in (("one", 1, []), ("two", 2, launch)):
        file = script(tmp_path, name, 20, len(WORDS) // processes)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        gates, count = torch.load(tmp_path / f"{name}.pt")
        assert count == processes
        found.append(torch.cat(list(gates.values())))
    # a mean of two means over their tokens is not quite the mean over all tokens
    assert (found[0] - found[1]).norm() < 0.1 * found[0].norm()
