"""WEMoE: give an input to a published model, see how its layers were merged for it, and compare other merges.

    MODEL_ID=owner/name MODEL_REVISION=<commit> TRUST_REMOTE_CODE=true python app.py

It needs nothing but gradio, transformers and torch, and loads any classifier or language model by its id.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import batch
import gradio as gr
import page
import plots
from gradio.utils import get_upload_folder
from model import CONSTANT, MOST_CHARACTERS, ROUTED, Answer, Example, Served, Weights, load
from PIL import Image
from shared.blocks import launch, refused, reported, show_about, show_load_error
from shared.errors import InputError, LoadError
from shared.page import message
from shared.picture_input import picture
from shared.settings import on_gpu, read_settings
from shared.uploads import read_picture, to_data_url

PAPER = ("Merging Multi-Task Models via Weight-Ensembling Mixture of Experts", "2402.00433")
FOLDER = Path(__file__).parent
SETTINGS = read_settings("hf-fusion/wemoe-minilm")
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
HOUR = 3600  # seconds that a visitor's files are kept
MOST_ROWS = {"text": 256, "image": 64, "language": 16}  # of a batch
THUMBNAIL = 160  # pixels of the picture beside an answer
EMPTY = {
    "text": "Write something, or pick an example.",
    "image": "Upload a picture, or pick an example.",
    "language": "Write a prompt, or pick an example.",
}


@cache
def served() -> Served:
    """The model, loaded once."""
    return load(SETTINGS)


@on_gpu
def ask(examples: list[Example], task: int, weights: Weights) -> list[Answer]:
    """Runs the model; the only function that needs a GPU."""
    return served().answer(examples, task, weights)


def task_index_of(task: Any) -> int | None:
    """Index of the expert whose classification head is used, from its index or name; None if all share one head.

    Raises:
        InputError: there is no such expert.
    """
    model = served()
    if not model.has_heads:
        return None
    if task in (None, ""):
        return model.model.experts.index(model.model.config.default_task)
    known = {name: i for names in (model.names, model.model.experts) for i, name in enumerate(names)}
    if isinstance(task, str) and task in known:
        return known[task]
    if not isinstance(task, int) or not 0 <= task < len(model.names):
        raise InputError(f"There is no expert {task}; there are {', '.join(model.names)}.")
    return task


def read_input(*inputs: Any) -> Example:
    """An example from the inputs of the page or the API: a text and perhaps a second one, or a picture."""
    if served().kind == "image":
        return Example(image=None if inputs[0] is None else read_picture(inputs[0]))
    text, pair = (*inputs, None)[:2]
    return Example((text or "").strip(), (pair or "").strip())


def predict(*arguments: Any) -> dict[str, Any]:
    """Runs the model on one input.

    Args:
        arguments: a text (and a second one, for pairs) or a picture; then the name of the expert whose classification
            head is used, if each has one; by default the model's default task.

    Returns:
        model and revision; answer; probabilities by label (empty for regressions and language models); coefficients,
        with experts, the constant of task arithmetic, a coefficient for each expert by layer, and their means; and
        alone, the answers of task arithmetic and of each expert alone.
    """
    with refused():
        *inputs, task = arguments
        example, task_index = read_input(*inputs), task_index_of(task)
        served().check(example)
    [answer] = ask([example], task_index or 0, ROUTED)
    assert answer.coefficients is not None
    others: list[Weights] = [CONSTANT, *range(len(served().names))]
    texts = [ask([example], task_index or 0, weights)[0].text for weights in others]
    return {
        "model": served().id,
        "revision": served().sha,
        "answer": answer.text,
        "probabilities": dict(zip(answer.labels, answer.probabilities, strict=True)),
        "coefficients": answer.coefficients.to_data(),
        "alone": dict(zip(["task arithmetic", *served().names], texts, strict=True)),
    }


# ---------------------------------------------------------------- callbacks of the page


def run(*arguments: Any) -> tuple[str, str, tuple[Example, int | None] | None]:
    """Answer and coefficients; and the input and the index of the expert whose classification head was used."""
    model, (*inputs, task) = served(), arguments
    try:
        example, task_index = read_input(*inputs), task_index_of(task)
        model.check(example)
    except InputError as error:
        empty = not any(inputs)
        return message("No input yet", EMPTY[model.kind]) if empty else _failed(error), "", None
    [answer] = _answers([example], task_index or 0, ROUTED)
    assert answer.coefficients is not None
    head = "" if task_index is None else model.names[task_index]
    return (
        page.answer_panel(answer, head, thumbnail(example.image)),
        plots.coefficients_panel(answer.coefficients, task_index, model.smile),
        (example, task_index),
    )


def compare(current: tuple[Example, int | None] | None) -> Iterator[str]:
    """Answers to the same input by one constant and by each expert alone; for language models, one after the other."""
    if current is None:
        yield ""
        return
    model, (example, task_index) = served(), current
    by_weights: dict[Weights, Answer] = {}
    others: list[Weights] = [CONSTANT, *range(len(model.names))]

    def shown() -> str:
        alone = [by_weights.get(expert) for expert in range(len(model.names))]
        return page.others(model.names, by_weights.get(CONSTANT), alone, task_index, model.constant, model.smile)

    for weights in others:
        if model.kind == "language":  # classifiers are fast
            yield shown()
        [by_weights[weights]] = _answers([example], task_index or 0, weights)
    yield shown()


def _answers(examples: list[Example], task: int, weights: Weights) -> list[Answer]:
    """Calls `ask` and reports its errors on the page."""
    with reported():
        return ask(examples, task, weights)


def _failed(error: InputError) -> str:
    return message("Invalid input", str(error))


def run_batch(lines: Any, file: Any, task: Any) -> tuple[Any, Any]:
    """The table of many answers and its download."""
    model, nothing = served(), gr.DownloadButton(interactive=False)
    try:
        if model.kind == "image":
            examples = batch.read_pictures(file)
        else:
            examples = batch.read_csv(file) if file else batch.read_lines(lines)
        if not examples:
            return message("No input yet", "Enter some inputs, one per line or as files."), nothing
        if len(examples) > (most := MOST_ROWS[model.kind]):
            raise InputError(f"There are {len(examples):,} inputs; at most {most:,} are allowed.")
        task_index = task_index_of(task)
        for number, example in enumerate(examples, 1):
            try:
                model.check(example)
            except InputError as error:
                raise InputError(f"Input {number}: {error}") from error
    except InputError as error:
        return _failed(error), nothing
    answers = _answers(examples, task_index or 0, ROUTED)
    head = "" if task_index is None else model.names[task_index]
    cells = partial(plots.heat_cells, constant=model.constant)
    path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / "answers.csv"
    path.write_text(batch.to_csv(examples, answers, head), encoding="utf-8")  # Gradio deletes it with its cache
    return page.table(model.names, examples, answers, cells, head), gr.DownloadButton(value=path, interactive=True)


def thumbnail(image: Image.Image | None) -> str:
    """A small picture as a data URL, "" for none."""
    if image is None:
        return ""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return to_data_url(small)


# ---------------------------------------------------------------- the page


def build() -> gr.Blocks:
    """The page of the model named by MODEL_ID, or a page that says why it cannot be served."""
    with gr.Blocks(title="WEMoE", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        try:
            model = served()
        except LoadError as error:
            show_load_error(error, "a published WEMoE")
            show_about(*PAPER)
            return blocks
        facts = model.model.summary()
        head = page.header(model.id, model.url, model.sha, len(model.names), len(facts["units"]), model.smile)
        gr.HTML(head, apply_default_css=False)
        with gr.Tabs():
            with gr.Tab("One input"):
                _one_input(blocks, model)
            with gr.Tab("Many inputs"):
                _many_inputs(model)
            with gr.Tab("Parts"):
                panel = page.facts_panel(model.model.config, facts, model.parts(), model.expert_urls)
                gr.HTML(panel, apply_default_css=False)
        show_about(*PAPER, model.url)
        _api(model)
    return blocks


def _task(model: Served) -> gr.components.Component:
    """The choice of a classification head; hidden if all experts share one."""
    if not model.has_heads:
        return gr.State(None)
    return gr.Dropdown(
        [(f"{number} {name}", number - 1) for number, name in enumerate(model.names, 1)],
        value=task_index_of(model.examples[0].task if model.examples else None),
        label="Task",
        info="The expert whose classification head is used",
    )


def _one_input(blocks: gr.Blocks, model: Served) -> None:
    """One input, its answer, its coefficients, and the answers of other merges."""
    first = model.examples[0] if model.examples else Example()
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Row(elem_classes="ui-top"):
        with gr.Column(scale=4, min_width=300):
            task = _task(model)
            components = _inputs(model, first)
            button = gr.Button("Run", variant="primary")
            examples = _examples(model)
        with gr.Column(scale=8, min_width=300):
            answer = gr.HTML(page.busy(), apply_default_css=False)
            others = gr.HTML("", apply_default_css=False)
    merged_from = gr.HTML("", apply_default_css=False)
    current = gr.State(None, time_to_live=HOUR)

    def pick(row: int) -> tuple[Any, ...]:
        example = model.examples[row]
        values = [example.image] if model.kind == "image" else [example.text, example.pair][: len(components)]
        task_index = task_index_of(example.task) if example.task in [*model.names, *model.model.experts] else gr.skip()
        return (*values, task_index)

    inputs, outputs = [*components, task], [answer, merged_from, current]
    user_events = [button.click, *([task.input] if model.has_heads else [])]
    triggers = [blocks.load, *user_events, *(box.submit for box in components if isinstance(box, gr.Textbox))]
    if examples is not None:
        user_events.append(examples.click)
        triggers.append(examples.click(pick, examples, inputs, **hidden).success)
    compared = []
    for trigger in triggers:
        begun = trigger(
            page.busy, None, answer, queue=False, **hidden
        )  # shown at once, even while others wait in the queue
        ran = begun.then(run, inputs, outputs, **ONE_AT_A_TIME, **hidden)
        compared.append(ran.success(compare, current, others, **ONE_AT_A_TIME, **hidden))
    gr.on(user_events, None, cancels=compared)


def _inputs(model: Served, first: Example) -> list[Any]:
    """The components for one input."""
    if model.kind == "image":
        return [picture(value=first.image, label="Picture", sources=["upload", "clipboard"], height=280)]
    language = model.kind == "language"
    text = gr.Textbox(
        first.text,
        label="Prompt" if language else "Text",
        lines=4,
        max_length=MOST_CHARACTERS,
        placeholder="Write something …",
    )
    if language:
        return [text]
    pair = gr.Textbox(
        first.pair,
        label="Second text",
        info="For tasks on pairs of texts; leave empty otherwise",
        lines=1,
        max_length=MOST_CHARACTERS,
    )
    return [text, pair]


def _examples(model: Served) -> gr.Dataset | None:
    """Examples to click; the event has the index of the example."""
    if not model.examples:
        return None
    tasks = {name: number for names in (model.names, model.model.experts) for number, name in enumerate(names)}

    def name(example: Example) -> str:
        task = f"{model.names[tasks[example.task]]}: " if example.task in tasks else ""
        return f"{task}{batch.shown(example)}"

    return gr.Dataset(
        label="Examples",
        components=[gr.Textbox(visible=False)],
        samples=[[name(example)] for example in model.examples],
        type="index",
    )


def _many_inputs(model: Served) -> None:
    """Many inputs, a table of answers, and the same as CSV."""
    lines: Any = gr.State("")
    with gr.Row(elem_classes="ui-top"):
        with gr.Column(scale=4, min_width=300):
            task = _task(model)
            if model.kind == "image":
                file = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=180)
            else:
                tab = "Separate a second text by a tab; or upload" if model.kind == "text" else "Or use"
                start = "\n".join("\t".join(filter(None, (e.text, e.pair))) for e in model.examples)
                lines = gr.Textbox(start, label="Texts, one per line", info=f"{tab} a CSV file below", lines=8)
                columns = "text and text_pair" if model.kind == "text" else "text"
                file = gr.File(label=f"CSV with the columns {columns}", file_types=[".csv"], height=160)
            button = gr.Button("Run all", variant="primary")
            download = gr.DownloadButton("Download the table (CSV)", size="sm", interactive=False)
        with gr.Column(scale=8, min_width=300):
            most = f"At most {MOST_ROWS[model.kind]:,} are allowed."
            empty = message("No input yet", "Enter some inputs, then select Run all.", most)
            table = gr.HTML(empty, apply_default_css=False)
    button.click(
        run_batch,
        [lines, file, task],
        [table, download],
        api_visibility="private",
        show_progress_on=table,
        **ONE_AT_A_TIME,
    )


def _api(model: Served) -> None:
    """The API's only endpoint."""
    with gr.Row(visible=False):
        if model.kind == "image":
            components: list[Any] = [picture(label="picture")]
        else:
            components = [gr.Textbox(label="text")] + ([gr.Textbox(label="text_pair")] if model.kind == "text" else [])
        components.append(gr.Textbox(label="task"))
        gr.Button().click(predict, components, gr.JSON(label="answer"), api_name="predict", **ONE_AT_A_TIME)


demo = build()

if __name__ == "__main__":
    launch(demo, FOLDER / "style.css")
