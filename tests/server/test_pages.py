"""The HTML pages, and hostile cards."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import CommitOperationAdd, get_session

CARD = """---
license: mit
pipeline_tag: text-classification
base_model: base/one
---
# A title

[notes](docs/notes.md) ![plot](plot.png)

| a | b |
|---|---|
| 1 | 2 |
"""
HOSTILE = """# Harmless title
<script>document.title = "owned"</script>
<img src=x onerror="document.title='owned'">
<a href="javascript:document.title='owned'">click</a> <iframe src="/"></iframe>
<svg onload="document.title='owned'"></svg> <form action="//evil"><input name=q></form>
<style>body { display: none }</style> <base href="//evil"> <meta http-equiv=refresh content="0;url=//evil">
<p style="position:fixed" class="top" id="files">text</p> </section></main></body> {{ 7 * 7 }}

[md](javascript:alert(1)) [up](../../../../etc/passwd) [bad](http://[) ![elsewhere](https://evil.example/pixel.png)
<b onclick="document.title='owned'">bold</b> <a href="data:text/html,x">data</a>
"""


def page(hub, path: str):
    return get_session().get(hub.endpoint + path, headers={"Accept": "text/html"}, follow_redirects=True)


@pytest.fixture
def repo(alice) -> str:
    name, api = alice
    api.create_repo(f"{name}/shown")
    files = {"README.md": CARD, "docs/notes.md": "x", "plot.png": "x", "w.bin": "\0" * 2_000_000}
    adds = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    api.create_commit(f"{name}/shown", adds, commit_message="Show <it>")
    api.create_tag(f"{name}/shown", tag="v1")
    return f"{name}/shown"


def test_repo_page(hub, repo, anyone):
    sha = anyone.model_info(repo).sha
    html = page(hub, f"/{repo}").text
    assert "<h1>A title</h1>" in html and "<td>2</td>" in html and "license: mit" not in html
    assert f'href="/{repo}/resolve/{sha}/docs/notes.md"' in html and f'src="/{repo}/resolve/{sha}/plot.png"' in html
    for text in ("license:mit", "base_model:finetune:base/one", "2.0 MB", "Show &lt;it&gt;", "v1", sha[:12]):
        assert text in html, text
    assert page(hub, f"/{repo}/resolve/{sha}/docs/notes.md").text == "x"


def test_other_addresses_lead_to_the_page(hub, alice, repo):
    _, api = alice
    commit = api.upload_file(repo_id=repo, path_or_fileobj=b"2", path_in_repo="second.txt")
    pull = api.upload_file(repo_id=repo, path_or_fileobj=b"3", path_in_repo="third.txt", create_pr=True)
    assert "second.txt" in get_session().get(commit.commit_url, follow_redirects=True).text
    assert "third.txt" in get_session().get(pull.pr_url, follow_redirects=True).text
    assert "second.txt" not in page(hub, f"/{repo}/tree/v1").text
    assert page(hub, f"/{repo}/settings/x").status_code == 404


def test_index(hub, alice, repo):
    name, api = alice
    api.create_repo(f"{name}/rows", repo_type="dataset")
    api.create_repo(f"{name}/unseen", private=True)
    html = page(hub, f"/?q={name}").text
    assert f'href="/{repo}"' in html and "unseen" not in html and "text-classification" in html
    assert re.search(r"Datasets <small>1</small>", html)
    assert f'href="/datasets/{name}/rows"' in page(hub, f"/?q={name}&kind=datasets").text
    assert f'href="/{repo}"' in page(hub, f"/{name}").text
    assert "No models match" in page(hub, "/?q=nothing-of-that-name").text


def test_errors_are_pages_for_browsers_and_json_for_clients(hub):
    for path in ("/no/such", "/nobody", "/datasets/no/such", "/a/b/c/d/e/f"):
        answer = page(hub, path)
        assert answer.status_code == 404 and "<h1>404</h1>" in answer.text, path
        assert get_session().get(hub.endpoint + path, headers={"Accept": "*/*"}).json()["error"]
    assert "&lt;script&gt;" in page(hub, "/%3Cscript%3E").text


def test_hostile_card(hub, alice):
    name, api = alice
    repo = f"{name}/hostile"
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=HOSTILE.encode(), path_in_repo="README.md")
    answer = page(hub, f"/{repo}")
    card = answer.text.split('class="card">')[1].split("</section>")[0]
    assert "Harmless title" in card and "{{ 7 * 7 }}" in card
    assert "<b>bold</b>" in card
    tags = " ".join(re.findall(r"<[^>]*>", card))
    for harm in (
        "script",
        "onerror",
        "onload",
        "onclick",
        "javascript",
        "iframe",
        "form",
        "base",
        "meta",
        "passwd",
        "data:",
    ):
        assert harm not in tags, harm
    assert " id=" not in card and " class=" not in card and " style=" not in card
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "img-src 'self' data:" in policy


@pytest.mark.parametrize("text", ["<b>" * 50_000, "> " * 50_000, "[" * 50_000, "*a " * 50_000, "|a" * 50_000])
def test_resource_exhausting_cards(hub, alice, text):
    name, api = alice
    repo = f"{name}/deep"
    api.create_repo(repo)
    api.upload_file(repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="README.md")
    assert page(hub, f"/{repo}").status_code == 200


def test_files_cannot_act_as_pages(hub, alice):
    name, api = alice
    repo = f"{name}/files"
    api.create_repo(repo)
    html = b"<script>alert(1)</script>"
    for path in ("page.html", "image.svg"):
        api.upload_file(repo_id=repo, path_or_fileobj=html, path_in_repo=path)
        answer = page(hub, f"/{repo}/resolve/main/{path}")
        assert answer.headers["Content-Type"].startswith("text/plain") and answer.content == html
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.browser
def test_in_a_browser(hub, alice, repo, browser):
    """Nothing of a hostile card runs, pages fit a phone, and search works."""
    name, api = alice
    api.create_repo(f"{name}/hostile")
    api.upload_file(repo_id=f"{name}/hostile", path_or_fileobj=HOSTILE.encode(), path_in_repo="README.md")
    for width, scheme in ((1200, "light"), (390, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab = context.new_page()
        foreign = []
        tab.on("request", lambda r, seen=foreign: None if r.url.startswith(hub.endpoint) else seen.append(r.url))
        tab.goto(f"{hub.endpoint}/{name}/hostile")
        assert tab.title() == f"{name}/hostile"
        assert tab.is_visible("text=Harmless title")
        tab.goto(hub.endpoint)
        tab.fill("input[type=search]", repo)
        tab.press("input[type=search]", "Enter")
        tab.click(f"text={repo.split('/')[1]}")
        tab.wait_for_url(f"{hub.endpoint}/{repo}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 21, 27)"}[scheme]
        assert [url for url in foreign if url.startswith("http") and "evil" not in url] == []
        context.close()
