"""The gates file beside an adapter, on disk and on the Hub."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_experts import edit_json, save_adapter, save_bert
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_fusion import FusionError, Gates, load_experts, push_gates
from hf_fusion.hub.gates_file import GATES_FILE, gate_sizes, read_gates, save_gates
from hf_fusion.hub.lora import read_adapter
from hf_fusion.hub.readme import add_tag, put_section
from hf_fusion.training.gates import arrow_prototypes

QUERIES = [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
FACTS = {"steps": 100.0, "examples": 1600.0, "loss_before": 1.25, "loss_after": 0.1 + 0.2}


@pytest.fixture
def irony(tmp_path):
    """The folder of an adapter with a head, its base beside it."""
    base = save_bert(tmp_path / "base", auto=AutoModel)
    save_adapter(tmp_path / "irony", base)
    return tmp_path / "irony"


@pytest.fixture
def loaded(irony):
    model = AutoModelForSequenceClassification.from_pretrained(irony.parent / "base", num_labels=2)
    return read_adapter(irony, "irony"), model


def gates(seed=0, facts=None, paths=(*QUERIES, "classifier")):
    generator = torch.Generator().manual_seed(seed)
    return Gates({path: torch.randn(16, generator=generator) for path in paths}, facts=facts or {})


def test_gates_round_trip_through_a_file(irony, loaded):
    given = gates(facts=FACTS)
    file = save_gates(given, irony)
    assert file == irony / "phatgoose_gates.safetensors"
    again = read_gates(irony, "irony", *loaded)
    assert (again.kind, again.facts) == ("trained", FACTS)
    for path, vector in given.vectors.items():
        assert again.vectors[path].equal(vector.half().float())
    assert {path.name for path in irony.iterdir() if "gates" in path.name} == {file.name}
    (expert,) = load_experts([irony])
    assert expert.gates.vectors.keys() == given.vectors.keys()
    assert load_experts([irony], gates=False)[0].gates is None


def test_large_gates_are_kept_in_single_precision(irony, loaded):
    given = Gates({path: vector * 1e6 for path, vector in gates().vectors.items()}, kind="average")
    save_gates(given, irony)
    again = read_gates(irony, "irony", *loaded)
    assert again.kind == "average"
    assert all(again.vectors[path].equal(vector) for path, vector in given.vectors.items())


def test_save_replaces_the_file_or_keeps_it(irony):
    save_gates(gates(), irony)
    before = (irony / GATES_FILE).read_bytes()
    for bad in (Gates({}), Gates({QUERIES[0]: torch.full((16,), torch.nan)}), Gates({QUERIES[0]: torch.ones(4, 4)})):
        with pytest.raises(FusionError, match="gate"):
            save_gates(bad, irony)
    assert (irony / GATES_FILE).read_bytes() == before
    with pytest.raises(FusionError, match="irony already contains gates"):
        save_gates(gates(1), irony)
    assert (irony / GATES_FILE).read_bytes() == before
    save_gates(gates(1), irony, overwrite=True)
    assert (irony / GATES_FILE).read_bytes() != before
    assert len([path for path in irony.iterdir() if "gates" in path.name]) == 1


def test_a_folder_without_gates(irony, loaded):
    assert read_gates(irony, "irony", *loaded) is None
    assert load_experts([irony])[0].gates is None


def test_gates_without_valid_facts_count_as_trained(irony, loaded):
    save_file(gates().vectors, irony / GATES_FILE)
    assert read_gates(irony, "irony", *loaded).kind == "trained"
    save_file(gates().vectors, irony / GATES_FILE, metadata={"kind": "<b>", "steps": "many", "loss_after": "0.5"})
    again = read_gates(irony, "irony", *loaded)
    assert (again.kind, again.facts) == ("trained", {"loss_after": 0.5})


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"classifier": None}, "lacks a gate for classifier"),
        ({QUERIES[0]: None, QUERIES[1]: None}, f"lacks a gate for {QUERIES[0]} and 1 more"),
        ({"bert.pooler.dense": torch.ones(16)}, "has a gate for bert.pooler.dense, which the adapter does not adapt"),
        ({QUERIES[1]: torch.ones(12)}, rf"of shape \[12\] for {QUERIES[1]}, whose input has 16 features"),
        ({QUERIES[1]: torch.ones(1, 16)}, rf"of shape \[1, 16\] for {QUERIES[1]}"),
        ({QUERIES[1]: torch.full((16,), torch.inf)}, f"NaN or Inf in the gate of {QUERIES[1]}"),
    ],
)
def test_gates_that_do_not_fit_are_named(irony, loaded, vectors, message):
    merged = gates().vectors | vectors
    save_file({path: vector for path, vector in merged.items() if vector is not None}, irony / GATES_FILE)
    with pytest.raises(FusionError, match=message) as error:
        load_experts([irony])
    assert "irony" in error.value.message


def test_invalid_safetensors_file_is_reported(irony, loaded):
    (irony / GATES_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(FusionError, match=f"irony: {GATES_FILE} cannot be read"):
        read_gates(irony, "irony", *loaded)


def test_a_saved_embedding_has_no_gate(irony):
    """Only linears are routed; other saved modules replace the base's."""
    save_adapter(irony, irony.parent / "base", modules_to_save=["classifier", "word_embeddings", "LayerNorm"])
    adapter = read_adapter(irony, "irony")
    model = AutoModelForSequenceClassification.from_pretrained(irony.parent / "base", num_labels=2)
    assert "bert.embeddings.word_embeddings.weight" in adapter.saved
    assert gate_sizes(adapter, model) == dict.fromkeys([*QUERIES, "classifier"], 16)


