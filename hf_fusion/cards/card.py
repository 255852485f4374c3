"""Model cards: facts about a fused model, rendered by a template from ``model_cards/``.

Each publication rewrites the text between the two markers; text outside of them is kept. Whatever comes from the Hub or
from files is escaped before it is put into the card.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_fusion.cards.citations import bibtex, software
from hf_fusion.cards.commands import Commands, measured_columns
from hf_fusion.cards.facts import CardFacts, card_contents, read_facts
from hf_fusion.cards.markdown import FILTERS, code, fenced, repo_path
from hf_fusion.cards.result_tables import harness_tables, result_tables
from hf_fusion.cards.usage import usage_block
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.harness_results import URL
from hf_fusion.evaluation.results import FRUGAL, FUSED
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.readme import escape_markdown
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.io.files import read_text
from hf_fusion.io.saving import write_file
from hf_fusion.publishing.local_experts import folder_info
from hf_fusion.recipe import Recipe
from hf_fusion.types import CONTENT, ExpertInfo, ModelRef

if TYPE_CHECKING:
    import jinja2
    from huggingface_hub import HfApi

BEGIN, END = "<!-- hf-fusion:begin -->", "<!-- hf-fusion:end -->"
README = "README.md"
TEMPLATES = Path(__file__).with_name("model_cards")


def write_card(folder: str | Path, api: HfApi | None = None) -> Path:
    """Write the README of a static merge before it is published.

    Local models are named without links, and a licence that cannot be computed is left open. Text outside the markers
    of an existing README is kept.

    Args:
        folder: written by `hf_fusion.merge`.
        api: client of the Hub, to read the experts' metadata; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        Path of the README.
    """
    folder = Path(folder)
    recipe = Recipe.load(folder)
    names = [ModelRef.parse_pair(expert.model)[1] for expert in recipe.experts]
    bases = [ModelRef.parse(own.base) for own in recipe.all_stages if own.base]
    inner = [ModelRef.parse_pair(expert.model)[1] for own in recipe.stages.values() for expert in own.experts]
    infos = in_parallel(lambda ref: _read_info(ref, api), [*names, *bases, *inner])
    try:
        license_id = combine({info.id: info.license for info in infos if info.id not in recipe.stages})
    except FusionError:
        license_id = ""
    file = folder / README
    existing = read_text(file) if file.exists() else ""
    card = render_card(read_facts(folder, folder.resolve().name, infos[: len(names)], license_id), existing)
    return write_file(file, card)


def _read_info(ref: ModelRef, api: HfApi | None) -> ExpertInfo:
    """Metadata of a model from the Hub or from its folder; only its name if it cannot be reached."""
    try:
        source = resolve(ref, api)
    except FusionError:
        return ExpertInfo(ref.id, ref.commit or "")
    return folder_info(str(ref)) if source.is_local else read_info(source)


def render_card(facts: CardFacts, existing: str = "") -> str:
    """The README of a fused model.

    Args:
        facts: content of the card.
        existing: the current README. Text outside the markers, and metadata that `facts` does not set, are kept.

    Raises:
        FusionError: the existing README has broken metadata or markers.
    """
    head, body = _split_readme(existing)
    was_rendered = bool(body) and BEGIN in body
    rendered = _metadata(facts)
    if was_rendered:
        head.pop("model-index", None)  # an earlier version's results
    tags = [*rendered["tags"], *(tag for tag in _as_list(head.get("tags")) if tag not in rendered["tags"])]
    metadata = yaml.safe_dump({**head, **rendered, "tags": tags}, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{metadata}---\n{_insert_between_markers(body, _render_body(facts))}"


# option of a static merge → library that loads it
_LIBRARIES = {"adapter": "peft", "sentences": "sentence-transformers"}


# a task's metric in results → its name on the Hub, where it is another
METRICS = {"exact": "exact_match", "tokens": "token_accuracy"}


def _metadata(facts: CardFacts) -> dict[str, Any]:
    """The YAML front matter, which the Hub indexes."""
    named = [ModelRef(expert.id, expert.sha or None) for expert in facts.experts] + (
        [ModelRef.parse_repo(facts.base)] if facts.base else []
    )
    named += map(ModelRef.parse_repo, facts.inputs)
    # of an expert in a checkpoint, the checkpoint's repo
    pinned = [ref.repo for ref in named if ref.revision and not ref.is_content]
    data: dict[str, Any] = {
        "base_model": list(dict.fromkeys(pinned)),
        "library_name": next((name for key, name in _LIBRARIES.items() if facts.options.get(key)), "transformers"),
        "license": facts.license,
        "pipeline_tag": facts.pipeline_tag,
        "tags": list(dict.fromkeys(["hf-fusion", "merge", str(facts.options.get("method", facts.family))])),
        "base_model_relation": "merge" if pinned else "",
    }
    return {key: value for key, value in data.items() if value} | _model_index(facts)


def _model_index(facts: CardFacts) -> dict[str, Any]:
    """The model's own scores as ``model-index`` metadata; empty if it was not evaluated."""
    results = facts.measured
    runs = results.harness if results else []
    measured = [(p, task) for p in results.predictors for task in results.tasks] if results else []
    measured = [(p, task) for p, task in measured if p.kind in (FUSED, FRUGAL) and task.name in p.scores]
    scores = [(score, run) for run in runs for score in run.shown() if score.kind == FUSED]
    if not measured and not scores:
        return {}

    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    rows = [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=task.name,
            dataset_name=task.name,
            dataset_split=task.split,
            dataset_args={"n": task.n},
            metric_type=(metric := METRICS.get(task.metric, task.metric)),
            metric_name=f"{metric} ({predictor.name})",
            metric_value=round(predictor.scores[task.name].score, 4),
        )
        for predictor, task in measured
    ]
    rows += [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=score.dataset or score.task,
            dataset_name=score.task,
            dataset_args={"num_few_shot": score.shots, "n": score.n},
            metric_type=score.metric.partition(",")[0],
            metric_name=f"{score.metric} ({score.shots}-shot)",
            metric_value=round(score.score, 4),
            metric_args=None if score.stderr is None else {"stderr": round(score.stderr, 4)},
            source_name=f"lm-evaluation-harness {run.settings.get('lm_eval', '')}".strip(),
            source_url=URL,
        )
        for score, run in scores
    ]
    return {"model-index": eval_results_to_model_index(facts.repo_id.rpartition("/")[2], rows)}


