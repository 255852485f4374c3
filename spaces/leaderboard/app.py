"""A leaderboard of FusionBench: all fusion methods on all suites, with intervals, costs, recipes and commands.

    RESULTS_DATASET=owner/name python app.py

It needs nothing but gradio, and reads the `leaderboard.json` that `hf-fusion bench report` writes.
"""

from __future__ import annotations

import logging
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import page
from data import FILE, BrokenError, EmptyError, Suite, read
from shared.blocks import launch, show_about
from tables import table_of, to_csv
from view import View

logger = logging.getLogger(__name__)

PAPER = ("FusionBench: A Comprehensive Benchmark of Deep Model Fusion", "2406.03280")
FOLDER = Path(__file__).parent
RESULTS_FILE = os.environ.get("RESULTS_FILE") or str(FOLDER / FILE)
RESULTS_DATASET = os.environ.get("RESULTS_DATASET", "")
RESULTS_REVISION = os.environ.get("RESULTS_REVISION") or None
REFRESH = 300  # seconds after which the results are read again


@lru_cache(maxsize=1)
def _read(_: int) -> list[Suite]:
    return read(RESULTS_FILE, RESULTS_DATASET, RESULTS_REVISION)


def suites() -> list[Suite]:
    """The measured suites."""
    return _read(int(time.time() // REFRESH))


def show(query: str) -> str:
    """The page of an address, or a message if there are no results."""
    try:
        measured = suites()
    except EmptyError as error:
        return page.empty(str(error))
    except BrokenError as error:
        logger.error("%s", error)
        return page.broken(str(error))
    return page.header(measured) + page.board(measured, query)


def opened(request: gr.Request) -> str:
    """The page of the address that a visitor opened."""
    return show(f"?{request.query_params}")


def chosen(event: gr.EventData) -> str:
    """The page of the address that a visitor went to."""
    query = event._data.get("query") if isinstance(event._data, dict) else None
    return show(query if isinstance(query, str) else "")


def table(query: str = "") -> str:
    """A table of the leaderboard as CSV.

    Args:
        query: of the page's address, such as "?suite=minilm-8&show=cost".

    Returns:
        The table at that address, with all digits, intervals in separate columns, and reasons in the last one.
    """
    try:
        view, suite = View.from_query(query, suites())
    except (EmptyError, BrokenError) as error:
        raise gr.Error(str(error)) from error
    return to_csv(table_of(suite, view))


def build() -> gr.Blocks:
    """The page."""
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
    with gr.Blocks(title="Leaderboard of model fusion", analytics_enabled=False) as blocks:
        script = (FOLDER / "board.js").read_text(encoding="utf-8")
        board = gr.HTML("", js_on_load=script, apply_default_css=False)
        blocks.load(opened, None, board, **private)
        board.select(chosen, None, board, trigger_mode="always_last", **private)
        show_about(*PAPER)
        gr.api(table, api_name="table")
    return blocks


demo = build()

if __name__ == "__main__":
    # without server-side rendering, which would take over the browser's history that board.js uses
    launch(demo, FOLDER / "style.css", ssr_mode=False)
