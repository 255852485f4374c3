"""The FoE Space in use: a published model, a copied folder, a real browser and the API client."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hostile_pictures import refused
from huggingface_hub import HfApi
from PIL import Image, ImageOps
from threads import wrong_calls
from tiny import bert, grey_processor, make_tokenizer, names
from transformers import ResNetConfig, ResNetForImageClassification, set_seed

from hf_fusion import FoEModel, fit_fuser
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.types import Expert

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HOSTILE = "<img src=x onerror=window.hacked=1>{{evil}}${evil}"
EXAMPLES = Path(__file__).parents[2] / "spaces" / "foe" / "examples"
SIZE = 20
SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@dataclass
class Published:
    """A model on the Hub, and the same in memory to compare with."""

    id: str
    model: Any
    sha: str

    def ask(self, budget: float | None = None, **inputs: Any) -> SimpleNamespace:
        """Label, confidence and who was asked, straight from the model."""
        self.model.record_routing = True
        with torch.no_grad():
            shares = self.model(**self.model.processor(**inputs), budget=budget).logits[0].softmax(-1)
        order = self.model.routing_trace()["order"][0].tolist()
        best = int(shares.argmax())
        return SimpleNamespace(label=self.model.config.id2label[best], confidence=float(shares[best]), order=order)


def publish(hub, model: Any, repo: str, folder: Path, **files: str) -> Published:
    model.save_pretrained(folder)
    for name, text in files.items():
        (folder / f"{name}.md").write_text(text)
    api = HfApi(endpoint=hub.endpoint, token=hub.token(repo.partition("/")[0]))
    api.create_repo(repo)
    return Published(repo, model, api.upload_folder(repo_id=repo, folder_path=folder).oid)


def digit_expert(name: str, own: list[int], pixels: torch.Tensor, labels: torch.Tensor) -> Expert:
    """A small ResNet trained for two seconds on the digits it is to know."""
    rows = torch.isin(labels, torch.tensor(own)).nonzero()[:, 0]
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.update(names([DIGITS[digit] for digit in own]))
    model = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(3):
        for batch in rows[torch.randperm(len(rows))].split(32):
            targets = torch.tensor([own.index(int(label)) for label in labels[batch]])
            model(pixel_values=pixels[batch], labels=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return Expert(name, model.eval(), processor=grey_processor(SIZE), labels=[DIGITS[digit] for digit in own])


@pytest.fixture(scope="session")
def digits(hub, tmp_path_factory) -> Published:
    """A frugal FoE of three digit experts, one of them with a hostile name."""
    from sklearn.datasets import load_digits

    set_seed(0)
    data = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in data.images]
    labels = torch.tensor(data.target)
    pixels = grey_processor(SIZE)(images, return_tensors="pt")["pixel_values"]
    known = {"me/low": [0, 1, 2, 3, 4], HOSTILE: [5, 6, 7, 8, 9], "me/odd": [1, 3, 5, 7, 9]}
    model = FoEModel.from_experts(
        [digit_expert(name, own, pixels[:900], labels[:900]) for name, own in known.items()], labels=DIGITS
    )
    rest = Dataset.from_dict({"image": images[900:], "label": labels[900:].tolist()})
    fit_fuser(model, rest.select(range(400)), frugal=True, epochs=15, inference_batch_size=100)
    folder = tmp_path_factory.mktemp("digits")
    evaluate(model, rest.select(range(400, 897)), name="digits", batch_size=100).save(folder / "results.json")
    return publish(hub, model, "space-digits/foe", folder)


@pytest.fixture(scope="session")
def texts(hub, tmp_path_factory) -> Published:
    """A selection among two text experts with labels of their own, one of them hostile; nothing fitted or measured."""
    tokenizer = make_tokenizer()
    spaces = {"me/topic": ["sport", HOSTILE, "politics"], "me/mood": ["glad", "sad"]}
    experts = [
        Expert(name, bert(labels, seed=seed), processor=tokenizer, labels=labels)
        for seed, (name, labels) in enumerate(spaces.items())
    ]
    set_seed(0)
    model = FoEModel.from_experts(experts, mode="selection", fuser_hidden=[8])
    card = "---\nwidget:\n- text: the quick fox\n- text: a lazy dog\n---\n"
    return publish(hub, model, "space-texts/foe", tmp_path_factory.mktemp("texts"), README=card)


@pytest.fixture(scope="session")
def digits_url(run_space, digits) -> str:
    return run_space("foe", MODEL_ID=digits.id, MODEL_REVISION=digits.sha)


def answer(page) -> str:
    return page.locator("[data-answer]").inner_text()


def seen_picture(page) -> Image.Image:
    """The picture that the page says the experts see."""
    url = page.locator(".foe-seen img").get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def upload(page, name: str, content: bytes) -> None:
    kind = f"image/{Path(name).suffix[1:]}"
    page.locator(".foe-pad input").set_input_files({"name": name, "mimeType": kind, "buffer": content})


def wait_for(page, selector: str, text: str) -> None:
    page.locator(selector, has_text=text).first.wait_for(timeout=15_000)


def assert_fits(page, width: int, scheme: str) -> None:
    """Nothing sticks out sideways, and the ground is as dark or light as asked."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.locator(".ui-card").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert (np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) < 128) == (scheme == "dark"), colour


