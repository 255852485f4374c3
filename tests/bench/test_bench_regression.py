"""Models that score texts, and the fuser that weighs their scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from standins import moved
from tiny import make_tokenizer, t5
from tiny_suites import as_recorded

from hf_fusion.bench.candidates import TEST, everything
from hf_fusion.bench.cells import CLEAN
from hf_fusion.bench.methods.regression import foe, simple_ensemble, weighted_ensemble
from hf_fusion.bench.rows import single, task_rows
from hf_fusion.bench.run import run_suite
from hf_fusion.bench.setups.regression import LONGEST, RegressionSetup
from hf_fusion.bench.suite import load_suite
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.task_metrics import score

pytestmark = pytest.mark.long  # each runs whole benchmarks

SUITE = """\
title: scores
kind: regression
head: seq2seq-lm
experts: {{likely: {0}/a, fluent: {0}/b, other: {0}/b}}
ask:
  likely: {{prompt: "{{text}}", target: "{{text_pair}}"}}
  fluent: {{prompt: "is it fluent? {{text_pair}}", words: ["yes", "no"]}}
  other: {{prompt: "{{text}} {{text_pair}}", words: ["good", "bad"]}}
defaults:
  data: data:judged
  train: null
  expert: null
  metric: spearman
  fitting: {{split: test, share: 0.5}}
tasks:
  own: {{columns: {{text_pair: summaries, label: own}}}}
  both: {{columns: {{text_pair: summaries, label: both}}}}
"""
WORDS = ["quick", "fox", "expert", "gate", "router", "lazy", "dog", "model", "nine", "jump"]
DOCUMENTS, EACH = 60, 5


def text(generator: torch.Generator, words: int) -> str:
    return " ".join(WORDS[number] for number in torch.randint(len(WORDS), (words,), generator=generator).tolist())


def write(folder: Path, **judged: list[list[float]]) -> None:
    """The rows: documents, summaries of each, and what people said."""
    generator = torch.Generator().manual_seed(0)
    texts = [f"{text(generator, 6)} {number}" for number in range(DOCUMENTS)]
    summaries = [[text(generator, 4) for _ in range(EACH)] for _ in texts]
    nothing = [[0.0] * EACH] * DOCUMENTS
    columns = {"text": texts, "summaries": summaries, "own": nothing, "both": nothing, **judged}
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        Dataset.from_dict(columns).to_parquet(folder / f"{part}.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(suite, data): people judge as one of the experts does, or as the difference of two, with noise."""
    folder = tmp_path_factory.mktemp("scores")
    for name, seed in (("a", 1), ("b", 2)):
        moved(t5(0), seed, by=0.3).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "scores.yaml").write_text(SUITE.format(folder))
    write(folder / "data" / "judged")
    suite = load_suite(folder / "scores.yaml")
    everything_there = Dataset.from_parquet(str(folder / "data" / "judged" / "test.parquet"))
    pairs = [{"text": row["text"], "text_pair": summary} for row in everything_there for summary in row["summaries"]]
    scores = RegressionSetup(suite, folder / "data", 500, 40).scores(Dataset.from_list(pairs))
    scores = (scores - scores.mean(0)) / scores.std(0)
    noise = 0.1 * torch.randn(len(scores), generator=torch.Generator().manual_seed(1))

    def judged(values: torch.Tensor) -> list[list[float]]:
        return (3 + values + noise).view(DOCUMENTS, EACH).tolist()

    write(folder / "data" / "judged", own=judged(scores[:, 1]), both=judged(scores[:, 0] - scores[:, 2]))
    return load_suite(folder / "scores.yaml"), folder / "data"


@pytest.fixture(scope="module")
def setup(made):
    return RegressionSetup(*made, 500, 100)


def test_a_row_of_several_summaries_is_a_row_for_each(made):
    rows = task_rows(made[0], "own", made[1])
    assert len(rows.fit) == len(rows.test) == DOCUMENTS // 2 * EACH
    assert not set(rows.fit["text"]) & set(rows.test["text"])  # all summaries of a document lie in one part
    assert isinstance(rows.test[0]["text_pair"], str) and isinstance(rows.test[0]["label"], float)
    stored = Dataset.from_parquet(str(made[1] / "judged" / "test.parquet"))
    first = next(row for row in stored if row["text"] == rows.test[0]["text"])
    assert rows.test["text_pair"][:EACH] == first["summaries"] and rows.test["label"][:EACH] == first["own"]


def test_rows_with_several_second_texts_are_refused():
    rows = Dataset.from_dict({"text": ["a"], "text_pair": [["b", "c"]], "label": [1.0]})
    with pytest.raises(FusionError, match="list of second texts but a single label"):
        single(rows)


