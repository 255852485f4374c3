"""The WEMoE Space in use: a published model, a copied folder, a real browser and the API client."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hostile_pictures import refused
from huggingface_hub import HfApi
from models.test_wemoe import shuffled
from threads import wrong_calls
from tiny import bert, gpt2, image_processor, images, make_tokenizer, t5, vit
from tiny_fused import base_expert, bert_base, experts_of, fine_tuned

from hf_fusion import Expert, WEMoEModel

HOSTILE = "<img src=x onerror=window.hacked=1>{{evil}}${evil}"
EXPERTS = ["me/tiny-moods", f"me/tiny-{HOSTILE}", "me/tiny-topics"]
SHOWN = ["moods", HOSTILE, "topics"]
LABELS = (["bad", "good"], ["b", HOSTILE, "d"], ["art", "law", "sport", "food"])
EXAMPLES = [
    {"text": "the quick fox", "task": "moods"},
    {"text": "a lazy dog", "text_pair": "said the gate", "task": "me/tiny-topics"},
]
SCREENS = [(1280, "light"), (390, "dark")]


def save(model: WEMoEModel, folder: Path, examples: list | None = None) -> Path:
    """A folder as it is published, its routers as adaptation leaves them."""
    shuffled(model).save_pretrained(folder)
    if examples is not None:
        (folder / "examples.json").write_text(json.dumps(examples))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three text classifiers with classes of their own, one of them with a hostile name."""
    base, experts = bert_base(), []
    for k, (name, labels) in enumerate(zip(EXPERTS, LABELS, strict=True)):
        model = bert(labels, seed=10 + k)
        model.bert.load_state_dict(fine_tuned(base, k).bert.state_dict())
        experts.append(Expert(name, model, labels=labels, processor=make_tokenizer(), revision="1" * 40, license="mit"))
    return save(WEMoEModel.from_experts(experts, base_expert(base)), tmp_path_factory.mktemp("texts"), EXAMPLES)


@pytest.fixture(scope="session")
def reference(folder) -> Any:
    """The same in memory, to compare with."""
    return WEMoEModel.from_pretrained(folder).eval()


def one_head(base: Any, processor: Any, folder: Path, labels: tuple[str, ...] = (), **options: Any) -> Path:
    """Fine-tunes of one base that share all but their MLPs."""
    experts = [replace(e, processor=processor) for e in experts_of(base, labels=labels)]
    return save(WEMoEModel.from_experts(experts, base_expert(base), **options), folder)


@pytest.fixture(scope="module")
def model(space_modules):
    return space_modules("wemoe", "coefficients", "model")[1]


@pytest.fixture(scope="module")
def served(model, folder):
    return model.load(model.Settings(str(folder), trusted=True))


@pytest.fixture
def app_of(space_modules, monkeypatch):
    """``app_of(folder)``: the page of a model, in this process."""

    def load(folder: Path) -> Any:
        monkeypatch.setenv("MODEL_ID", str(folder))
        monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
        sys.modules.pop("app", None)
        space_modules("wemoe", "model")
        return importlib.import_module("app")

    return load


@torch.no_grad()
def plain(reference: Any, text: str, task: str, pair: str = "", using: Any = None) -> tuple[list[float], torch.Tensor]:
    """Probabilities and coefficients (L, K) without the Space's code."""
    inputs = make_tokenizer()(*filter(None, (text, pair)), return_tensors="pt")
    reference.record_routing = True
    with reference.using(using) if using is not None else nullcontext():
        logits = reference(**inputs, task=task).logits[0]
    return logits.softmax(-1).tolist(), reference.routing_trace().coefficients()[0]


# ---------------------------------------------------------------- the model, without a page


def test_answers_equal_the_model(served, model, reference):
    examples = [model.Example("the quick fox"), model.Example("a lazy dog", "said the gate"), model.Example("a")]
    answers = served.answer(examples, 2)  # padded and apart, as they come
    for example, answer in zip(examples, answers, strict=True):
        probabilities, coefficients = plain(reference, example.text, EXPERTS[2], example.pair)
        assert answer.labels == LABELS[2] and answer.text == LABELS[2][probabilities.index(max(probabilities))]
        assert answer.probabilities == pytest.approx(probabilities, abs=1e-5)
        assert torch.allclose(torch.tensor(answer.coefficients.values), coefficients, atol=1e-5)
        assert (answer.coefficients.experts, answer.coefficients.layers) == (SHOWN, ["0", "1"])


