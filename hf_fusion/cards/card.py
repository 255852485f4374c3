"""Model cards: facts about a fused model, rendered by a template from ``model_cards/``.

The text between the two markers is ours and is rewritten by every publish; everything around it belongs to whoever
wrote it. All that comes from the Hub or from files is escaped before it gets into the card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_fusion.cards.contents import CONTENTS
from hf_fusion.cards.parts import CardContents
from hf_fusion.cards.static_merge import MERGE, MERGE_CONTENTS, pipeline_tag
from hf_fusion.cards.usage import usage_block
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.results import FRUGAL, FUSED, RESULTS_FILE, Results
from hf_fusion.families import FAMILIES
from hf_fusion.hub.client import in_parallel
from hf_fusion.hub.discover import read_info
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.heads import HEADS, auto_class_of, head_of_adapter
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.readme import escape_markdown
from hf_fusion.hub.resolve import resolve
from hf_fusion.io.files import read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.io.saving import write_file
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.publishing.local_experts import folder_info
from hf_fusion.recipe import Recipe
from hf_fusion.types import CONTENT, ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from hf_fusion.evaluation.intervals import Score

BEGIN, END = "<!-- hf-fusion:begin -->", "<!-- hf-fusion:end -->"
README = "README.md"
TEMPLATES = Path(__file__).with_name("model_cards")
UNBROKEN, DASH = "\u00a0", "–\u2060"  # a blank and a dash at which no line breaks


@dataclass(frozen=True)
class CardExpert:
    """One expert as the card shows it: ``cost`` as a share of asking all, ``gates`` by where they come from."""

    id: str
    sha: str
    task: str | None = None
    license: str | None = None
    labels: tuple[str, ...] = ()
    cost: float | None = None
    gates: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a card says, as plain data.

    Attributes:
        repo_id: where the model is published.
        family: "foe", or whatever else the config's model_type is; "merge" for static merges.
        auto_class: name of the Auto class that loads it with its head.
        pipeline_tag: its task.
        license: licence id; empty where it could not be computed.
        experts: what it is made of.
        recipe: text of ``fusion.yaml``.
        base: ``owner/name@sha`` of the experts' base, or its name where it is a folder.
        revision: commit that the usage block pins, None before there is one.
        results: what was measured (the content of ``results.json``, in any form that `Results.load` reads), or None.
        parameters: number of parameters.
        options: the family's own settings, from its config.
        routing: what it does with each task (the content of the family's map), or None.
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
        """What was measured, or None."""
        return Results.from_dict(self.results) if self.results else None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CardFacts:
        """From JSON, as `dataclasses.asdict` wrote it."""
        experts = tuple(CardExpert(**{**expert, "labels": tuple(expert["labels"])}) for expert in content["experts"])
        return cls(**{**content, "experts": experts})


def read_facts(
    folder: Path, repo_id: str, experts: Sequence[ExpertInfo], license_id: str, results: Any = None
) -> CardFacts:
    """Gather a card's facts from a saved model.

    Args:
        folder: as `save_fused` wrote it.
        repo_id: where it will be published.
        experts: what the Hub says about the recipe's experts, in its order.
        license_id: the model's licence.
        results: a `Results`, its dict, or None for ``results.json`` in the folder, if there is one.
    """
    recipe, is_adapter = Recipe.load(folder), (folder / ADAPTER_CONFIG).exists()
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"), str(folder))
    head = head_of_adapter(config) if is_adapter else None
    auto_class = head.auto if head else auto_class_of(config)
    name = MERGE if recipe.method in MERGE_METHODS else str(config.get("model_type"))
    contents = _contents(name)
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
        results=_checked_results(results, folder, name),
        parameters=_count_parameters(folder),
        options=contents.options(config, folder) | _chat_option(auto_class, folder),
        routing=read_json(folder / routing.data, str(folder)) if routing and (folder / routing.data).exists() else None,
    )


def write_card(folder: str | Path, api: HfApi | None = None) -> Path:
    """Writes the README beside a static merge: what publishing it will say, as far as it is known before.

    Models that are folders are named, without links; a licence that cannot be computed is left open. Text of an
    earlier README outside of our markers stays.

    Args:
        folder: as `hf_fusion.merge` left it.
        api: the Hub's client, for experts that are ids.
    """
    folder = Path(folder)
    recipe = Recipe.load(folder)
    names = [ModelRef.parse_pair(expert.model)[1] for expert in recipe.experts]
    bases = [ModelRef.parse(recipe.base)] if recipe.base else []
    infos = in_parallel(lambda ref: _info(ref, api), [*names, *bases])
    try:
        license_id = combine({info.id: info.license for info in infos})
    except FusionError:
        license_id = ""
    file = folder / README
    existing = read_text(file) if file.exists() else ""
    card = render_card(read_facts(folder, folder.resolve().name, infos[: len(names)], license_id), existing)
    return write_file(file, card)


def _info(ref: ModelRef, api: HfApi | None) -> ExpertInfo:
    """What the Hub, or a folder's own files, tell about a model; of one that is out of reach, its name."""
    try:
        source = resolve(ref, api)
    except FusionError:
        return ExpertInfo(ref.id, ref.commit or "")
    return folder_info(str(ref)) if source.is_local else read_info(source)


