"""The processor of a FoE whose experts have custom code."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fusion.models.processing_foe import FoEProcessor


class Tokenizing:
    """A tokenizer that saves its code beside itself, as transformers does with custom code."""

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code

    def tokenize(self) -> None:
        """Marks a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / self.name).write_text(self.code)


@pytest.mark.parametrize("name", ["fused.py", "fused_checks.py", "experts_foe.py"])
def test_code_of_a_tokenizer_does_not_replace_the_models(name, tmp_path):
    processors = [Tokenizing("mine.py", "one = 1"), Tokenizing(name, "one = 1")]
    with pytest.raises(ValueError, match=f"different code called {name}: rename"):
        FoEProcessor(processors).save_pretrained(tmp_path)


def test_code_with_other_names_is_saved_at_the_root(tmp_path):
    FoEProcessor([Tokenizing("mine.py", "one = 1"), Tokenizing("yours.py", "two = 2")]).save_pretrained(tmp_path)
    assert (tmp_path / "mine.py").read_text() == "one = 1"
    assert (tmp_path / "yours.py").read_text() == "two = 2"
    assert not list(tmp_path.glob("processor_*/*.py"))
