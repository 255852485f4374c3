"""Computes the experts' outputs on a data set once, distributed over processes, and caches them on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard

import datasets
import torch
import xxhash
from accelerate import PartialState

from hf_fusion.errors import FusionError
from hf_fusion.io.cache import cache_folder
from hf_fusion.io.picture_rows import with_pictures
from hf_fusion.models.assembly_foe import normalise
from hf_fusion.models.running_foe import fuse_outputs, label_map_matrix
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_fusion.models.configuration_foe import FoEConfig
    from hf_fusion.models.modeling_foe import FoEForGeneration, FoEModel

# of embeddings, see `FoEConfig.feature_depths`: middle layers know best what an input is about, "mlp" reads the last
DEPTHS = (1 / 3, 2 / 3, 1.0)
# data set column -> the processor's argument
INPUT_COLUMNS = {"text": "text", "prompt": "text", "text_pair": "text_pair", "image": "images"}


@dataclass
class ExpertOutputs:
    """The training data of a fuser, for N examples and K experts.

    Attributes:
        features: inputs of the model's fuser, (N, F).
        outputs: the experts' outputs in the fused label space, (N, K, C); None for language models.
        logits: the same before the softmax, -inf for labels that an expert does not know; None for language models.
        embeddings: (expert, depth) -> (N, d_k), see `FoEConfig.feature_depths`.
        labels: fused class index (or regression target) of each example, (N,); None for unlabelled data.
        experts: index of the expert whose domain each example belongs to, (N,); None if the data does not name it.
        losses: loss of each expert on each example, (N, K); None unless requested.
    """

    features: torch.Tensor
    outputs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeddings: dict[tuple[int, float], torch.Tensor] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    losses: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def parts(self, depths: Sequence[float], experts: Sequence[int]) -> list[torch.Tensor]:
        """What fusers other than "mlp" read of each expert: logits, if there are any, and embedding (N, C + d_k).

        Args:
            depths: of the embedding; empty for none.
            experts: their indices.
        """
        found = []
        for expert in experts:
            logits = [] if self.logits is None else [self.logits[:, expert]]
            found.append(torch.cat([*logits, *(self.embeddings[expert, depth] for depth in depths)], 1))
        return found


def collect_outputs(
    model: FoEModel,
    dataset: datasets.Dataset,
    *,
    label_column: str = "label",
    expert_column: str = "expert",
    losses: bool = False,
    batch_size: int = 32,
) -> ExpertOutputs:
    """Runs all experts on a data set; the result is cached by the fingerprints of the weights and of the data.

    Args:
        model: a FoE.
        dataset: with the columns of `INPUT_COLUMNS` that the experts read and, if known, labels or experts.
        label_column: class names, or indices of the fused labels (or of the column's ClassLabel names).
        expert_column: name or index of the expert whose domain an example belongs to.
        losses: also compute the loss of each language model on column ``target``.
        batch_size: examples per forward pass.

    Raises:
        FusionError: for empty data, missing columns, or unknown labels or experts.
    """
    if not len(dataset):
        raise FusionError("the data set is empty: there is nothing to run the experts on")
    columns = input_columns(dataset)
    runner = _GenerationRunner(model, losses) if generates(model) else _ClassifierRunner(model)
    experts = _expert_indices(model, dataset, expert_column)
    labels = None if model.config.vocabularies else _label_indices(model, dataset, label_column, experts)
    rows = _run_cached(runner, dataset, columns, batch_size)
    count, device = len(dataset), "cpu"
    tensors = {name: torch.tensor(rows[name], device=device).view(count, -1) for name in rows}
    outputs, logits = (None, None) if model.config.vocabularies else _fused(model, tensors)
    embeddings = {
        (expert, depth): tensors[_column(expert, depth)] for expert in runner.read for depth in depths_of(model)
    }
    collected = ExpertOutputs(
        features=torch.empty(count, 0),
        outputs=outputs,
        logits=logits,
        embeddings=embeddings,
        labels=labels,
        experts=experts,
        losses=tensors.get("losses"),
    )
    collected.features = features_of(model, collected)
    return collected


def _fused(model: FoEModel, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and logits in the fused label space, (N, K, C) each."""
    found = []
    for index, expert in enumerate(model.config.experts):
        onehot = label_map_matrix([expert["label_map"]], model.config.num_outputs)
        head = tensors[f"logits_{index}"][None].float()
        found.append(fuse_outputs(head, onehot, model.config.problem_type == "regression", raw=True))
    outputs, logits = (torch.cat([pair[part] for pair in found if pair[part] is not None]) for part in (0, 1))
    return outputs.transpose(0, 1), logits.transpose(0, 1)


def features_of(model: FoEModel, collected: ExpertOutputs, config: FoEConfig | None = None) -> torch.Tensor:
    """Inputs of a model's fuser, (N, F).

    Args:
        model: a FoE.
        collected: what its experts gave.
        config: with another fuser than the model's.
    """
    config = config or model.config
    source = config.features_from
    experts = range(config.num_experts) if source is None else [source]
    depths = (config.feature_depths or [1.0]) if config.mode == "selection" or config.reads_embeddings else []
    if config.rule is None and config.fuser != "mlp":
        return torch.cat(collected.parts(depths, experts), 1)
    if config.mode == "selection":
        return torch.cat([collected.embeddings[expert, depth] for expert in experts for depth in depths], 1)
    reads_logits = config.rule is not None and config.over == "logits"
    outputs = collected.logits if reads_logits else collected.outputs
    assert outputs is not None  # of classifiers
    return outputs.flatten(1)


def depths_of(model: FoEModel) -> list[float]:
    """Depths at which embeddings are collected: those that fusers choose among, and the model's."""
    return sorted({*DEPTHS, *(model.config.feature_depths or [])})


def _column(expert: int, depth: float) -> str:
    return f"embedding_{expert}_{depth}"


class _ClassifierRunner:
    """Logits of the heads and embeddings of classifiers and regressors, whatever the labels are mapped to."""

    def __init__(self, model: FoEModel) -> None:
        self.model = model
        self.columns: tuple[str, ...] = ()
        self.read: Sequence[int] = range(model.config.num_experts)

    def __call__(self, batch: Mapping[str, list[Any]], columns: Mapping[str, str]) -> dict[str, Any]:
        inputs, depths = prepare(self.model, batch, columns), depths_of(self.model)
        runs = self.model.run_experts(inputs, embed=depths, raw=True)
        found: dict[str, torch.Tensor] = {}
        for expert, run in enumerate(runs):
            assert run.head is not None and run.embedding is not None  # asked for
            labels = len(self.model.config.experts[expert]["label_map"])
            found |= {f"logits_{expert}": run.head[:, :labels], **_by_depth(expert, depths, run.embedding)}
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def _by_depth(expert: int, depths: Sequence[float], embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns of an expert's embeddings, one for each depth; all are equally wide."""
    return {_column(expert, depth): part for depth, part in zip(depths, embedding.chunk(len(depths), 1), strict=True)}


class _GenerationRunner:
    """Prompt embeddings of language models and, on request, their losses on the targets."""

    def __init__(self, model: FoEForGeneration, losses: bool) -> None:
        if losses and len(model.config.vocabularies or ()) > 1:
            raise FusionError(
                "the experts' tokenizers differ, so their losses cannot be compared",
                "fit with the domain of each example: a column 'expert', and by='domain'",
            )
        self.model, self.columns = model, (("target",) if losses else ())
        source = model.config.features_from
        self.read: Sequence[int] = range(model.config.num_experts) if source is None else [source]

    def __call__(self, batch: Mapping[str, list[Any]], columns: Mapping[str, str]) -> dict[str, Any]:
        inputs, depths = prepare(self.model, batch, columns), depths_of(self.model)
        result: dict[str, Any] = {}
        for expert, embedding in zip(self.read, self.model.embeddings(inputs, self.read, depths), strict=True):
            result |= {n: e.float().cpu().numpy() for n, e in _by_depth(expert, depths, embedding).items()}
        if self.columns:
            prompts = batch[next(iter(columns))]
            result["losses"] = self._losses(prompts, batch["target"]).cpu().numpy()
        return result

    def _losses(self, prompts: list[str], targets: list[str]) -> torch.Tensor:
        """Each expert's mean loss per target token, (B, K)."""
        tokenizer = self.model.processor.processors[0]
        if self.model.config.is_encoder_decoder:
            inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            labels = tokenizer(text_target=targets, padding=True, truncation=True, return_tensors="pt")["input_ids"]
            labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        else:
            inputs, labels = _prompts_with_targets(tokenizer, prompts, targets)
        inputs, labels = inputs.to(self.model.device), labels.to(self.model.device)
        shift = 0 if self.model.config.is_encoder_decoder else 1
        columns = []
        for expert in range(self.model.config.num_experts):
            choice = torch.full((len(prompts),), expert, device=self.model.device)
            logits = self.model(**inputs, labels=labels, choice=choice).logits.float()
            predicted = logits[:, : logits.shape[1] - shift].transpose(1, 2)
            loss = torch.nn.functional.cross_entropy(predicted, labels[:, shift:], reduction="none", ignore_index=-100)
            columns.append(loss.sum(1) / (labels[:, shift:] != -100).sum(1).clamp(min=1))
        return torch.stack(columns, 1)


def _prompts_with_targets(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], targets: list[str]
) -> tuple[Any, torch.Tensor]:
    """Encodes prompt and target as one right-padded sequence, with labels on the target."""
    rows = []
    for prompt, target in zip(prompts, targets, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
        rows.append((prompt_ids + target_ids, [-100] * len(prompt_ids) + target_ids))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }
    from transformers import BatchEncoding

    return BatchEncoding(inputs), torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])


