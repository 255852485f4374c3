"""Fitting and choosing fusers: constructed outputs whose best fuser is known, and experts that really know a part."""

from __future__ import annotations

import datasets
import pytest
import torch
from tiny import SUMS, bert, gpt2, llama, make_tokenizer
from tiny_halves import LABELS, Halves

from hf_fusion import Expert, FoEModel, FusionError, fit_fuser
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.models.gated_foe import GatedFuser
from hf_fusion.training.fuser_choice import Candidate, candidates, cross_validate
from hf_fusion.training.gated_fit import Design, fit_gated

ROWS, EXPERTS, CLASSES = 240, 3, 4


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


def parts(trusted: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Experts that are all equally sure, of which only the trusted one is right; its number is in every embedding."""
    torch.manual_seed(0)
    found = []
    for expert in range(EXPERTS):
        wrong = (labels + 1 + torch.randint(CLASSES - 1, labels.shape)) % CLASSES
        said = torch.where(trusted == expert, labels, wrong)
        logits = 4.0 * torch.nn.functional.one_hot(said, CLASSES)
        embedding = torch.nn.functional.one_hot(trusted, EXPERTS) + 0.1 * torch.randn(len(labels), EXPERTS)
        found.append(torch.cat([logits, embedding], 1))
    return found


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(most, (ROWS,), generator=generator) for most in (EXPERTS, CLASSES))  # type: ignore[return-value]


def fitted(kind: dict[str, bool], rows: list[torch.Tensor], labels: torch.Tensor, **options) -> GatedFuser:
    fuser = GatedFuser([EXPERTS] * EXPERTS, CLASSES, experts=EXPERTS, **{"selection": False, **kind})
    fit_gated(fuser, rows, labels, penalty=1e-5, design=Design(rows, CLASSES, **options))
    return fuser.eval()


GATING, STACKING = {"gates": True, "labels": False}, {"gates": False, "labels": True}


@torch.no_grad()
def test_gates_learn_whom_to_believe_and_a_linear_stacker_cannot():
    trusted, labels = drawn()
    rows = parts(trusted, labels)
    features = torch.cat(rows, 1)

    def scores(candidate: Candidate, train: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            kind = {"gating": GATING, "stacking": STACKING}[candidate.kind]
            fuser = fitted(kind, [part[train] for part in rows], labels[train])
        return fuser(features[held])

    chosen, compared = cross_validate(candidates(["stacking", "gating"]), ROWS, labels, scores, seed=0)
    assert chosen.kind == "gating"
    best = {each.name.split(",")[0]: each for each in compared}
    assert best["gating"].accuracy == 1.0
    assert best["gating"].loss < best["stacking"].loss - 0.3


@torch.no_grad()
def test_weights_for_directions_become_weights_for_features():
    """A fuser's scores are those that L-BFGS saw: with one penalty-free direction more, nothing is lost in folding."""
    trusted, labels = drawn()
    rows = parts(trusted, labels)
    design = Design(rows, CLASSES)
    weights = torch.randn(design.rows.shape[1], 2)
    fuser = GatedFuser([EXPERTS] * EXPERTS, CLASSES, experts=2, selection=True, gates=True, labels=False)
    for linear, (matrix, bias) in zip(fuser.evidence, design.to_features(weights), strict=True):
        linear.weight.copy_(matrix)
        linear.bias.copy_(bias)
    torch.testing.assert_close(fuser(torch.cat(rows, 1)), design.rows @ weights, rtol=1e-4, atol=1e-4)
    queried = torch.tensor([[True, False, True]]).expand(1, ROWS, -1)
    some = Design(rows, CLASSES, queried)
    found = fuser.combine(fuser.read(torch.cat(rows, 1)), queried[0])
    torch.testing.assert_close(found, some.rows @ weights, rtol=1e-4, atol=1e-4)


def test_the_simplest_within_one_standard_error_is_chosen():
    """Three candidates of which each row's probability of the truth is given: means and errors worked out by hand.

    By row, the second is worse than the third by ln(.8/.7) or better by ln(.9/.8), in turn: mean difference .0079,
    deviation .126, so with 60 rows it is within the error .016. The first is ln 2 worse, always.
    """
    truth = {"a": (0.4, 0.4), "b": (0.7, 0.9), "c": (0.8, 0.8)}

    def scores(candidate: Candidate, train: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        right = torch.tensor([truth[candidate.kind][row % 2] for row in held.tolist()])
        return torch.stack([right, 1 - right], 1).log()

    tried = [Candidate(kind) for kind in truth]
    chosen, compared = cross_validate(tried, 60, torch.zeros(60, dtype=torch.long), scores, seed=0)
    assert chosen.kind == "b"
    assert [each.accuracy for each in compared] == [0.0, 1.0, 1.0]
    assert compared[2].loss == pytest.approx(-torch.tensor(0.8).log().item())
    truth["b"] = (0.6, 0.7)  # now worse on every row
    assert cross_validate(tried, 60, torch.zeros(60, dtype=torch.long), scores, seed=0)[0].kind == "c"


def test_a_fit_chooses_and_reports(halves):
    model = FoEModel.from_experts(halves.experts, fuser_hidden=[16])
    rows = halves.data.select(range(200, 320))
    fit = fit_fuser(model, rows, epochs=3)
    assert fit.fuser == model.config.fuser
    assert {each.name.split(",")[0] for each in fit.compared} == {"stacking", "gating", "gated-stacking", "mlp"}
    assert fit.accuracy == next(e.accuracy for e in fit.compared if e.name.split(",")[0] == fit.fuser)
    assert fit.train_rows == 120
    again = FoEModel.from_experts(halves.experts, fuser_hidden=[16])
    fit_fuser(again, rows, epochs=3)
    state = again.fuser.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.fuser.state_dict().items())
    fit_fuser(model, rows, fuser="mlp", epochs=2)  # another kind replaces it, and its fields
    assert (model.config.fuser, model.config.feature_depths, model.config.reads_embeddings) == ("mlp", None, False)


@pytest.mark.parametrize("kind", ["stacking", "gating", "gated-stacking", "attention"])
def test_each_kind_fits_and_survives_a_folder(kind, halves, tmp_path):
    model = FoEModel.from_experts(halves.experts)
    fit = fit_fuser(model, halves.data.select(range(200, 400)), fuser=kind, epochs=10)
    assert fit.fuser == kind
    assert evaluate(model, halves.data.select(range(400, 600)))["FoE"].only_score.score > 0.9
    model.save_pretrained(tmp_path)
    inputs = model.processor(text=halves.data["text"][400:440])
    with torch.no_grad():
        assert torch.equal(FoEModel.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_what_was_collected_is_what_the_model_reads(halves):
    """The accuracy from collected outputs and that of forwards is one."""
    model = FoEModel.from_experts(halves.experts)
    fit_fuser(model, halves.data.select(range(200, 320)), fuser="gated-stacking")
    rows = halves.data.select(range(400, 600))
    with torch.no_grad():
        predicted = model(**model.processor(text=list(rows["text"]))).logits.argmax(1)
    right = sum(LABELS[label] == wanted for label, wanted in zip(predicted.tolist(), rows["label"], strict=True))
    assert evaluate(model, rows)["FoE"].only_score.score == pytest.approx(right / 200, abs=1e-6)


def test_frugal_finds_the_expert_among_those_without_a_common_label(halves):
    """One expert tells whether it is the one: the other is queried only where it is not."""
    model = FoEModel.from_experts(halves.experts)
    fit_fuser(model, halves.data.select(range(200, 400)), fuser="gating", frugal=True)
    results = evaluate(model, halves.data.select(range(400, 600)))
    frugal = results.best("frugal")
    assert frugal.cost < 0.8
    assert frugal.only_score.score >= results.best("fused").only_score.score - 0.02


def test_frugal_selection_of_classifiers(halves):
    data = halves.data.add_column("expert", [int(LABELS.index(label) > 1) for label in halves.data["label"]])
    model = FoEModel.from_experts(halves.experts, mode="selection")
    fit_fuser(model, data.select(range(200, 400)), frugal=True)
    results = evaluate(model, data.select(range(400, 600)))
    assert results.selection_accuracy > 0.9
    frugal = results.best("frugal")
    assert frugal.cost < 0.8
    assert frugal.only_score.score >= results.best("fused").only_score.score - 0.02


def test_frugal_selection_of_language_models():
    tokenizer = make_tokenizer()
    experts = [Expert("me/llama", llama(5), processor=tokenizer), Expert("me/gpt2", gpt2(6, 300), processor=tokenizer)]
    texts = [("the quick brown fox", "a stitch in time")[row % 2] + " " + "dog" * (row % 5) for row in range(48)]
    rows = datasets.Dataset.from_dict({"prompt": texts, "expert": [row % 2 for row in range(48)]})
    model = FoEModel.from_experts(experts, mode="selection", costs=[1.0, 3.0])
    fit = fit_fuser(model, rows, frugal=True)
    assert fit.accuracy == 1.0
    inputs = model.processor(text=texts)
    model.record_routing = True
    assert model.select(inputs, budget=1.0).tolist() == rows["expert"]
    assert ((model.routing_trace()["order"] > 0) * torch.tensor([0.25, 0.75])).sum(1).mean() < 0.9
    torch.testing.assert_close(
        torch.cat(model.embeddings(inputs, [0, 1], model.config.feature_depths), 1),
        torch.cat([torch.cat(model.embeddings(inputs, [k], [d]), 1) for k in (0, 1) for d in (1 / 3, 2 / 3)], 1),
        rtol=SUMS,
        atol=SUMS,
    )


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("output", {"fuser": "forest"}, "must be 'auto' or one of mlp"),
        ("selection", {"fuser": "stacking"}, "predicts labels"),
        ("selection", {"fuser": "mlp", "frugal": True}, "needs the embeddings of all experts"),
    ],
)
def test_fusers_that_do_not_go_with_a_model_are_refused(mode, options, message, halves):
    model = FoEModel.from_experts(halves.experts, mode=mode)
    with pytest.raises(FusionError, match=message):
        fit_fuser(model, halves.data, **options)


def test_regressors_are_fused_by_the_mlp():
    tokenizer = make_tokenizer()
    experts = [Expert(f"me/{k}", bert(["score"], seed=k), processor=tokenizer, labels=["score"]) for k in range(2)]
    rows = datasets.Dataset.from_dict({"text": ["a dog", "the fox"] * 10, "label": [0.5, 1.5] * 10})
    model = FoEModel.from_experts(experts)
    assert fit_fuser(model, rows, epochs=2).fuser == "mlp"
    with pytest.raises(FusionError, match="regressors are fused by 'mlp'"):
        fit_fuser(model, rows, fuser="gating")