def test_each_text_is_scored_once(made):
    setup, asked = RegressionSetup(*made, 500, 100), []
    scored = setup._scored
    setup._scored = lambda number, rows: asked.append((number, len(rows))) or scored(number, rows)
    rows = setup.sample("own").select(range(20))
    few = setup.scores(rows.select(range(5, 15)))
    assert torch.allclose(setup.scores(rows)[5:15], few)
    setup.scores(setup.sample("both").select(range(20)))
    assert asked == [(number, 10) for _ in range(2) for number in range(3)]


@torch.no_grad()
def test_long_document_is_truncated_and_the_question_kept(setup):
    """T5's positions are relative: its tokenizer's limit, of 64 here, is none of the model's."""
    rows = Dataset.from_list([{"text": "fox " * 3000, "text_pair": "a dog"}])
    read = setup._read(2, rows).rows[0]["input_ids"]
    assert len(read) == LONGEST
    assert setup.experts[2].processor.decode(read).startswith("fox fox")


@torch.no_grad()
def test_scores_are_likelihoods(setup):
    rows = setup.sample("own").select(range(5))
    found = setup.scores(rows)
    tokenizer = make_tokenizer()
    for row, scores in zip(rows, found, strict=True):

        def loss(number: int, prompt: str, target: str) -> torch.Tensor:
            labels = tokenizer(target, return_tensors="pt")["input_ids"]
            inputs = tokenizer(prompt, return_tensors="pt")
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
            return setup.experts[number].model(**given).loss * labels.shape[1]

        target = tokenizer(row["text_pair"])["input_ids"]
        assert scores[0] == pytest.approx(-float(loss(0, row["text"], row["text_pair"])) / len(target), abs=1e-4)
        yes, no = (loss(1, f"is it fluent? {row['text_pair']}", word) for word in ("yes", "no"))
        assert scores[1] == pytest.approx(float((-yes).exp() / ((-yes).exp() + (-no).exp())), abs=1e-4)


def test_fusers_agree_with_people_better_than_a_mean(setup, made):
    split = everything(made[0])

    def agreement(system, task):
        return score(setup.predict(system.prepare(task, CLEAN, TEST)), "spearman").score

    mean, weighted, fused = (made(setup, split, 0) for made in (simple_ensemble, weighted_ensemble, foe))
    assert agreement(fused, "own") > 0.95 and agreement(fused, "both") > 0.9
    assert agreement(fused, "both") > agreement(weighted, "both") > agreement(mean, "both")
    assert fused.parameters == {"fitted_on": DOCUMENTS // 2 * EACH}
    assert fused.stored == sum(setup.experts[number].model.num_parameters() for number in (0, 1))  # two share one


def test_a_run(made, tmp_path):
    cells = run_suite(made[0], ["all"], output=tmp_path, data_dir=made[1], limit=30, tuned_on=20)
    assert {cell.status for cell in cells} == {"measured"}, [cell.reason for cell in cells]
    names = {"expert:likely", "expert:fluent", "expert:other", "simple_ensemble", "weighted_ensemble", "foe"}
    assert {cell.method for cell in cells} == names
    by_name = {(cell.method, cell.task): cell.score for cell in cells}
    assert by_name["expert:fluent", "own"] > 0.9
    as_recorded({(cell.method, cell.variant, cell.task): cell for cell in cells}, "regression")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  other: {prompt", "  nobody: {prompt", "ask needs a question for each expert"),
        ('words: ["good", "bad"]', 'words: ["good"]', "expected two texts"),
        (', words: ["good", "bad"]', "", "either a target or two words"),
        ("{text} {text_pair}", "{summary}", "(?s)has the unknown placeholder {summary}.*use {text} and {text_pair}"),
        ("kind: regression", "kind: fusion", "ask is only for the kind regression"),
        ("  metric: spearman\n", "", "task own: the kind regression measures rank correlation"),
        ("head: seq2seq-lm", "head: causal-lm", "needs encoder-decoders"),
        (
            "tasks:\n  own: {",
            "unseen: {far: {fuse: [own], test: [both]}}\ntasks:\n  own: {expert: likely, ",
            "no task can be unseen",
        ),
    ],
)
def test_invalid_questions_are_reported(made, tmp_path, old, new, said):
    content = made[0].path.read_text()
    assert old in content
    (tmp_path / "wrong.yaml").write_text(content.replace(old, new))
    with pytest.raises(FusionError, match=said):
        load_suite(tmp_path / "wrong.yaml")
