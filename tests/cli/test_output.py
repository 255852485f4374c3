"""`Out`: data on stdout, everything else on stderr, one JSON document per call, bare ids in quiet mode."""

from __future__ import annotations

import io
import json

import pytest

from hf_fusion.cli.output import Out

ROWS = [
    {"id": "me/low", "labels": ("zero", "one"), "MB": 0.5, "rejected": ""},
    {"id": "me/h\x1b[31migh", "labels": (), "MB": 12.0, "rejected": "pickle"},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def speak(mode: str, stream: type[io.StringIO] = io.StringIO) -> Out:
    return Out(mode, stream(), stream())


def said(out: Out) -> tuple[str, str]:
    return out.stdout.getvalue(), out.stderr.getvalue()


def test_a_table_for_people_is_aligned_and_cannot_steer_the_terminal():
    out = speak("human")
    out.table(ROWS, title="Experts")
    text, rest = said(out)
    assert rest == ""
    assert text.splitlines() == [
        "Experts",
        "id               labels       MB  rejected",
        "---------------  ---------  ----  --------",
        "me/low           zero, one   0.5",
        "me/h\\x1b[31migh             12.0  pickle",
    ]


def test_a_table_in_a_terminal_holds_the_same_cells():
    out = speak("human", Terminal)
    out.table(ROWS, title="Experts")
    text, _ = said(out)
    assert all(cell in text for cell in ("Experts", "me/low", "zero, one", "12.0", "pickle", "me/h\\x1b[31migh"))


def test_a_column_that_is_empty_everywhere_is_left_out():
    out = speak("human")
    out.table([{"id": "a", "base": ""}, {"id": "b", "base": None}])
    assert said(out)[0].split() == ["id", "--", "a", "b"]


def test_json_is_one_document_with_raw_values():
    out = speak("json")
    out.table(ROWS)
    assert json.loads(said(out)[0])[1]["MB"] == 12.0
    out = speak("json")
    out.table(ROWS, data={"n": 2})
    assert json.loads(said(out)[0]) == {"n": 2}


def test_quiet_prints_one_column():
    out = speak("quiet")
    out.table(ROWS, key="rejected")
    out.result("Fused", folder="/somewhere", parameters=3)
    out.hint("hf-fusion eval")
    out.log("half way")
    assert said(out) == ("\npickle\n/somewhere\n", "")


@pytest.mark.parametrize("mode", ["human", "json", "quiet"])
def test_warnings_and_errors_always_reach_stderr(mode):
    out = speak(mode)
    out.warning("no label 'nine'")
    out.error("it is gone", "look elsewhere")
    text, rest = said(out)
    assert text == ""
    assert rest.splitlines() == ["Warning: no label 'nine'", "Error: it is gone", "  → look elsewhere"]


def test_human_only_tables_are_hidden_in_other_modes():
    for mode, shown in {"human": True, "json": False, "quiet": False}.items():
        out = speak(mode)
        out.table(ROWS, human_only=True)
        assert bool(said(out)[0]) is shown


def test_colour_only_on_a_terminal():
    for stream, coloured in {io.StringIO: False, Terminal: True}.items():
        out = speak("human", stream)
        out.error("red")
        assert ("\x1b[31m" in said(out)[1]) is coloured


def test_empty_table_prints_none():
    out = speak("human")
    out.table([], title="Experts")
    assert said(out)[0] == "Experts: none\n"


def test_tables_are_rounded_and_json_is_complete():
    data = {
        "accuracy": 0.8430769443511963,
        "loss": 1.2345678e-05,
        "seconds": 12.0,
        "mb": 123456.789,
        "rows": {"sums": 3, "share": 0.333333},
        "scores": [0.123456, 2],
        "frugal": True,
        "bad": float("nan"),
        "zero": 0,
        "missing_labels": [],
        "cost_weight": None,
        "note": "",
        "more": {},
    }
    out = speak("human")
    out.result("Fitted", **data)
    assert [line.split(maxsplit=1) for line in said(out)[0].splitlines()] == [
        ["✓", "Fitted"],
        ["accuracy", "0.8431"],
        ["loss", "1.235e-05"],
        ["seconds", "12.0"],
        ["mb", "123456.8"],
        ["rows", "sums 3, share 0.3333"],
        ["scores", "0.1235, 2"],
        ["frugal", "yes"],
        ["bad", "nan"],
        ["zero", "0"],
    ]
    out = speak("json")
    out.result("Fitted", **{**data, "bad": 1.5})
    assert json.loads(said(out)[0]) == {**data, "bad": 1.5}
    out = speak("quiet")
    out.dict(data)
    assert said(out)[0] == "0.8430769443511963\n"


def test_table_numbers_are_rounded_like_results():
    for stream in (io.StringIO, Terminal):
        out = speak("human", stream)
        out.table([{"id": "a", "score": 0.8430769443511963}])
        assert "0.8431" in said(out)[0]
        assert "0.84307" not in said(out)[0]