@cache
def _environment() -> jinja2.Environment:
    """The cards' templates, each compiled once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        autoescape=False,  # Markdown, not HTML: every value goes through one of the filters
    )
    environment.filters |= FILTERS
    return environment


def _render_body(facts: CardFacts) -> str:
    """The text between the markers."""
    contents = card_contents(facts.family)
    template = _environment().get_template(f"{facts.family}.md.j2")
    commands, options = Commands(facts), facts.options
    paper, title = contents.paper(options)
    entries = [bibtex(paper, title), software(facts.versions.get("hf_fusion", ""))]
    text = template.render(
        facts=facts,
        options=options,
        name=escape_markdown(facts.name),
        task=escape_markdown(facts.pipeline_tag.replace("-", " ")),
        results=result_tables(facts),
        harness=harness_tables(facts),
        command=code(facts.results["command"]) if facts.results and facts.results.get("command") else "",
        machine=escape_markdown(facts.results.get("machine")) if facts.results else "",
        install=fenced(commands.install, "sh"),
        usage=fenced(usage_block(facts), "python"),
        files=f"{repo_path(facts.repo_id)}/tree/{facts.revision or 'main'}" if "/" in facts.repo_id else "",
        modeling=next((name for name in facts.code if name.startswith("modeling_")), ""),
        measure=fenced(commands.measure, "sh"),
        columns=measured_columns(facts),
        recipe=fenced(facts.recipe, "yaml"),
        rebuild=fenced(commands.rebuild, "sh"),
        folders=" and folders, once it names their paths" if f"@{CONTENT}" in facts.recipe else "",
        versions=escape_markdown(_versions(facts)),
        paper=paper,
        paper_title=title,
        citation=fenced("\n\n".join(filter(None, entries)), "bibtex"),
        **contents.view(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _versions(facts: CardFacts) -> str:
    """Which versions of which libraries wrote what, in words."""
    wrote = {
        "hf_fusion": "This card was written by hf_fusion",
        "transformers": "the weights were saved by transformers",
    }
    return ", ".join(f"{words} {facts.versions[name]}" for name, words in wrote.items() if name in facts.versions)


def _split_readme(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a README."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        return {}, text.strip()
    try:
        head = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise FusionError(
            f"the metadata of {README} is not valid YAML: {' '.join(str(error).split())}", "correct it"
        ) from None
    if not isinstance(head, dict):
        raise FusionError(f"the metadata of {README} is not a mapping of names to values", "correct it")
    return head, text[match.end() :].strip()


def _insert_between_markers(body: str, rendered: str) -> str:
    """The body with the text between its markers replaced; without markers, the text comes first."""
    block = f"{BEGIN}\n{rendered}\n{END}"
    begins = [match.start() for match in re.finditer(rf"^{re.escape(BEGIN)}\s*$", body, re.MULTILINE)]
    ends = [match.end() for match in re.finditer(rf"^{re.escape(END)}\s*$", body, re.MULTILINE)]
    if not begins and not ends:
        return f"{block}\n\n{body}\n" if body else f"{block}\n"
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise FusionError(
            f"{README} has {len(begins)} begin and {len(ends)} end markers instead of one each",
            hint=f"keep one {BEGIN} and, after it, one {END}, or remove all of them",
        )
    before, after = body[: begins[0]].strip(), body[ends[0] :].strip()
    return "\n\n".join(part for part in (before, block, after) if part) + "\n"


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
