"""Model cards: facts about a fused model, rendered by a template from ``model_cards/``.

Each publication rewrites the text between the two markers; text outside of them is kept. Whatever comes from the Hub or
from files is escaped before it is put into the card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_fusion.cards.contents import CONTENTS, CardContents
from hf_fusion.cards.static_merge import MERGE, MERGE_CONTENTS, pipeline_tag
from hf_fusion.cards.usage import usage_block
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.results import FRUGAL, FUSED, RESULTS_FILE, Results
from hf_fusion.families import FAMILIES
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.readme import escape_markdown
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.task_heads import HEADS, auto_class_of, head_of_adapter
from hf_fusion.io.files import read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.io.saving import write_file
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.publishing.local_experts import folder_info
from hf_fusion.recipe import Recipe
from hf_fusion.types import CONTENT, ExpertInfo, ModelRef

if TYPE_CHECKING:
    import jinja2
    from huggingface_hub import HfApi

    from hf_fusion.evaluation.intervals import Score
    from hf_fusion.evaluation.results import Results

BEGIN, END = "<!-- hf-fusion:begin -->", "<!-- hf-fusion:end -->"
README = "README.md"
TEMPLATES = Path(__file__).with_name("model_cards")
NO_BREAK_SPACE, NO_BREAK_DASH = "\u00a0", "–\u2060"


@dataclass(frozen=True)
class CardExpert:
    """One expert on the card: ``cost`` is its share of the cost of all experts, ``gates`` how its gates were made."""

    id: str
    sha: str
    task: str | None = None
    license: str | None = None
    labels: tuple[str, ...] = ()
    cost: float | None = None
    gates: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """The content of a card, as plain data.

    Attributes:
        repo_id: ``owner/name`` of the published model.
        family: the config's ``model_type`` for the families; "merge" for static merges.
        auto_class: name of the Auto class that loads the model with its head.
        pipeline_tag: its task on the Hub.
        license: licence id; empty if it could not be computed.
        experts: its experts, in the recipe's order.
        recipe: text of ``fusion.yaml``.
        base: ``owner/name@sha`` of the experts' base, or the folder's name.
        revision: commit that the usage block pins; None before the first push.
        results: content of ``results.json``, in any form that `Results.load` reads; None if not evaluated.
        parameters: number of parameters.
        options: settings of the family or the merging method, see `CardContents.options`.
        routing: content of the family's routing map; None without one.
    """

    repo_id: str
    family: str
    auto_class: str
    pipeline_tag: str
    license: str
    experts: tuple[CardExpert, ...]
    recipe: str
    base: str | None = None
    revision: str | None = None
    results: dict[str, Any] | None = None
    parameters: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] | None = None

    @property
    def measured(self) -> Results | None:
        """The results; None if the model was not evaluated."""
        return Results.from_dict(self.results) if self.results else None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CardFacts:
        """The facts in a dict that `dataclasses.asdict` made, also by way of JSON."""
        experts = tuple(CardExpert(**{**expert, "labels": tuple(expert["labels"])}) for expert in content["experts"])
        return cls(**{**content, "experts": experts})


def read_facts(
    folder: Path,
    repo_id: str,
    experts: Sequence[ExpertInfo],
    license_id: str,
    results: Results | Mapping[str, Any] | None = None,
) -> CardFacts:
    """Gather a card's facts from a saved model.

    Args:
        folder: written by `save_fused` or `merge`.
        repo_id: ``owner/name`` of the published model.
        experts: metadata of the recipe's experts, in its order.
        license_id: licence of the model.
        results: `Results` or its dict; None for ``results.json`` in the folder, if it exists.

    Raises:
        FusionError: the results lack fields, or no template is known for the model's type.
    """
    recipe, is_adapter = Recipe.load(folder), (folder / ADAPTER_CONFIG).exists()
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"), str(folder))
    head = head_of_adapter(config) if is_adapter else None
    auto_class = head.auto if head else auto_class_of(config)
    name = MERGE if recipe.method in MERGE_METHODS else str(config.get("model_type"))
    contents = _card_contents(name)
    routing = FAMILIES[name].map if name in FAMILIES else None
    rows = config.get("experts") or [{}] * len(experts)
    total = sum(row.get("cost", 0) for row in rows)
    return CardFacts(
        repo_id=repo_id,
        family=name,
        auto_class=auto_class,
        pipeline_tag=pipeline_tag(config, experts)
        if name == MERGE
        else next(head.tasks[0] for head in HEADS if head.auto == auto_class),
        license=license_id,
        experts=tuple(
            CardExpert(
                info.id,
                info.sha,
                info.task,
                info.license,
                tuple(row.get("labels") or info.labels),
                row["cost"] / total if total else None,
                row.get("gates"),
            )
            for info, row in zip(experts, rows, strict=True)
        ),
        recipe=recipe.to_yaml(),
        base=Path(recipe.base).name if recipe.base and Path(recipe.base).is_absolute() else recipe.base,
        results=_read_results(results, folder, name),
        parameters=_count_parameters(folder),
        options=contents.options(config, folder) | _chat_option(auto_class, folder),
        routing=read_json(folder / routing.data, str(folder)) if routing and (folder / routing.data).exists() else None,
    )


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
    bases = [ModelRef.parse(recipe.base)] if recipe.base else []
    infos = in_parallel(lambda ref: _read_info(ref, api), [*names, *bases])
    try:
        license_id = combine({info.id: info.license for info in infos})
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
    measured = [(p, task) for p in results.predictors for task in results.tasks] if results else []
    measured = [(p, task) for p, task in measured if p.kind in (FUSED, FRUGAL) and task.name in p.scores]
    if not measured:
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
    return {"model-index": eval_results_to_model_index(facts.repo_id.rpartition("/")[2], rows)}


@cache
def _environment() -> jinja2.Environment:
    """The cards' templates, each compiled once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        autoescape=False,  # Markdown, not HTML: every value goes through one of the filters below
    )
    environment.filters |= {
        "md": escape_markdown,
        "code": lambda text: str(text).replace("`", "'").replace("\n", " "),
        "id": _repo_id,
        "linked": _link,
        "commit": _commit,
        "some": _first_names,
        "percent": lambda share: "" if share is None else f"{share:.0%}".replace("%", " %"),
        "millions": lambda count: f"{count / 1e6:,.1f} million",
        "count": "{:,}".format,
        "score": _score,
        "interval": _interval,
        "cell": _table_cell,
    }
    return environment