CARD = (
    "---\r\nlicense: mit   # as the base\r\ntags:\r\n  - irony\r\n  - 'peft'\r\nbase_model: me/base\r\n---\r\n"
    "# Irony ✓\r\n\r\n<!-- mine -->\r\nBy hand. \r\n"
)


def remote(owner, name, file, revision=None):
    api = owner.api
    return open(api.hf_hub_download(f"{owner.name}/{name}", file, revision=revision), "rb").read()  # noqa: PTH123, SIM115


def test_push_adds_file_tag_and_paragraph_only(owner, anyone, irony):
    (irony / "README.md").write_bytes(CARD.encode())
    (irony / "notes.bin").write_bytes(bytes(range(256)))
    before = owner.push("irony", irony)
    repo = f"{owner.name}/irony"
    given = gates(facts=FACTS)
    pushed = push_gates(given, repo, api=owner.api)
    assert (pushed.repo_id, pushed.private, pushed.url) == (repo, False, f"{owner.api.endpoint}/{repo}")
    assert [commit.commit_id for commit in owner.api.list_repo_commits(repo)][:2] == [pushed.sha, before]

    def blobs(sha):
        return {entry.path: entry.blob_id for entry in owner.api.list_repo_tree(repo, revision=sha)}

    old, new = blobs(before), blobs(pushed.sha)
    assert {path for path in new if new[path] != old.get(path)} == {"README.md", GATES_FILE}
    assert old.keys() <= new.keys()
    assert [model.id for model in anyone.list_models(filter="phatgoose-gates", author=owner.name)] == [repo]

    card = remote(owner, "irony", "README.md").decode()
    assert card.replace("- phatgoose-gates\r\n  ", "", 1).startswith(CARD)
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"license": "mit", "tags": ["phatgoose-gates", "irony", "peft"], "base_model": "me/base"}
    assert "in 100 steps on 1,600 examples" in card
    assert "1.250 with half-open gates and 0.300 after training" in card

    (expert,) = load_experts([f"{repo}@{pushed.sha}"], base=irony.parent / "base", api=owner.api)
    assert expert.gates.facts == FACTS
    assert expert.gates.vectors[QUERIES[0]].equal(given.vectors[QUERIES[0]].half().float())


def test_a_second_push_changes_nothing_and_new_gates_replace_the_old(owner, irony):
    (irony / "README.md").write_bytes(CARD.encode())
    owner.push("irony", irony)
    repo = f"{owner.name}/irony"
    first = push_gates(gates(facts=FACTS), repo, api=owner.api)
    assert push_gates(gates(facts=FACTS), repo, api=owner.api).sha == first.sha
    arrow = arrow_prototypes(irony)
    second = push_gates(arrow, repo, api=owner.api)
    assert second.sha != first.sha
    card = remote(owner, "irony", "README.md").decode()
    assert card.count("phatgoose-gates:begin") == 1
    assert "100 steps" not in card
    assert "(Arrow)" in card
    assert len(owner.api.list_repo_commits(repo)) == 4  # the repo, its files, two sets of gates
    with safe_open(owner.api.hf_hub_download(repo, GATES_FILE, revision=second.sha), "pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "arrow"}


def test_a_repo_without_a_card_gets_one(owner, anyone, irony):
    (irony / "README.md").unlink(missing_ok=True)
    owner.push("bare", irony)
    push_gates(gates(), f"{owner.name}/bare", api=owner.api)
    card = remote(owner, "bare", "README.md").decode()
    assert card.startswith("---\ntags:\n- phatgoose-gates\n---\n\n<!-- phatgoose-gates:begin -->\n## PHATGOOSE gates\n")
    assert anyone.model_info(f"{owner.name}/bare").tags.count("phatgoose-gates") == 1


def test_a_push_to_a_branch(owner, irony):
    owner.push("irony", irony)
    repo = f"{owner.name}/irony"
    owner.api.create_branch(repo, branch="gates")
    push_gates(gates(), repo, revision="gates", api=owner.api)
    assert owner.api.file_exists(repo, GATES_FILE, revision="gates")
    assert not owner.api.file_exists(repo, GATES_FILE)


def test_invalid_pushes_are_refused(owner, anyone, irony, tmp_path):
    owner.push("irony", irony)
    owner.push("full", save_bert(tmp_path / "full"))
    repo = f"{owner.name}/irony"
    head = owner.api.model_info(repo).sha
    with pytest.raises(FusionError, match="full is not an adapter's repo"):
        push_gates(gates(), f"{owner.name}/full", api=owner.api)
    with pytest.raises(FusionError, match="nobody/nothing was not found"):
        push_gates(gates(), "nobody/nothing", api=owner.api)
    with pytest.raises(FusionError, match="is not an adapter's repo on the Hub"):
        push_gates(gates(), str(irony), api=owner.api)
    with pytest.raises(FusionError, match=f"lacks a gate for {QUERIES[1]}"):
        push_gates(gates(paths=QUERIES[:1]), repo, api=owner.api)
    with pytest.raises(FusionError, match="has a gate for h.0.attn, which"):
        push_gates(gates(paths=[*QUERIES, "h.0.attn"]), repo, api=owner.api)
    with pytest.raises(FusionError, match="irony was refused by the Hub"):
        push_gates(gates(), repo, api=anyone)
    assert owner.api.model_info(repo).sha == head


def test_concurrent_push_is_not_lost(hub, owner, irony):
    """Somebody edits the card after we read it: ours is refused, and run again it keeps both."""
    (irony / "README.md").write_bytes(CARD.encode())
    owner.push("irony", irony)
    repo = f"{owner.name}/irony"

    class Overtaken(HfApi):
        """A client whose user is overtaken just before its first commit."""

        overtaken = False

        def create_commit(self, *args, **kwargs):
            if not self.overtaken:
                self.overtaken = True
                edited = CARD.replace("By hand.", "By another hand.").encode()
                owner.api.upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=repo)
            return super().create_commit(*args, **kwargs)

    api = Overtaken(endpoint=hub.endpoint, token=hub.token(owner.name))
    with pytest.raises(FusionError, match="refused") as error:
        push_gates(gates(), repo, api=api)
    assert "run the command again" in error.value.hint
    push_gates(gates(), repo, api=api)
    card = remote(owner, "irony", "README.md").decode()
    assert "By another hand." in card
    assert "phatgoose-gates:begin" in card


