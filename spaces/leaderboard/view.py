"""The state of the page, all of it in its address: a suite, a view of it, filters and an order."""

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
    """The state of the page.

    Attributes:
        suite: its name.
        show: a key of `SHOWS`.
        split: which experts are fused.
        tasks: "held-in" or "held-out" tasks alone; "" for both.
        condition: of the rows: clean, or a corruption and its severity.
        family: of the methods; "" for all.
        variant: of the methods; "" for all.
        find: text that the names of methods contain.
        sort: the key of a column, best first, or with a minus worst first; "" for the table's main column.
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
        """The view of an address, and its suite; values that the suite does not have become the default.

        Without a suite in the address it is the one with the most methods.
        """
        query_values = dict(parse_qsl(query.removeprefix("?"), errors="replace"))
        largest = max(suites, key=lambda suite: len({row.method for row in suite.rows}))
        suite = next((suite for suite in suites if suite.name == query_values.get("suite")), largest)
        allowed: dict[str, Any] = {key: {value for value, _ in pairs} for key, pairs in choices(suite).items()}
        allowed["show"] = SHOWS
        valid = {
            key: query_values[key]
            for key in (field.name for field in fields(cls))
            if key in query_values and (key not in allowed or query_values[key] in allowed[key])
        }
        find = valid.pop("find", "")[:MOST_CHARACTERS]
        view = cls(**{**valid, "suite": suite.name, "find": find})
        return replace(view, split=view.split if view.split in suite.splits else suite.splits[0]), suite

    def to_query(self, **changes: str) -> str:
        """The address of this view with some changes; values equal to their default are left out."""
        new = replace(self, **changes)
        values = {field.name: getattr(new, field.name) for field in fields(self)}
        return "?" + urlencode(
            {key: value for key, value in values.items() if key == "suite" or value != _DEFAULTS[key]}
        )

    def has(self, row: Row) -> bool:
        """Whether a row passes the filters; those for family and variant keep all floors and ceilings."""
        return (
            (not self.family or row.part != "fused" or row.family == self.family)
            and (not self.variant or row.part != "fused" or row.variant == self.variant)
            and self.find.strip().casefold() in f"{row.full_title} {row.method}".casefold()
        )


_DEFAULTS = {field.name: field.default for field in fields(View)}

# the filters of each view; the values of others stay in the address
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
    """Filter → pairs of a value and its title; a single pair if there is nothing to choose."""
    families = {row.family: row.section for row in suite.rows if row.part == "fused"}
    variants = dict.fromkeys(row.variant for row in suite.rows if row.part == "fused")
    groups = [group for group in GROUPS if any(groups.get(group) for groups in suite.groups.values())]
    return {
        "split": [(split, split_title(split)) for split in suite.splits],
        "tasks": _any("All", {group: GROUPS[group] for group in groups}),
        "condition": [(condition, condition_title(condition)) for condition in suite.conditions],
        "family": _any("All", families),
        "variant": _any("Default and tuned", {variant: variant.capitalize() for variant in variants}),
    }


def _any(title: str, values: Mapping[str, str]) -> list[tuple[str, str]]:
    """A pair for all values, then one pair each if there are several."""
    return [("", title), *(values.items() if len(values) > 1 else ())]


def split_title(split: str) -> str:
    """A split in words."""
    return "All experts" if split == ALL else f"Split {split}"


def condition_title(condition: str) -> str:
    """gaussian_noise:3 as "Gaussian noise, severity 3"."""
    name, _, severity = condition.partition(":")
    name = name.replace("_", " ").capitalize()
    return f"{name}, severity {severity}" if severity else name