def test_constant_uses_the_head_of_the_task_and_experts_theirs(served, model, reference):
    [constant] = served.answer([model.Example("a lazy dog")], 2, model.CONSTANT)
    wanted, _ = plain(reference, "a lazy dog", EXPERTS[2], using=[0.3] * 3)
    assert constant.labels == LABELS[2] and constant.probabilities == pytest.approx(wanted, abs=1e-5)
    [alone] = served.answer([model.Example("a lazy dog")], 2, 0)
    wanted, _ = plain(reference, "a lazy dog", EXPERTS[0], using=EXPERTS[0])
    assert alone.labels == LABELS[0] and alone.probabilities == pytest.approx(wanted, abs=1e-5)
    assert alone.coefficients is None and constant.coefficients is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "no text"), ("x " * 1500, "tokens, at most 64 are allowed"), ("x" * 20_001, "20,000 characters")],
)
def test_invalid_texts_are_refused(served, model, text, problem):
    with pytest.raises(model.InputError, match=problem):
        served.check(model.Example(text))


def test_examples_come_from_beside_the_model(served, model, tmp_path):
    assert [(e.text, e.pair, e.task) for e in served.examples] == [
        tuple(row.get(key, "") for key in ("text", "text_pair", "task")) for row in EXAMPLES
    ]
    images(1)[0].save(tmp_path / "seven.png")
    rows = ["a", {"image": "seven.png"}, {"image": "../seven.png"}, {"image": "/etc/hostname"}, {"image": "no.png"}, 3]
    read = model.read_examples(rows, tmp_path)
    assert [(e.text, e.name) for e in read] == [("a", ""), ("", "seven.png")]
    assert model.read_examples({"a": 1}, tmp_path) == []


def test_parts_add_up_to_the_whole(served, reference):
    parts = served.parts()
    assert sum(parts.values()) == reference.num_parameters()
    dense = sum(p.numel() for name, p in bert_base().bert.named_parameters() if not name.startswith("pooler."))
    assert parts["upscaled_parameters"] + parts["merged_parameters"] == dense
    assert parts["task_vectors"] == 3 * parts["upscaled_parameters"]
    assert served.expert_urls[EXPERTS[0]].endswith(f"/{EXPERTS[0]}/tree/{'1' * 40}")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "bert"}, "is not a WEMoE"),
        ({"model_type": "wemoe", "head": "features"}, "is a model for features; this page supports sequence-class"),
        (None, "is not a WEMoE"),
    ],
)
def test_unservable_model_is_reported(model, tmp_path, config, problem):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(model.LoadError, match=problem):
        model.load(model.Settings(str(tmp_path)))


