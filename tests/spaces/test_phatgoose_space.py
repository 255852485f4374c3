"""The PHATGOOSE Space in use: a published router, a copied folder, a real browser and the API client."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import HfApi
from threads import wrong_calls
from tiny import adapter, llama, make_tokenizer
from transformers import AutoTokenizer

from hf_fusion import Expert, PhatgooseForGeneration, PhatgooseRouter
from hf_fusion.types import Gates

HOSTILE = "<img src=x onerror=window.hacked=1>{{evil}}${evil}"
EXPERTS = ["me/tiny-sport", f"me/tiny-{HOSTILE}", "me/tiny-law"]
SHOWN = ["sport", HOSTILE, "law"]
EXAMPLES = ["the quick fox", "a lazy dog"]
BEST = 2  # by results.json
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}{{ ' [bot]' * add_generation_prompt }}"
SCREENS = [(1280, "light"), (390, "dark")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A router of three experts of a small Llama, one of them with a hostile name, with examples and results."""
    base, tokenizer, experts = llama(), make_tokenizer(), []
    for seed, name in enumerate(EXPERTS):
        lora = adapter(base, 4, None, seed, TARGETS)
        generator = torch.Generator().manual_seed(100 + seed)
        gates = {path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in lora.lora.items()}
        experts.append(Expert(name, base, lora, processor=tokenizer, gates=Gates(gates)))
    folder = tmp_path_factory.mktemp("router")
    PhatgooseRouter.from_experts(experts).save_pretrained(folder)
    predictors = [
        {"name": name, "kind": "expert", "means": {"held-in": {"score": i / 9}}} for i, name in enumerate(EXPERTS)
    ]
    (folder / "results.json").write_text(json.dumps({"predictors": [*predictors, {"name": "merged", "score": 0.9}]}))
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    return folder


@pytest.fixture(scope="session")
def router(folder) -> Any:
    """The same in memory, to compare with."""
    return PhatgooseForGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def model(space_modules):
    return space_modules("phatgoose", "model")[0]


@pytest.fixture(scope="module")
def served(model, folder):
    return model.load(model.Settings(str(folder), trusted=True))


@torch.no_grad()
def plain_answer(router: Any, prompt: str, tokens: int) -> tuple[torch.Tensor, str]:
    """Ids of prompt and answer, and the answer's text, without the Space's code."""
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = router.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)[0]
    return written, tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- the model, without a page


def test_answer_is_streamed_and_ends_with_its_routing(served, router):
    *parts, last = served.ask("the quick fox")
    texts = [part.text for part in parts]
    assert len(texts) > 2 and all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert not any(part.done or part.routing for part in parts)
    router.record_routing = 4096
    written, answer = plain_answer(router, "the quick fox", served.limits[1])
    trace = router.routing_trace()
    assert last.done and last.text == answer == texts[-1]
    assert len(last.routing.pieces) == len(written)
    assert torch.allclose(last.routing.means()[:-1], trace.mean_weights()[0], atol=1e-6)
    for index, module in enumerate(trace.modules):
        assert torch.equal(last.routing.choice[:-1, index], trace.choices(module)[0][0])
    assert last.routing.usage == pytest.approx(list(trace.usage().values()))


def test_base_merged_and_one_expert_write_too(served, router, model):
    for writer, weights in ((model.BASE, None), (model.MERGED, [1 / 3] * 3), (1, EXPERTS[1])):
        *_, last = served.ask("a lazy dog", writer)
        with router.using(weights):
            assert last.text == plain_answer(router, "a lazy dog", served.limits[1])[1]
        assert last.done and last.routing is None


def test_abandoned_answer_is_stopped(served):
    before = threading.active_count()
    stream = served.ask("the quick fox")
    next(stream)
    stream.close()
    assert threading.active_count() == before
    *_, last = served.ask("the quick fox")
    assert last.done


