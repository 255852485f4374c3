"""The commands on a card: what to install, how to measure the model, how to make it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from hf_fusion.cards.facts import CardFacts, card_contents
from hf_fusion.cards.static_merge import MERGE
from hf_fusion.cards.usage import usage_block
from hf_fusion.families import FAMILIES
from hf_fusion.recipe import RECIPE_FILE

TRANSFORMERS = "transformers>=5.20,<6"
"""What the families' code runs on: the range that hf_fusion itself requires."""
# import in the usage block → what provides it
_PACKAGES = {"from PIL import": "pillow", "from peft import": "peft"}
# class that loads the model → columns of the rows that it is measured on
_COLUMNS = {
    "AutoModelForCausalLM": ("prompt", "target"),
    "AutoModelForSeq2SeqLM": ("prompt", "target"),
    "AutoModelForSequenceClassification": ("text", "label"),
    "AutoModelForImageClassification": ("image", "label"),
    "AutoModelForSemanticSegmentation": ("image", "label"),
}


def measured_columns(facts: CardFacts) -> tuple[str, ...]:
    """Columns of the rows that ``hf-fusion eval`` needs; empty where it cannot measure such a model."""
    columns = _COLUMNS.get(facts.auto_class, ())
    by_task = facts.family not in FAMILIES or FAMILIES[facts.family].by_task
    return (*columns, "task") if columns and by_task else columns


@dataclass(frozen=True)
class Commands:
    """Commands for a model that is published, or that lies in a folder of the same name."""

    facts: CardFacts

    @property
    def install(self) -> str:
        """What the usage block imports."""
        usage = usage_block(self.facts)
        if "import SentenceTransformer" in usage:
            return "pip install sentence-transformers"
        transformers = "transformers" if self.facts.family == MERGE else shlex.quote(TRANSFORMERS)
        more = [package for line, package in _PACKAGES.items() if line in usage]
        return " ".join(["pip install torch", transformers, *more])

    @property
    def measure(self) -> str:
        """Download the model and evaluate it."""
        consent = " --trust-remote-code" if self.facts.family == MERGE and self.facts.options.get("code") else ""
        return f"{self._download('')}hf-fusion eval {shlex.quote(self.facts.name)} --data ROWS.parquet{consent}"

    @property
    def rebuild(self) -> str:
        """Fuse the experts by the published recipe, and fit what has to be fitted."""
        folder = shlex.quote(f"{self.facts.name}-again")
        lines = [f"{self._download(RECIPE_FILE)}hf-fusion fuse {self._recipe} --output {folder}"]
        family = FAMILIES.get(self.facts.family)
        if family and self.facts.options.get("fitted"):
            words = shlex.join(["--data", "ROWS.parquet", *card_contents(self.facts.family).fit(self.facts.options)])
            lines += [f"hf-fusion fit {part.name} {folder} {words}" for part in family.fit if part.recorded]
        return "\n".join(lines)

    @property
    def _recipe(self) -> str:
        return RECIPE_FILE if self._published else shlex.quote(f"{self.facts.name}/{RECIPE_FILE}")

    @property
    def _published(self) -> bool:
        return "/" in self.facts.repo_id

    def _download(self, file: str) -> str:
        """The line that downloads the repo or one of its files; empty for a folder."""
        if not self._published:
            return ""
        revision = f" --revision {shlex.quote(self.facts.revision)}" if self.facts.revision else ""
        place = "." if file else shlex.quote(self.facts.name)
        what = " ".join(filter(None, (shlex.quote(self.facts.repo_id), file)))
        return f"hf download {what}{revision} --local-dir {place}\n"