def example(digit: int) -> Path:
    return EXAMPLES / f"{digit}-{DIGITS[digit]}.png"


@pytest.mark.long
def test_concurrent_visitors_see_their_routing(digits, space_modules):
    (space,) = space_modules("foe", "model")
    digits.model.record_routing = True
    served = space.Served("", "", digits.model, digits.model.processor, "image", None, [])
    pictures = [Image.open(example(digit)) for digit in range(10)]
    calls = {
        f"{digit} for {budget}": partial(served.ask, picture, budget)
        for digit, picture in enumerate(pictures)
        for budget in (None, 0.4)
    }
    assert wrong_calls(calls, 60) == []


def test_predict_answers_like_the_model(digits, digits_url):
    client = Client(digits_url, verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/predict"]
    for budget in (None, 0.4):
        routing = client.predict(handle_file(example(3)), budget, api_name="/predict")
        expected = digits.ask(budget, images=[Image.open(example(3))])
        assert routing["answer"] == expected.label
        assert routing["confidence"] == pytest.approx(expected.confidence, abs=1e-4)
        assert [expert["order"] for expert in routing["experts"]] == expected.order
        assert [e["probabilities"] is None for e in routing["experts"]] == [not order for order in expected.order]
    for budget, problem in ((2, "above 0 and at most 1"), (0, "above 0 and at most 1")):
        with pytest.raises(AppError, match=problem):
            client.predict(handle_file(example(3)), budget, api_name="/predict")
    with pytest.raises(AppError, match="no picture"):
        client.predict(None, None, api_name="/predict")


def test_uploads_are_opened_within_limits(digits_url, tmp_path):
    client = Client(digits_url, verbose=False)
    for name, (content, said) in refused().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AppError, match=said if content else "picture|empty"):  # Gradio may refuse what is empty
            client.predict(handle_file(tmp_path / name), None, api_name="/predict")
    expected = client.predict(handle_file(example(3)), None, api_name="/predict")["answer"]
    for mode, name in (("P", "three.gif"), ("CMYK", "three.tiff"), ("1", "three.png")):
        Image.open(example(3)).convert(mode).save(tmp_path / name)
        found = client.predict(handle_file(tmp_path / name), None, api_name="/predict")["answer"]
        assert found == expected or mode == "1"  # strokes of one bit are other strokes


@pytest.mark.slow
@pytest.mark.browser
def test_digit_is_classified_in_the_browser(digits, digits_url, visit):
    for width, scheme in SCREENS:
        page = visit(digits_url, width, scheme)
        page.wait_for_selector("[data-answer]")
        page.wait_for_selector(".foe-plot")
        assert_fits(page, width, scheme)
    page = visit(digits_url)
    expected = {digit: digits.ask(images=[Image.open(example(digit))]) for digit in range(10)}
    assert answer(page) == expected[7].label  # the page opens with an answer
    other = next(digit for digit in range(10) if expected[digit].label != expected[7].label)
    page.get_by_role("button", name=f"Example: {DIGITS[other]}").click()
    wait_for(page, "[data-answer]", expected[other].label)
    assert f"{100 * expected[other].confidence:.1f} %" in page.locator(".foe-sure").inner_text()
    assert page.locator(".foe-expert").count() == 3 and page.locator(".foe-idle").count() == 0
    assert HOSTILE in page.locator(".foe-experts").inner_text()

    page.locator(".foe-budget input").fill("4")  # 40 % of the cost
    wait_for(page, ".ui-note", "within a budget of 40 %")
    order = digits.ask(0.4, images=[Image.open(example(other))]).order
    assert page.locator(".foe-idle", has_text="not queried").count() == order.count(0) > 0
    assert page.locator(".foe-chain li").count() == len(order) - order.count(0)
    wait_for(page, ".foe-plot .budget", "budget 40 %")

    page.get_by_role("button", name="Clear").click()
    wait_for(page, ".ui-message", "Draw a digit")
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_selector("[data-answer]")
    rows, columns = np.nonzero(np.asarray(seen_picture(page)) > 64)
    assert np.ptp(rows) + 1 >= 18 and np.ptp(columns) + 1 <= 5  # a vertical line, in MNIST's size

    page.locator(".foe-budget input").fill("11")
    wait_for(page, ".foe-cost h3", "All 3 experts queried")
    before, photo = page.locator(".foe-seen img").get_attribute("src"), io.BytesIO()
    paper = ImageOps.invert(Image.open(example(other)).resize((300, 300)))  # ink on paper
    ImageOps.expand(paper, 40, 255).save(photo, format="JPEG")
    upload(page, "photo.jpg", photo.getvalue())
    page.wait_for_function("before => document.querySelector('.foe-seen img').src !== before", arg=before)
    assert answer(page) == digits.ask(images=[seen_picture(page)]).label
    upload(page, "broken.png", b"no picture")
    wait_for(page, ".ui-message", "cannot be read")