@pytest.mark.parametrize(
    "head",
    [
        "license: mit\n",
        "tags:\n- a\n- b\nlicense: mit\n",
        "tags:\n    - a\n    # why\n    - b\n",
        "license: mit\ntags: [a, 'b, c']\nname: x\n",
        "tags: []\n",
        "tags:\nlicense: mit\n",
        "tags: ~\nlicense: mit\n",
        "tags: one\n",
        "tags: 'on: e'  # only one\n",
        "",
        "# nothing but this\n",
    ],
)
def test_tag_is_prepended_and_other_bytes_are_kept(head):
    text = f"---\n{head}---\n\nwords: ---\n"
    edited = add_tag(text, "new")
    before = yaml.safe_load(head) or {}
    old = before.get("tags") or []
    after = yaml.safe_load(edited.split("---\n")[1])
    assert after == {**before, "tags": ["new", *([old] if isinstance(old, str) else old)]}
    for line in head.splitlines():
        if not line.startswith("tags"):
            assert line in edited.splitlines()
    assert edited.endswith("---\n\nwords: ---\n")
    assert add_tag(edited, "new") == edited


@pytest.mark.parametrize("head", ["tags: [\n", "- a\n", "tags: *nothing\n", "x: &t [a]\ntags: *t\n"])
def test_metadata_that_takes_no_tag_is_named(head):
    with pytest.raises(FusionError, match=r"README\.md"):
        add_tag(f"---\n{head}---\nbody\n", "new")


def test_a_section_is_appended_then_replaced():
    once = put_section("# Mine\n\nwords", "x", "one")
    assert once == "# Mine\n\nwords\n\n<!-- x:begin -->\none\n<!-- x:end -->\n"
    more = once + "\nmore\n"
    assert put_section(more, "x", "two\nlines") == more.replace("one", "two\nlines")
    assert put_section("a\r\n", "x", "one\ntwo") == "a\r\n\r\n<!-- x:begin -->\r\none\r\ntwo\r\n<!-- x:end -->\r\n"
    for broken in (once.replace("<!-- x:end -->", ""), once + once):
        with pytest.raises(FusionError, match="markers of x"):
            put_section(broken, "x", "two")


@pytest.mark.slow
def test_the_cards_code_runs(hub, owner, irony, fresh_python):
    edit_json(irony / "adapter_config.json", base_model_name_or_path=f"{owner.name}/base")
    owner.push("base", irony.parent / "base")
    for name in ("bare", "irony", "other"):
        owner.push(name, irony)
    for name in ("irony", "other"):
        push_gates(gates(), f"{owner.name}/{name}", api=owner.api)
    (code,) = re.findall(r"```python\n(.*?)```", remote(owner, "irony", "README.md").decode(), re.DOTALL)
    shown = fresh_python(code + "print(type(model).__name__, *sorted(info.id for info in experts))", hub).stdout
    assert re.fullmatch(rf"Phatgoose\w+ {owner.name}/irony {owner.name}/other\n", shown)