def test_concurrent_visitors_see_their_routing(served, model, monkeypatch):
    monkeypatch.setattr(model, "NEW_TOKENS", 16)

    def answer(prompt: str, writer: Any) -> list[Any]:
        *_, last = served.ask(prompt, writer)
        routing = last.routing
        return [last.text, routing and [routing.pieces, routing.choice, routing.weight, routing.usage]]

    calls = {
        f"{prompt} by {writer}": partial(answer, prompt, writer)
        for prompt in ("the quick fox", "nine lazy routers jump, said the gate")
        for writer in (model.ROUTED, model.MERGED)
    }
    assert wrong_calls(calls, 8) == []


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "no prompt"),
        (" \n", "no prompt"),
        (None, "no prompt"),
        ("x " * 1500, "tokens, at most 1,024 are allowed"),
        ("x" * 20_001, "20,000 characters"),
    ],
)
def test_invalid_prompts_are_refused(served, model, prompt, problem):
    with pytest.raises(model.InputError, match=problem):
        next(served.ask(prompt))


def test_a_prompt_is_put_into_the_form_of_the_training(served, model, folder):
    def text(template: str | None, chat: str | None, prompt: str = "Hi {}!") -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokenizer.chat_template = chat
        form = template or model._template(chat)
        return tokenizer.decode(replace(served, tokenizer=tokenizer, template=form).read(prompt)[0])

    assert text(None, None) == "Hi {}!"
    assert text(None, CHATML) == "<|im_start|>user\nHi {}!<|im_end|>\n<|im_start|>assistant\n"
    assert text(None, OTHER) == "[user] Hi {}! [bot]"
    assert text("Q: {}\nA:", CHATML) == "Q: Hi {}!\nA:"


def test_examples_and_the_best_expert_come_from_beside_the_model(served, model):
    assert served.examples == EXAMPLES and served.names == SHOWN
    assert (served.best, served.measured) == (BEST, True)
    rows = [{"name": "sport", "score": 0.4}, {"name": "me/tiny-law", "score": 0.3}, {"name": "else", "score": 1}, 7]
    assert model.best_expert({"systems": rows}, ["me/tiny-sport", "me/tiny-law"]) == 0
    for nothing in (None, [], {"systems": None}, {"systems": [{"name": "a", "score": "high"}]}):
        assert model.best_expert(nothing, ["me/a", "me/b"]) is None
    assert model.read_examples([{"text": "a"}, {"prompt": "b"}, "c", "", 3, {"x": 1}]) == ["a", "b", "c"]
    assert model.read_examples({"a": 1}) == []


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "bert"}, "is not a PHATGOOSE router"),
        (
            {"model_type": "phatgoose", "head": "sequence-classification"},
            "has a head for sequence-classification",
        ),
        (None, "is not a PHATGOOSE router"),
    ],
)
def test_unservable_model_is_reported(model, tmp_path, config, problem):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(model.LoadError, match=problem):
        model.load(model.Settings(str(tmp_path)))


@pytest.mark.long
def test_page_reports_unservable_models(space_modules, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "phatgoose", "head": "seq2seq-lm"}')
    monkeypatch.setenv("MODEL_ID", str(tmp_path))
    demo = space_modules("phatgoose", "app")[0].demo
    shown = str(demo.get_config_file()["components"])
    assert "has a head for seq2seq-lm" in shown and "Set MODEL_ID" in shown


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="session")
def url(hub, folder, run_space) -> str:
    api = HfApi(endpoint=hub.endpoint, token=hub.token("space-goose"))
    api.create_repo("space-goose/router")
    pinned = api.upload_folder(repo_id="space-goose/router", folder_path=folder).oid
    api.upload_file(
        repo_id="space-goose/router", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "later"}'
    )
    return run_space("phatgoose", MODEL_ID="space-goose/router", MODEL_REVISION=pinned)


def text_of(page, selector: str) -> str:
    return page.locator(selector).first.text_content()


def wait_for_tokens(page, prompt: str) -> None:
    page.locator(".pg-prompt:has([data-token])", has_text=prompt[:20]).wait_for(timeout=30_000)


def wait_until_done(page, prompt: str) -> None:
    """The prompt's answer is coloured, and the other three are complete."""
    wait_for_tokens(page, prompt)
    page.wait_for_function(
        """answer => {
          const cards = [...document.querySelectorAll(".pg-compare .ui-card")];
          return cards.length === 4 && cards.every(card => card.getAttribute("aria-busy") === "false");
        }""",
        timeout=30_000,
    )


def ask(page, prompt: str) -> None:
    page.locator("textarea").first.fill(prompt)
    page.get_by_role("button", name="Run", exact=True).click()