@pytest.mark.browser
def test_text_is_classified_in_the_browser(run_space, texts, visit):
    page = visit(run_space("foe", MODEL_ID=texts.id, MODEL_REVISION=texts.sha))
    wait_for(page, "[data-answer]", texts.ask(text=["the quick fox"]).label)
    assert page.locator(".foe-budget").count() == 0  # a selection keeps to no budget
    wait_for(page, ".ui-message", "no results.json")
    page.locator("textarea").first.fill("nine lazy routers jump")
    page.get_by_role("button", name="Query the experts").click()
    expected = texts.ask(text=["nine lazy routers jump"])
    wait_for(page, ".foe-sure", f"{100 * expected.confidence:.1f} %")
    assert answer(page) == expected.label
    assert page.locator(".foe-idle", has_text="not chosen").count() == 1
    page.get_by_text("a lazy dog").click()
    wait_for(page, ".foe-sure", f"{100 * texts.ask(text=['a lazy dog']).confidence:.1f} %")
    page.locator("textarea").first.fill("  ")
    page.get_by_role("button", name="Query the experts").click()
    wait_for(page, ".ui-message", "no text yet")
    assert_fits(page, 1280, "light")


@pytest.mark.slow
def test_unservable_model_is_reported_on_the_page(alone, hub, texts):
    api = HfApi(endpoint=hub.endpoint, token=hub.token("space-other"))
    api.create_repo("space-other/bert")
    api.upload_file(repo_id="space-other/bert", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "bert"}')
    api.create_repo("space-other/hidden", private=True)
    code = f"""
import app, model
print(app.demo.get_config_file()["components"])
for id in ["no id at all/", "space-other/hidden", "{texts.id}@v9", "space-other/bert"]:
    try:
        model.load(model.Settings(*id.split("@")))
    except model.LoadError as error:
        print(error)
"""
    printed = alone("foe", code, MODEL_ID="space-other/missing")
    for reason in (
        "The model could not be loaded",
        "There is no model space-other/missing",
        "Set MODEL_ID",
        "'no id at all/' is neither a folder nor a model id",
        "There is no model space-other/hidden",
        f"{texts.id} has no revision v9",
        "space-other/bert is not a Fusion of Experts",
    ):
        assert reason in printed, reason


@pytest.mark.slow
def test_the_code_of_a_model_runs_by_consent_and_at_a_named_commit(alone, texts):
    """And at that commit it runs; nothing of this package is imported in the Space's process."""
    code = f"""
import sys, model
for revision, agreed in [(None, False), ("{texts.sha}", False), (None, True), ("main", True)]:
    try:
        model.load(model.Settings("{texts.id}", revision, agreed))
    except model.LoadError as error:
        print(error, any("transformers_modules" in name for name in sys.modules))
print(model.load(model.Settings("{texts.id}", "{texts.sha}", True)).kind)
"""
    said = f"{texts.id} comes with code that would run in this Space: read it, then set TRUST_REMOTE_CODE=true"
    printed = alone("foe", code).splitlines()
    assert printed[-5:-1] == [f"{said} and MODEL_REVISION={texts.sha}. False"] * 4
    assert printed[-1] == "text"


@pytest.mark.slow
def test_a_dead_hub_is_named(alone):
    code = """
import model
try:
    model.load(model.Settings("me/foe"))
except model.LoadError as error:
    print(error)
"""
    printed = alone("foe", code, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in printed and "me/foe" in printed
