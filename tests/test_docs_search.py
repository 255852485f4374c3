"""The site's search: what people ask first is answered by one of the first three pages that it lists."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST = 3

# question, as it is typed -> page that answers it at length
QUESTIONS = {
    "merge two LoRA adapters": "guides/merge/",
    "does it work with Qwen": "questions/",
    "out of memory": "guides/scale/",
    "trust_remote_code safe": "security/",
    "different tokenizers": "guides/foe/",
    "convert mergekit config": "guides/mergekit/",
    "which method should I use": "choose/",
    "how many experts": "questions/",
    "license of merged model": "guides/publish/",
    "push to hub private": "guides/publish/",
    "no internet": "guides/embedded-hub/",
    "GPU": "guides/scale/",
    "vLLM": "guides/serve/",
    "what is a gate": "concepts/",
    "train gates for my adapter": "guides/phatgoose/",
    "evaluate on my data": "guides/measure/",
    "classification models with different labels": "guides/foe/",
    "error incompatible": "reference/errors/",
    "how fast": "benchmark/speed/",
    "cite": "papers/",
}


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The built site's address."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def found(site, browser) -> dict[str, list[str]]:
    """Question -> pages, as the search lists them."""
    page = browser.new_page(base_url=site)
    page.goto(site)
    box, results = page.locator(".md-search__input"), page.locator(".md-search-result__item")
    pages = {}
    for question in QUESTIONS:
        box.click()
        box.fill("")
        box.press("Backspace")  # the search listens to keys
        results.first.wait_for(state="detached", timeout=60_000)
        box.fill(question[:-1])
        box.press_sequentially(question[-1])
        results.first.wait_for(state="attached", timeout=60_000)
        page.wait_for_function("() => document.querySelector('.md-search-result__meta').innerText.match(/matching/)")
        links = results.evaluate_all("items => items.map(item => item.querySelector('a').href)")
        pages[question] = [link.removeprefix(site).partition("?")[0].partition("#")[0] for link in links]
    page.close()
    return pages


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_by_one_of_the_first_pages(question, found):
    assert QUESTIONS[question] in found[question][:FIRST]