def titles(trace) -> list[str]:
    """What tokens say when pointed at, straight from the model's trace."""
    shares, experts = trace.mean_weights()[0].max(-1)
    return [f"{e + 1} {SHOWN[e]}, {100 * s:.0f} % of the weight" for s, e in zip(shares.tolist(), experts.tolist())]


@pytest.mark.slow
def test_generate_returns_the_routing(url, router):
    client = Client(url, verbose=False)
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/generate"]
    routing = client.predict("the quick fox", api_name="/generate")
    written, answer = plain_answer(router, "the quick fox", 64)
    assert routing["answer"] == answer and routing["experts"] == EXPERTS
    assert len(routing["tokens"]) == len(written) and routing["tokens"][-1]["expert"] is None
    assert sum(routing["usage"].values()) == pytest.approx(1, abs=1e-4)
    prompts = ["a lazy dog", "nine routers", "a gate", "the fox"]
    jobs = [client.submit(prompt, api_name="/generate") for prompt in prompts]  # visitors who come together
    for prompt, job in zip(prompts, jobs, strict=True):
        assert job.result()["answer"] == plain_answer(router, prompt, 64)[1]
    with pytest.raises(AppError, match="no prompt"):
        client.predict(" ", api_name="/generate")


@pytest.mark.browser
def test_tokens_are_routed_in_the_browser(url, router, visit):
    for width, scheme in SCREENS:
        page = visit(url, width, scheme)
        wait_until_done(page, EXAMPLES[0])  # the page opens with an answer
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.locator(".ui-card").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 25, 23)"}[scheme]

    page = visit(url)
    prompt = f"a fox {HOSTILE} café"
    ask(page, prompt)
    wait_until_done(page, prompt)
    tokens = page.locator("[data-token]")
    router.record_routing = 4096
    answer, trace = plain_answer(router, prompt, 64)[1], router.routing_trace()
    wanted = titles(trace)
    assert tokens.evaluate_all("all => all.map(token => token.title)") == wanted
    assert text_of(page, ".pg-compare .ui-card .pg-text") == answer.strip()
    with router.using(EXPERTS[BEST]):
        alone = plain_answer(router, prompt, 64)[1].strip()
    assert page.locator(".pg-compare .ui-card").last.locator(".pg-text").text_content() == (alone or "(nothing)")

    tokens.nth(2).click()
    page.locator(".ui-note", has_text=f"token 3 of {len(wanted) + 1}, in the prompt").wait_for()
    shown = page.locator(".ui-heat tbody tr:not(.layer) td:nth-child(2)").all_text_contents()
    first = [float(trace.expert_weights(module)[0, 2, 0]) for module in trace.modules]
    assert [0 if cell == "·" else float(cell) for cell in shown] == pytest.approx(first, abs=0.0051)
    page.keyboard.press("ArrowRight")
    page.locator(".ui-note", has_text="token 4 of").wait_for()
    page.keyboard.press("End")
    page.locator(".ui-note", has_text=f"token {len(wanted)} of {len(wanted) + 1}, in the answer").wait_for()
    assert page.evaluate("document.activeElement.dataset.token") == str(len(wanted) - 1)
    page.get_by_label("Show the experts' numbers").check()
    number = tokens.first.evaluate("token => getComputedStyle(token, '::after').content")
    assert number == f'"{wanted[0][0]}"'

    with page.expect_download() as download:
        page.get_by_text("Download the routing").click()
    data = json.loads(Path(download.value.path()).read_text())
    assert data["prompt"] == prompt and list(data["modules"]) == trace.modules and len(data["revision"]) == 40

    page.get_by_label("Expert alone").click()
    page.get_by_role("option", name="1 sport").click()
    page.locator(".pg-compare .ui-card:last-child[aria-busy=false]", has_text="sport").wait_for()
    with router.using(EXPERTS[0]):
        alone = plain_answer(router, prompt, 64)[1].strip()
    assert page.locator(".pg-compare .ui-card").last.locator(".pg-text").text_content() == (alone or "(nothing)")

    ask(page, "  ")
    page.locator(".ui-message", has_text="no prompt yet").wait_for()
    ask(page, "fox " * 2000)
    page.locator(".ui-message", has_text="too long").wait_for()
    assert page.locator(".ui-heat").count() == 0  # nothing is left of the answer before
    page.get_by_text(EXAMPLES[1], exact=True).click()
    wait_for_tokens(page, EXAMPLES[1])