def _render_body(facts: CardFacts) -> str:
    """The text between the markers."""
    contents = _card_contents(facts.family)
    template = _environment().get_template(f"{facts.family}.md.j2")
    text = template.render(
        facts=facts,
        name=escape_markdown(facts.repo_id.rpartition("/")[2]),
        results=facts.measured,
        usage=_fenced(usage_block(facts), "python"),
        recipe=_fenced(facts.recipe, "yaml"),
        folders=" and folders, once it names their paths" if f"@{CONTENT}" in facts.recipe else "",
        **contents.view(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _card_contents(family: str) -> CardContents:
    if family == MERGE:
        return MERGE_CONTENTS
    if family not in CONTENTS:
        raise FusionError(f"There is no card template for model_type {family!r}.")
    return CONTENTS[family]


def _split_readme(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a README."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        return {}, text.strip()
    try:
        head = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise FusionError(f"The metadata of {README} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(head, dict):
        raise FusionError(f"The metadata of {README} is not a mapping.")
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
            f"{README} has {len(begins)} begin and {len(ends)} end markers.",
            hint=f"leave one {BEGIN} and, after it, one {END}, or neither",
        )
    before, after = body[: begins[0]].strip(), body[ends[0] :].strip()
    return "\n\n".join(part for part in (before, block, after) if part) + "\n"


def _read_results(results: Results | Mapping[str, Any] | None, folder: Path, family: str) -> dict[str, Any] | None:
    """The results as plain data, from the argument or from ``results.json``; None if nothing was measured.

    Raises:
        FusionError: they were measured on one data set, and those of the family are task by task, or the reverse.
    """
    if results is None and not (folder / RESULTS_FILE).exists():
        return None
    if results is None:
        results = Results.load(folder / RESULTS_FILE)
    elif isinstance(results, Mapping):
        results = Results.from_dict(results)
    by_task = family not in FAMILIES or FAMILIES[family].by_task
    if results.pooled == by_task:
        raise FusionError(
            f"The results are not those of a model of the family {family}, which is evaluated "
            f"{'task by task' if by_task else 'on one data set'}.",
            hint="hf-fusion eval writes them",
        )
    return asdict(results)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _first_names(names: Sequence[str], most: int = 6) -> str:
    """The first `most` names, and their count if there are more."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)})"


def _score(score: Score, metric: str) -> str:
    """A score ± half of its interval: in percent, or as it is for the mean squared error."""
    half = (score.ci95[1] - score.ci95[0]) / 2
    if metric == "mse":
        return f"{score.score:.4g} ± {half:.2g}"
    return f"{score.score:.1%} ± {half * 100:.1f}".replace("%", " %")


def _interval(score: Score, form: str = "{:.1f}") -> str:
    """A share in percent with its interval, which may be asymmetric."""
    low, high = (round(100 * end) for end in score.ci95)
    return f"{form.format(100 * score.score)} % ({low}–{high})"


def _table_cell(score: Score) -> str:
    """`_interval` without digits and percent sign, on one line."""
    return _interval(score, "{:.0f}").replace(" %", "").replace(" ", NO_BREAK_SPACE).replace("–", NO_BREAK_DASH)


def _count_parameters(folder: Path) -> int:
    """Number of elements in all tensors, from the files' headers."""
    from hf_fusion.hub.headers import local_shapes

    files = [path.resolve() for path in folder.glob("*.safetensors")]  # a staged folder has links to checked files
    shapes = [shape for file in files for shape in local_shapes(file.parent, [file.name]).values()]
    return sum(map(math.prod, shapes))


def _repo_id(pinned: str) -> str:
    return ModelRef.parse_repo(pinned).id


def _chat_option(auto_class: str, folder: Path) -> dict[str, Any]:
    """The option ``chats`` of a causal language model whose tokenizer has a chat template."""
    if auto_class != "AutoModelForCausalLM":
        return {}
    file = folder / "tokenizer_config.json"
    in_config = file.exists() and bool(read_json(file, str(folder)).get("chat_template"))
    return {"chats": True} if in_config or any(folder.glob("chat_template.*")) else {}


def _link(pinned: str) -> str:
    """A model's name, with a link if it is on the Hub."""
    ref = ModelRef.parse_repo(pinned)
    if ref.is_content or (not ref.revision and (pinned.endswith("@") or "/" not in ref.id)):
        return escape_markdown(ref.id)
    return f"[{escape_markdown(ref.id)}](/{ref.id})"


def _commit(pinned: str) -> str:
    """The commit of a model on the Hub with a link, or the digest of a folder; empty if neither is known."""
    ref = ModelRef.parse_repo(pinned)
    sha = ref.revision or ""
    if ref.is_content:
        return f"a folder, sha256 {sha.removeprefix(CONTENT)[:12]}…"
    return f"[{sha[:7]}](/{ref.id}/tree/{sha})" if sha else ""


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def facts_from_json(path: str | Path) -> CardFacts:
    """The facts of a golden card, from its JSON file."""
    return CardFacts.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
