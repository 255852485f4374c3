"""PHATGOOSE: give a prompt to a published router and see where each linear layer routed each token.

    MODEL_ID=owner/name MODEL_REVISION=<commit> TRUST_REMOTE_CODE=true python app.py

It needs nothing but gradio, transformers and torch, and loads any router of a causal language model by its id.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import page
from gradio.utils import get_upload_folder
from model import BASE, MERGED, MOST_CHARACTERS, ROUTED, Answer, Served, Writer, load
from routing import to_data
from shared.blocks import launch, refused, reported, show_about, show_load_error
from shared.errors import InputError, LoadError
from shared.page import count, message
from shared.settings import on_gpu, read_settings

PAPER = ("Learning to Route Among Specialized Experts for Zero-Shot Generalization", "2402.05859")
FOLDER = Path(__file__).parent
SETTINGS = read_settings("hf-fusion/phatgoose-smollm2")
QUEUE: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}  # two answers at a time
HOUR = 3600  # seconds that a visitor's routing and its file are kept
MOST_CACHED = 48  # answers; decoding is greedy, so equal prompts have equal answers
_cached: dict[tuple[str, Writer], Answer] = {}


@cache
def served() -> Served:
    """The model, loaded once."""
    return load(SETTINGS)


@on_gpu
def ask(prompt: str, writer: Writer) -> Iterator[Answer]:
    """Runs the model; the only function that needs a GPU."""
    yield from served().ask(prompt, writer)


def answers(prompt: str, writer: Writer = ROUTED) -> Iterator[Answer]:
    """Yields a growing answer, or a complete one from the cache; the last one is complete.

    Raises:
        InputError: the prompt is empty or too long.
    """
    answer = _cached.get((prompt, writer))
    if answer:
        yield answer
        return
    for answer in ask(prompt, writer):
        yield answer
    assert answer is not None
    _cached[prompt, writer] = answer
    for oldest in list(_cached)[:-MOST_CACHED]:
        _cached.pop(oldest, None)  # another thread may have removed it meanwhile


def generate(prompt: str) -> dict[str, Any]:
    """Generates an answer to a prompt and returns the routing of every token.

    Args:
        prompt: the question, without the model's template.

    Returns:
        model and revision; prompt and answer; experts; tokens, each with its text, its part (prompt or answer), its
        dominant expert and the weight of that expert; usage, the share of all weight by expert; entropy by linear
        layer; and modules, for each linear layer the experts and weights of each token.
    """
    with refused():
        *_, last = answers(prompt)
    return data_of(last)


def data_of(answer: Answer) -> dict[str, Any]:
    """A complete routed answer, for JSON."""
    assert answer.routing is not None
    head = {"model": served().id, "revision": served().sha, "prompt": answer.prompt, "answer": answer.text}
    return head | to_data(answer.routing)


def trace_file(answer: Answer) -> Path:
    """A complete routed answer as a file to download, which Gradio deletes with its cache."""
    path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "routing.json"
    path.write_text(json.dumps(data_of(answer)), encoding="utf-8")
    return path


# ---------------------------------------------------------------- callbacks of the page


def begin(prompt: str) -> tuple[str, str]:
    """The panels that are shown at once, even while others wait in the queue."""
    return page.streaming(prompt, ""), ""


def run(prompt: str) -> Iterator[tuple[Any, ...]]:
    """Yields answer, state, inspector, overview and download, as the answer grows."""
    names = served().names
    try:
        with reported():
            for answer in answers(prompt):
                if not answer.done:
                    yield page.streaming(answer.prompt, answer.text), None, gr.skip(), gr.skip(), gr.skip()
    except InputError as error:
        title = "Invalid input" if prompt.strip() else "No prompt yet"
        yield message(title, str(error)), None, "", "", gr.DownloadButton(interactive=False)
        return
    routing = answer.routing
    assert routing is not None
    chosen = page.first_choice(routing)
    yield (
        page.answer(routing, names, chosen),
        answer,
        page.inspector(routing, names, chosen),
        page.overview(routing, names),
        gr.DownloadButton(value=trace_file(answer), interactive=True),
    )


def inspect(answer: Answer | None, event: gr.EventData) -> str:
    """The routing of the token that was clicked."""
    token = event._data.get("token") if isinstance(event._data, dict) else None
    if answer is None or answer.routing is None:
        return message("This answer has expired", "Its routing was kept for an hour: run the prompt again.")
    if not isinstance(token, int) or not 0 <= token < len(answer.routing.pieces):
        raise gr.Error(f"There is no token {token}.")
    return page.inspector(answer.routing, served().names, token)


def compare(answer: Answer | None, expert: int) -> Iterator[str]:
    """Yields the answers of the router, the base, the merged experts and one expert to the same prompt, one by one."""
    if answer is None:
        yield ""
        return
    others: list[Writer] = [BASE, MERGED, int(expert)]
    texts: dict[Writer, Answer] = {}
    for writer in others:
        for text in answers(answer.prompt, writer):
            texts[writer] = text
            yield _comparison(answer, others, texts)


def _comparison(answer: Answer, others: list[Writer], texts: dict[Writer, Answer]) -> str:
    names = served().names
    heads: dict[Writer, tuple[str, str]] = {
        BASE: ("Base", "without experts"),
        MERGED: ("Merged", f"the mean of all {count(len(names), 'expert')}, used for every token"),
    }
    rows: list[tuple[str, str, str | None, bool]] = [
        ("PHATGOOSE", "each token routed to its experts", answer.text, True)
    ]
    for writer in others:
        title, note = heads.get(writer) or (names[int(writer)], "this expert alone, used for every token")
        other = texts.get(writer)
        rows.append((title, note, other.text if other else None, bool(other and other.done)))
    return page.comparison(rows)


# ---------------------------------------------------------------- the page


def build() -> gr.Blocks:
    """The page of the router named by MODEL_ID, or a page that says why it cannot be served."""
    with gr.Blocks(title="PHATGOOSE", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        try:
            model = served()
        except LoadError as error:
            show_load_error(error, "a published router")
            show_about(*PAPER)
            return blocks
        facts = model.model.summary()
        head = page.header(model.id, model.url, model.sha, len(model.names), facts["routed_linears"], facts["top_k"])
        gr.HTML(head, apply_default_css=False)
        state = gr.State(None, time_to_live=HOUR)
        with gr.Row(elem_classes="ui-top"):
            with gr.Column(scale=4, min_width=300):
                prompt = gr.Textbox(
                    model.examples[0],
                    label="Prompt",
                    lines=4,
                    max_length=MOST_CHARACTERS,
                    placeholder="Ask something …",
                )
                button = gr.Button("Run", variant="primary")
                examples = gr.Dataset(
                    label="Examples",
                    components=[gr.Textbox(visible=False)],
                    samples=[[example] for example in model.examples],
                    type="values",
                )
            with gr.Column(scale=8, min_width=300):
                script = (FOLDER / "tokens.js").read_text(encoding="utf-8")
                tokens = gr.HTML(page.streaming("", ""), js_on_load=script, apply_default_css=False)
                download = gr.DownloadButton("Download the routing (JSON)", size="sm", interactive=False)
        inspector = gr.HTML("", apply_default_css=False)
        overview = gr.HTML("", apply_default_css=False)
        gr.HTML(page.comparison_head(), apply_default_css=False)
        expert = gr.Dropdown(
            [(f"{number} {name}", number - 1) for number, name in enumerate(model.names, 1)],
            value=model.best,
            label="Expert alone",
            info="Preselected: the expert with the best measured score." if model.measured else None,
        )
        comparison = gr.HTML("", apply_default_css=False)

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        picked = examples.click(lambda row: row[0], examples, prompt, **hidden)
        outputs, inputs = [tokens, state, inspector, overview, download], [state, expert]
        compared = []
        for trigger in (blocks.load, button.click, prompt.submit, picked.success):
            begun = trigger(begin, prompt, [tokens, comparison], queue=False, **hidden)
            ran = begun.then(run, prompt, outputs, **QUEUE, **hidden)
            compared.append(ran.success(compare, inputs, comparison, **QUEUE, **hidden))
        gr.on([button.click, prompt.submit, examples.click], None, cancels=compared)
        expert.input(compare, inputs, comparison, trigger_mode="always_last", **QUEUE, **hidden)
        tokens.select(inspect, state, inspector, trigger_mode="always_last", concurrency_limit=None, **hidden)
        show_about(*PAPER, model.url)
        _api()
    return blocks


def _api() -> None:
    """The API's only endpoint."""
    with gr.Row(visible=False):
        prompt = gr.Textbox(label="prompt")
        gr.Button().click(generate, prompt, gr.JSON(label="routing"), api_name="generate", **QUEUE)


demo = build()

if __name__ == "__main__":
    launch(demo, FOLDER / "style.css")
