"""What a visitor looks at: a suite, a way to see it, filters, an order. It is the page's address, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from data import ALL, CLEAN, HELD_IN, HELD_OUT, Row, Suite

SHOWS = {
    "scores": "Scores",
    "cost": "Cost",
    "corruptions": "Corruptions",
    "unseen": "Unseen tasks",
}
MOST_CHARACTERS = 200  # of a search
GROUPS = {HELD_IN: "Seen", HELD_OUT: "Unseen"}


@dataclass(frozen=True)
class View:
    """What is shown.

    Attributes:
        suite: its name.
        show: a key of `SHOWS`.
        split: which experts are fused.
        tasks: "held-in" or "held-out" tasks alone; "" for both.
        condition: of the rows: clean, or a corruption and its severity.
        family, variant: of the methods; "" for all.
        find: what the names of methods contain.
        sort: the key of a column, best first, or with a minus worst first; "" for what the table is about.
        row: the key of the row whose recipe is open.
    """

    suite: str
    show: str = "scores"
    split: str = ALL
    tasks: str = ""
    condition: str = CLEAN
    family: str = ""
    variant: str = ""
    find: str = ""
    sort: str = ""
    row: str = ""

    @classmethod
    def from_query(cls, query: str, suites: Sequence[Suite]) -> tuple[View, Suite]:
        """The view of an address, and its suite; what the suite does not have falls back to the default."""
        given = dict(parse_qsl(query.removeprefix("?"), errors="replace"))
        suite = next((suite for suite in suites if suite.name == given.get("suite")), suites[0])
        known: dict[str, Any] = {key: {value for value, _ in own} for key, own in choices(suite).items()}
        known["show"] = SHOWS
        kept = {
            key: given[key]
            for key in (own.name for own in fields(cls))
            if key in given and (key not in known or given[key] in known[key])
        }
        find = kept.pop("find", "")[:MOST_CHARACTERS]
        own = cls(**{**kept, "suite": suite.name, "find": find})
        return replace(own, split=own.split if own.split in suite.splits else suite.splits[0]), suite

    def to_query(self, **changes: str) -> str:
        """The address of this view, or of one that differs from it; without what is the default."""
        new = replace(self, **changes)
        said = {own.name: getattr(new, own.name) for own in fields(self)}
        return "?" + urlencode({key: value for key, value in said.items() if key == "suite" or value != _DEFAULTS[key]})

    def has(self, row: Row) -> bool:
        """Whether a row passes the filters; floors and ceilings stay whatever family is asked for."""
        return (
            (not self.family or row.part != "fused" or row.family == self.family)
            and (not self.variant or row.part != "fused" or row.variant == self.variant)
            and self.find.strip().casefold() in f"{row.full_title} {row.method}".casefold()
        )


_DEFAULTS = {own.name: own.default for own in fields(View)}

# which filters each way to see a suite has; the others are kept for when they apply again
FILTERS = {
    "scores": ("suite", "split", "tasks", "condition", "family", "variant"),
    "cost": ("suite", "condition", "family", "variant"),
    "corruptions": ("suite", "family", "variant"),
    "unseen": ("suite", "tasks", "family", "variant"),
}
LABELS = {
    "suite": "Suite",
    "split": "Fused",
    "tasks": "Tasks",
    "condition": "Condition",
    "family": "Family",
    "variant": "Parameters",
}


def choices(suite: Suite) -> dict[str, list[tuple[str, str]]]:
    """Filter → its values and what they are called; one value where there is nothing to choose."""
    families = {row.family: row.section for row in suite.rows if row.part == "fused"}
    variants = dict.fromkeys(row.variant for row in suite.rows if row.part == "fused")
    groups = [group for group in GROUPS if any(own.get(group) for own in suite.groups.values())]
    return {
        "split": [(split, split_title(split)) for split in suite.splits],
        "tasks": _any("All", {group: GROUPS[group] for group in groups}),
        "condition": [(condition, condition_title(condition)) for condition in suite.conditions],
        "family": _any("All", families),
        "variant": _any("Default and tuned", {variant: variant.capitalize() for variant in variants}),
    }


def _any(title: str, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Any of several values, or one of them; with one alone there is nothing to choose."""
    return [("", title), *(values.items() if len(values) > 1 else ())]


def split_title(split: str) -> str:
    """A split in words."""
    return "All experts" if split == ALL else f"Split {split}"


def condition_title(condition: str) -> str:
    """gaussian_noise:3 as "Gaussian noise, severity 3"."""
    name, _, severity = condition.partition(":")
    name = name.replace("_", " ").capitalize()
    return f"{name}, severity {severity}" if severity else name
