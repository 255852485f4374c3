"""Push PHATGOOSE gates to their adapter's repo: the file, the tag and a section of the card, in one commit."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.card import README
from hf_fusion.errors import FusionError
from hf_fusion.hub.adapter_placement import match_current_names
from hf_fusion.hub.bases import resolve_base
from hf_fusion.hub.client import explain_hub_errors, hub_api
from hf_fusion.hub.commits import download_file
from hf_fusion.hub.gates_file import GATES_FILE, GATES_TAG, gate_problem, gate_tensors, parse_gates, save_gates, stored
from hf_fusion.hub.headers import hub_shapes
from hf_fusion.hub.model_files import Source
from hf_fusion.hub.peft_names import adapter_shapes
from hf_fusion.hub.readme import add_tag, put_section
from hf_fusion.hub.refs_to_files import recorded_base, resolve
from hf_fusion.hub.selection import safe_files
from hf_fusion.progress import phase
from hf_fusion.publishing.push import PublishResult
from hf_fusion.types import Gates, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# kind of gates → sentence of the card; {training} describes their training as far as it is recorded
_ORIGIN = {
    "gaussian": "They are densities of the base's activations on examples of the adapter's data; nothing was trained.",
    "trained": "They were trained after the adapter, with everything else frozen{training}.",
    "average": "They are the mean input of each linear layer over examples of the adapter's data; nothing was trained.",
    "arrow": "They are the direction that each update amplifies most (Arrow); nothing was trained.",
}
_SECTION = """\
## PHATGOOSE gates

`{file}` contains {content}, by which a router chooses among adapters of the same base \
([PHATGOOSE](https://arxiv.org/abs/2402.05859)). {origin}

```python
import hf_fusion

found = hf_fusion.discover(tags="{tag}"{base})
experts = hf_fusion.check_compatibility(found, need_gates=True).accepted
model = hf_fusion.fuse("phatgoose", experts)
```"""


def push_gates(gates: Gates, repo_id: str, *, revision: str | None = None, api: HfApi | None = None) -> PublishResult:
    """Add gates to an adapter's repo, so that `discover` finds it by the tag ``phatgoose-gates``.

    One commit adds or replaces the file, the tag and a section of the card; all else in the repo stays as it is.
    Pushing the same gates again changes nothing. Gates of an earlier push are replaced.

    Args:
        gates: the adapter's gates, as `train_gates` returns them.
        repo_id: ``owner/name`` of the adapter.
        revision: branch to push to; default is the main branch.
        api: client of the Hub; default honours ``HF_ENDPOINT`` and the stored token.

    Returns:
        The repo and the commit with the gates.

    Raises:
        FusionError: the repo is not an adapter, the gates are those of another adapter, the card cannot be edited, or
            the Hub refuses the commit, for example because somebody else has pushed in the meantime.
    """
    from huggingface_hub import CommitOperationAdd

    ref = ModelRef(repo_id, revision)
    if ref.commit:
        raise FusionError(f"{ref} names a commit, but gates are pushed to a branch", hint=f"omit @{ref.revision}")
    api = hub_api(api)
    source = resolve(ref, api)
    if source.is_local or not source.is_adapter:
        raise FusionError(f"{repo_id} is not an adapter's repo on the Hub", hint="write owner/name of the adapter")
    _refuse_foreign(gates, source)
    card = _read_card(source)
    edited = put_section(add_tag(card, GATES_TAG), GATES_TAG, _card_section(gates, source))
    operations = [] if edited == card else [CommitOperationAdd(README, edited.encode())]
    sha = str(source.revision)
    with tempfile.TemporaryDirectory(prefix="hf-fusion-") as folder, explain_hub_errors(repo_id):
        file = save_gates(gates, folder)
        if not _gates_are_there(source, gates):
            operations.append(CommitOperationAdd(GATES_FILE, file))
        if operations:
            with phase(f"Pushing gates to {repo_id}"):
                sha = api.create_commit(
                    repo_id,
                    operations,
                    commit_message="Add PHATGOOSE gates",
                    revision=revision,
                    parent_commit=sha,
                ).oid
    assert source.info is not None  # not a folder
    return PublishResult(repo_id, sha, f"{api.endpoint}/{repo_id}", bool(source.info.private))


def _refuse_foreign(gates: Gates, source: Source) -> None:
    """Raises FusionError for gates of another adapter, by the shapes in its safetensors header if it has one."""
    files = safe_files(source)
    if not files:
        return
    lora, saved = adapter_shapes(hub_shapes(source, files), source.name)
    names = match_current_names(lora, saved, source.adapter, _base_config(source), source.name)
    sizes = {names[f"{path}.weight"].removesuffix(".weight"): d_in for path, (d_in, _) in lora.items()}
    shapes = {path: tuple(tensor.shape) for path, tensor in gate_tensors(gates).items()}
    heads = {names[name].removesuffix(".weight") for name in saved}
    if problem := gate_problem(shapes, sizes, also=heads):
        again = f"train gates for this adapter: hf-fusion fit gates {source.name} --data … --push"
        raise FusionError(f"the gates do not fit {source.name}: the set {problem}", hint=again)


def _base_config(source: Source) -> dict[str, Any]:
    """The configuration of the base that an adapter records; empty if it cannot be loaded."""
    try:
        return resolve_base(recorded_base(source), source, source.api).config
    except FusionError:  # the names in the adapter's file are used as they are
        return {}


def _read_card(source: Source) -> str:
    """The README at the source's commit; empty where there is none."""
    if README not in source.sizes:
        return ""
    with explain_hub_errors(source.name):
        content = download_file(hub_api(source.api), source.name, README, source.revision).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FusionError(
            f"README.md of {source.name} is not UTF-8 ({error})", hint="save README.md as UTF-8"
        ) from None


def _gates_are_there(source: Source, gates: Gates) -> bool:
    """Whether the repo already contains exactly these gates."""
    if GATES_FILE not in source.sizes:
        return False
    file = download_file(hub_api(source.api), source.name, GATES_FILE, source.revision)
    ours = stored(gates)
    try:
        there = parse_gates(file, source.name, {path: len(vector) for path, vector in gates.vectors.items()})
    except FusionError:  # broken, or for other modules: replaced by the push
        return False
    theirs = gate_tensors(there)
    same = theirs.keys() == ours.keys() and all(theirs[path].equal(tensor.float()) for path, tensor in ours.items())
    return same and (there.kind, there.facts) == (gates.kind, gates.facts)


def _card_section(gates: Gates, source: Source) -> str:
    """The section of the card: what the gates are, how they were made, how to use them."""
    try:
        base = f', base_model="{recorded_base(source).id}"'
    except FusionError:  # trained on a base in a folder: only its user knows which
        base = ""
    facts, training = gates.facts, ""
    if {"steps", "examples"} <= facts.keys():
        training = f", in {facts['steps']:.0f} steps on {facts['examples']:,.0f} examples"
    if {"loss_before", "loss_after"} <= facts.keys():
        training += f" (the adapter's loss was {facts['loss_before']:.3f} with half-open gates "
        training += f"and {facts['loss_after']:.3f} after training)"
    origin = _ORIGIN[gates.kind].format(training=training)
    content = f"one vector for each of the {len(gates.vectors)} linear layers that this adapter changes"
    if gates.gaussians:
        content = f"one Gaussian for each of {len(gates.gaussians)} inputs inside the base"
    return _SECTION.format(file=GATES_FILE, content=content, origin=origin, tag=GATES_TAG, base=base)