@pytest.mark.long
def test_page_reports_unservable_models(app_of, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wemoe", "head": "token-classification"}')
    shown = str(app_of(tmp_path).demo.get_config_file()["components"])
    assert "is a model for token-classification" in shown and "Set MODEL_ID" in shown


# ---------------------------------------------------------------- pages of other kinds of models, without a browser


@pytest.mark.long
@torch.no_grad()
def test_language_models_answer_prompts_one_writer_after_the_other(app_of, tmp_path):
    base = gpt2()
    app = app_of(one_head(base, make_tokenizer(), tmp_path))
    reference = app.served().model
    answer, merged_from, asked = app.run("the quick fox", None)
    ids = make_tokenizer()("the quick fox", return_tensors="pt")
    written = reference.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert make_tokenizer().decode(written, skip_special_tokens=True).strip()[:20] in answer
    assert "with the head" not in answer and "Merging coefficients" in merged_from
    busy = [str(step).count('aria-busy="true"') for step in app.compare(asked)]
    assert busy == [4, 3, 2, 1, 0]
    assert "too long: it has" in app.run("fox " * 40, None)[0]  # 64 tokens, of which half are to be written
    table, _ = app.run_batch("a dog\nnine routers", None, None)
    assert "2 answers" in str(table)


def test_encoder_decoders_have_layers_of_both(app_of, tmp_path):
    app = app_of(one_head(t5(), make_tokenizer(), tmp_path, task_vectors="low-rank", energy=0.6, routing="smile"))
    *_, asked = app.run("the quick fox", None)
    *_, last = app.compare(asked)
    said = app.predict("the quick fox", "")
    assert list(said["coefficients"]["layers"]) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert said["coefficients"]["constant"] == pytest.approx(1 / 3) and "Equal coefficients" in last
    assert set(said["alone"]) == {"task arithmetic", "0", "1", "2"}


def test_concurrent_visitors_see_their_coefficients(model, served):
    texts = [model.Example("the quick fox"), model.Example("nine lazy routers jump, said the gate"), model.Example("a")]
    groups = [texts[:1], texts, texts[1:]]  # padded and not

    def answers(group: list[Any], task: int, weights: Any) -> list[Any]:
        found = served.answer(group, task, weights)
        for example in group:
            served.check(example)
        return [[a.text, a.probabilities, a.coefficients and a.coefficients.values] for a in found]

    calls = {
        f"{number} for {task} by {weights}": partial(answers, group, task, weights)
        for number, group in enumerate(groups)
        for task in range(2)
        for weights in (model.ROUTED, model.CONSTANT, 2)
    }
    assert wrong_calls(calls, 60) == []


def test_images_are_answered_singly_and_in_batches(app_of, tmp_path):
    folder = one_head(vit(["x", "y"]), image_processor(16), tmp_path / "model", ("x", "y"), heads="shared")
    app = app_of(folder)
    pictures = images(3)
    answer, _, asked = app.run(pictures[0], None)
    assert "data:image/png;base64" in answer
    assert [str(html).count("we-said") for html in app.compare(asked)] == [4]
    with torch.no_grad():
        inputs = app.served().processor(images=pictures, return_tensors="pt")
        labels = [("x", "y")[i] for i in app.served().model(**inputs).logits.argmax(-1).tolist()]
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    table, download = app.run_batch("", paths, None)
    assert "3 answers" in str(table)
    rows = list(csv.DictReader(Path(download.value["path"]).read_text().splitlines()))
    assert [(row["input"], row["answer"]) for row in rows] == [(f"{i}.png", labels[i]) for i in range(3)]
    nothing, _, asked = app.run(None, None)
    assert "Upload a picture" in nothing and list(app.compare(asked)) == [""]
    (tmp_path / "bad.png").write_bytes(b"x")
    failed, _ = app.run_batch("", [str(tmp_path / "bad.png")], None)
    assert "bad.png cannot be read" in str(failed)


@pytest.mark.long
def test_uploads_are_opened_within_limits(app_of, tmp_path):
    folder = one_head(vit(["x", "y"]), image_processor(16), tmp_path / "model", ("x", "y"), heads="shared")
    hostile = refused()
    (folder / "examples").mkdir()
    (folder / "examples" / "bits.png").write_bytes(hostile["bits.png"][0])
    images(1)[0].save(folder / "examples" / "good.png")
    rows = [{"image": "examples/bits.png"}, {"image": "examples/good.png"}]
    (folder / "examples.json").write_text(json.dumps(rows))
    app = app_of(folder)
    assert [example.name for example in app.served().examples] == ["good.png"]  # the page starts without the other
    _, url, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        assert client.predict(handle_file(folder / "examples" / "good.png"), "", api_name="/predict")["answer"] in "xy"
        for name in ("bits.png", "comment.png", "exif.png", "cut.jpg", "canvas.webp", "icon.ico"):
            content, said = hostile[name]
            (tmp_path / name).write_bytes(content)
            with pytest.raises(AppError, match=f"{name} cannot be read: .*{said}"):
                client.predict(handle_file(tmp_path / name), "", api_name="/predict")
            failed, _ = app.run_batch("", [str(tmp_path / name)], None)
            assert f"{name} cannot be read" in str(failed)
    finally:
        app.demo.close()


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="session")
def url(hub, folder, run_space) -> str:
    api = HfApi(endpoint=hub.endpoint, token=hub.token("space-wemoe"))
    api.create_repo("space-wemoe/merged")
    pinned = api.upload_folder(repo_id="space-wemoe/merged", folder_path=folder).oid
    api.upload_file(
        repo_id="space-wemoe/merged", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "later"}'
    )
    return run_space("wemoe", MODEL_ID="space-wemoe/merged", MODEL_REVISION=pinned)


def wait_for_answer(page, head: str) -> None:
    """An answer by that head, those by other weights, and the coefficients."""
    page.locator(".we-answer", has_text=f"with the head of {head}").wait_for(timeout=30_000)
    page.locator(".we-compare .ui-card", has_text=f"0.3 for all, head of {head}").wait_for()
    page.locator(".ui-pair .ui-note", has_text=f"thick: {head}, the expert").wait_for()


def heat(page, table: str = ".ui-pair .ui-heat tbody") -> list[float]:
    """The numbers of a heat map, row by row."""
    return [float(text) for text in page.locator(f"{table} :is(.more, .less)").all_text_contents()]