def render_card(facts: CardFacts, existing: str = "") -> str:
    """The README of a fused model.

    Args:
        facts: what to say.
        existing: the present README; its text outside our markers and the metadata we do not set survive.

    Raises:
        FusionError: if the existing README's metadata or markers are broken.
    """
    head, body = _split(existing)
    was_ours = bool(body) and BEGIN in body
    ours = _metadata(facts)
    if was_ours:
        head.pop("model-index", None)  # an earlier version's results
    tags = [*ours["tags"], *(tag for tag in _as_list(head.get("tags")) if tag not in ours["tags"])]
    metadata = yaml.safe_dump({**head, **ours, "tags": tags}, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{metadata}---\n{_insert(body, _render_body(facts))}"


# what an option of a static merge says of the library that reads it
_LIBRARIES = {"adapter": "peft", "sentences": "sentence-transformers"}


# a task's metric in results → its name on the Hub, where it is another
METRICS = {"exact": "exact_match", "tokens": "token_accuracy"}


def _metadata(facts: CardFacts) -> dict[str, Any]:
    """The YAML head: what the Hub indexes."""
    named = [ModelRef(expert.id, expert.sha or None) for expert in facts.experts] + (
        [ModelRef.parse_repo(facts.base)] if facts.base else []
    )
    pinned = [ref.repo for ref in named if ref.revision and not ref.is_content]  # not its number in a checkpoint
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
    """What the model itself scored, in the Hub's form; nothing where nothing was measured."""
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


def _render_body(facts: CardFacts) -> str:
    """The text between our markers."""
    import jinja2

    contents = _contents(facts.family)
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
        "linked": _linked,
        "commit": _commit,
        "some": _some,
        "percent": lambda share: "" if share is None else f"{share:.0%}".replace("%", " %"),
        "millions": lambda count: f"{count / 1e6:,.1f} million",
        "count": "{:,}".format,
        "score": _score,
        "interval": _interval,
        "cell": lambda score: _interval(score, "{:.0f}").replace(" %", "").replace(" ", UNBROKEN).replace("–", DASH),
    }
    template = environment.get_template(f"{facts.family}.md.j2")
    text = template.render(
        facts=facts,
        name=escape_markdown(facts.repo_id.rpartition("/")[2]),
        results=facts.measured,
        usage=_fenced(usage_block(facts), "python"),
        recipe=_fenced(facts.recipe, "yaml"),
        folders=" and folders, once their paths stand in it" if f"@{CONTENT}" in facts.recipe else "",
        **contents.view(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _contents(family: str) -> CardContents:
    if family == MERGE:
        return MERGE_CONTENTS
    if family not in CONTENTS:
        raise FusionError(f"There is no card template for model_type {family!r}.")
    return CONTENTS[family]


def _split(text: str) -> tuple[dict[str, Any], str]:
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


def _insert(body: str, ours: str) -> str:
    """Put our text between the markers of a body; in front of it where it has none."""
    block = f"{BEGIN}\n{ours}\n{END}"
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


def _checked_results(given: Any, folder: Path, family: str) -> dict[str, Any] | None:
    """The measurements as plain data, from what was given or from ``results.json``; None where there are none."""
    if given is None and not (folder / RESULTS_FILE).exists():
        return None
    if given is None:
        results = Results.load(folder / RESULTS_FILE)
    else:
        results = Results.from_dict(given) if isinstance(given, Mapping) else given
    by_task = family not in FAMILIES or FAMILIES[family].by_task
    if results.pooled == by_task:
        raise FusionError(
            f"The results are not of a model of the family {family}, which is measured "
            f"{'task by task' if by_task else 'on one data set'}.",
            hint="hf-fusion eval writes them",
        )
    return asdict(results)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _some(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names)})"


def _score(score: Score, metric: str) -> str:
    """A score with half of its interval: a share in percent, other metrics as they are."""
    half = (score.ci95[1] - score.ci95[0]) / 2
    if metric == "mse":
        return f"{score.score:.4g} ± {half:.2g}"
    return f"{score.score:.1%} ± {half * 100:.1f}".replace("%", " %")


def _interval(score: Score, form: str = "{:.1f}") -> str:
    """A share with its interval, which need not lie evenly around it."""
    low, high = (round(100 * end) for end in score.ci95)
    return f"{form.format(100 * score.score)} % ({low}–{high})"


def _count_parameters(folder: Path) -> int:
    """Elements of all tensors, from the headers."""
    from hf_fusion.hub.headers import local_shapes

    files = [path.resolve() for path in folder.glob("*.safetensors")]  # of a plan, links to files that it has checked
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


def _linked(pinned: str) -> str:
    """A model by its name, as a link where it is on the Hub."""
    ref = ModelRef.parse_repo(pinned)
    if ref.is_content or (not ref.revision and (pinned.endswith("@") or "/" not in ref.id)):
        return escape_markdown(ref.id)
    return f"[{escape_markdown(ref.id)}](/{ref.id})"


def _commit(pinned: str) -> str:
    """The commit of a model on the Hub, or by what the content of a folder is known; empty where neither is."""
    ref = ModelRef.parse_repo(pinned)
    sha = ref.revision or ""
    if ref.is_content:
        return f"a folder, sha256 {sha.removeprefix(CONTENT)[:12]}…"
    return f"[{sha[:7]}](/{ref.id}/tree/{sha})" if sha else ""


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def facts_from_json(path: str | Path) -> CardFacts:
    """Facts as committed beside a golden card."""
    return CardFacts.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