def input_columns(dataset: datasets.Dataset) -> dict[str, str]:
    """The experts' input columns in a data set -> the processor's argument for each.

    Raises:
        FusionError: there is none.
    """
    columns = {column: name for column, name in INPUT_COLUMNS.items() if column in dataset.column_names}
    if not columns:
        raise FusionError(
            f"the data set has columns {dataset.column_names}, none of {list(INPUT_COLUMNS)}",
            "rename the one to read: dataset.rename_column('sentence', 'text')",
        )
    return columns


def generates(model: FoEModel) -> TypeGuard[FoEForGeneration]:
    """Whether the experts are language models."""
    return bool(model.config.vocabularies)


def prepare(model: FoEModel, batch: Mapping[str, list[Any]], columns: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A batch of columns -> model inputs on the model's device, by its processor."""
    given: dict[str, Any] = {name: batch[column] for column, name in columns.items()}
    inputs = model.processor(**given)
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _run_cached(
    runner: _ClassifierRunner | _GenerationRunner,
    dataset: datasets.Dataset,
    columns: Mapping[str, str],
    batch_size: int,
) -> dict[str, Any]:
    """Maps the runner over the data set; each process computes a contiguous shard, then reads all shards."""
    model = runner.model
    state = PartialState(cpu=model.device.type == "cpu")
    needed = [*columns, *runner.columns]
    identity = f"{_fingerprint(model)}-{dataset._fingerprint}-{needed}"
    key = xxhash.xxh64(identity.encode()).hexdigest()
    folder = cache_folder() / "outputs"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{key}-{rank}-of-{state.num_processes}.arrow" for rank in range(state.num_processes)]
    shard = with_pictures(dataset.select_columns(needed))
    shard = shard.shard(state.num_processes, state.process_index, contiguous=True)
    training = model.training
    model.eval()
    with torch.no_grad(), phase(f"Running {model.config.num_experts} experts", len(shard)) as progress:

        def run_batch(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            found: dict[str, Any] = runner(batch, columns)
            progress.advance(len(batch[needed[0]]))
            return found

        shard.map(
            run_batch,
            batched=True,
            batch_size=batch_size,
            remove_columns=needed,
            cache_file_name=str(files[state.process_index]),
            new_fingerprint=f"{key}-{state.process_index}",
            desc=f"{model.config.num_experts} experts",
        )
    model.train(training)
    state.wait_for_everyone()
    shards = [datasets.Dataset.from_file(str(file)) for file in files]
    rows: dict[str, Any] = datasets.concatenate_datasets(shards).with_format("numpy")[:]
    return rows


def _fingerprint(model: FoEModel) -> str:
    """Hash of the experts' weights and of the settings that affect their outputs."""
    config = model.config
    source = config.features_from if config.vocabularies else None  # classifiers: all embeddings are cached
    members = [(expert["name"], expert["revision"], expert["backbone"], expert["labels"]) for expert in config.experts]
    digest = xxhash.xxh64(f"{members}{config.backbones}{source}{depths_of(model)}{model.dtype}".encode())
    for tensor in chain.from_iterable(backbone.model.state_dict().values() for backbone in model.backbones):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _expert_indices(model: FoEModel, dataset: datasets.Dataset, column: str) -> torch.Tensor | None:
    """The expert column as indices; names match with or without their owner."""
    if column not in dataset.column_names:
        return None
    names = [expert["name"] for expert in model.config.experts]
    index = {name.rpartition("/")[2]: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    index |= {i: i for i in range(len(names))}
    values = dataset[column]
    if unknown := sorted({str(value) for value in values if value not in index}):
        raise FusionError(f"column {column!r} names {unknown[:5]}, but the experts are {names}")
    return torch.tensor([index[value] for value in values])


def _label_indices(
    model: FoEModel, dataset: datasets.Dataset, column: str, experts: torch.Tensor | None
) -> torch.Tensor | None:
    """The label column as fused class indices, or as float targets for regression."""
    if column not in dataset.column_names:
        return None
    values = list(dataset[column])
    if model.config.problem_type == "regression":
        return torch.tensor([float(value) for value in values])
    feature = dataset.features[column]
    if hasattr(feature, "names"):
        values = [feature.names[value] for value in values]
    fused = {normalise(name): int(i) for i, name in (model.config.id2label or {}).items()}
    if not isinstance(values[0], str):
        if unknown := sorted({v for v in values if not 0 <= v < len(fused)}):
            raise FusionError(f"column {column!r} holds labels {unknown[:5]}, but the model has {len(fused)} labels")
        return torch.tensor(values)
    by_expert: list[dict[str, int]] = [
        {normalise(label): index for label, index in zip(e["labels"], e["label_map"], strict=True) if index >= 0}
        for e in model.config.experts
    ]
    indices = [
        (by_expert[int(experts[row])] if experts is not None else fused).get(
            normalise(value), fused.get(normalise(value), -1)
        )
        for row, value in enumerate(values)
    ]
    if -1 in indices:
        unknown = sorted({value for value, index in zip(values, indices, strict=True) if index < 0})
        raise FusionError(
            f"column {column!r} holds labels {unknown[:5]} that the model does not know: {list(fused)[:20]}",
            "drop those rows, or name the labels by label_maps when fusing",
        )
    return torch.tensor(indices)
