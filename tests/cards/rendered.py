"""Renders cards to HTML as the Hub does, and lists values that try to inject markup."""

from html.parser import HTMLParser

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_fusion.cards.card import END

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
    "AutoModel",
)
NASTY = "x|y`z` <script>alert(1)</script>\n\n# title\n---\n" + END + " [a](javascript:b) ${c} *d* &amp;"


class Tags(HTMLParser):
    """All tags and links of some HTML."""

    def __init__(self, html):
        super().__init__()
        self.names, self.links = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src")]


def html_of(card):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(ModelCard(card).text)