def test_predict_returns_answer_and_coefficients(url, reference):
    client = Client(url, verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/predict"]
    said = client.predict("the quick fox", "", "topics", api_name="/predict")
    probabilities, coefficients = plain(reference, "the quick fox", EXPERTS[2])
    assert said["probabilities"] == pytest.approx(dict(zip(LABELS[2], probabilities, strict=True)), abs=1e-4)
    assert said["answer"] == LABELS[2][probabilities.index(max(probabilities))] and len(said["revision"]) == 40
    assert said["coefficients"]["layers"]["1"] == pytest.approx(coefficients[1].tolist(), abs=1e-4)
    alone, _ = plain(reference, "the quick fox", EXPERTS[0], using=EXPERTS[0])
    assert said["alone"]["moods"] == LABELS[0][alone.index(max(alone))]
    with pytest.raises(AppError, match="no text"):
        client.predict(" ", "", "topics", api_name="/predict")
    with pytest.raises(AppError, match="no expert nobody"):
        client.predict("a", "", "nobody", api_name="/predict")


def upload(page, file: Path) -> None:
    """Chooses a file and waits for its row: once taken, the name stands in two parts, whole in the label alone."""
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_label(file.name, exact=True).wait_for()


@pytest.mark.browser
def test_answers_and_coefficients_in_the_browser(url, reference, visit, tmp_path):
    for width, scheme in SCREENS:
        page = visit(url, width, scheme)
        wait_for_answer(page, "moods")  # the page opens with an answer
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.locator(".ui-card").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 25, 23)"}[scheme]

    page = visit(url)
    wait_for_answer(page, "moods")
    probabilities, coefficients = plain(reference, "the quick fox", EXPERTS[0])
    assert page.locator("[data-answer]").text_content() == LABELS[0][probabilities.index(max(probabilities))]
    assert page.locator(".we-sure").text_content() == f"{100 * max(probabilities):.1f} % confident"
    assert heat(page) == pytest.approx(coefficients.flatten().tolist(), abs=0.0051)
    assert page.locator(".we-plot polyline").count() == 3 and page.locator(".we-plot .constant").count() == 1

    text = f"a fox {HOSTILE}"
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_label("Task").first.click()
    page.get_by_role("option", name="2 ").click()  # answers at once
    wait_for_answer(page, HOSTILE)
    probabilities, coefficients = plain(reference, text, EXPERTS[1])
    assert page.locator("[data-answer]").text_content() == LABELS[1][probabilities.index(max(probabilities))]
    assert heat(page) == pytest.approx(coefficients.flatten().tolist(), abs=0.0051)
    said = page.locator(".we-compare .we-said").all_text_contents()
    cases = [
        (EXPERTS[1], LABELS[1], [0.3] * 3),
        *((name, own, name) for name, own in zip(EXPERTS, LABELS, strict=True)),
    ]
    for shown, (task, labels, using) in zip(said, cases, strict=True):
        wanted, _ = plain(reference, text, task, using=using)
        assert shown == labels[wanted.index(max(wanted))]

    page.get_by_text("topics: a lazy dog", exact=False).first.click()  # an example with a second text
    wait_for_answer(page, "topics")
    _, coefficients = plain(reference, "a lazy dog", EXPERTS[2], "said the gate")
    assert heat(page) == pytest.approx(coefficients.flatten().tolist(), abs=0.0051)

    page.get_by_label("Text", exact=True).fill("  ")
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator(".ui-message", has_text="no text yet").wait_for()
    assert page.locator(".we-plot").count() == 0  # nothing is left of the answer before

    page.get_by_role("tab", name="Many inputs").click()
    page.get_by_label("Texts, one per line").fill("the quick fox\na lazy dog\tsaid the gate\n")
    page.get_by_role("button", name="Run all").click()
    page.get_by_text("2 answers").wait_for()
    rows = [plain(reference, "the quick fox", EXPERTS[0]), plain(reference, "a lazy dog", EXPERTS[0], "said the gate")]
    means = torch.stack([table.mean(0) for _, table in rows])
    assert heat(page, ".we-rows tbody") == pytest.approx(means.flatten().tolist(), abs=0.0051)
    with page.expect_download() as download:
        page.get_by_text("Download the table").click()
    table = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
    assert [float(row["probability"]) for row in table] == pytest.approx([max(p) for p, _ in rows], abs=1e-4)

    (tmp_path / "rows.csv").write_text("sentence\nx\n")
    upload(page, tmp_path / "rows.csv")
    page.get_by_role("button", name="Run all").click()
    page.locator(".ui-message", has_text="it needs one named text").wait_for()

    page.get_by_role("tab", name="Parts").click()
    page.get_by_text("Merged once: everything else").wait_for()
    number = f"{reference.summary()['merged_parameters']:,}"
    assert number in page.locator(".we-table").text_content()
