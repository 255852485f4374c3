"""What the card of each family says that others do not: its settings, its measurements, and its usage block."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cards.parts import (
    CHAT,
    CLASSES,
    FEATURES,
    GENERATION,
    IMAGE_IMPORT,
    PICTURE,
    PLAIN_USAGE,
    TEXT,
    CardContents,
    Measured,
    Usage,
    lacking_each,
    suite_lacking,
    suite_measured,
    suite_view,
    usage_row,
)
from hf_fusion.hub.code import refuse_kernels

if TYPE_CHECKING:
    from hf_fusion.cards.card import CardFacts

MOST_TOLD = 8  # tasks of a picture that are told in words

# ---------------------------------------------------------------- Fusion of Experts

_FOE_GENERATION = Usage(
    "inputs = processor([{text}])",
    "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True))",
    pipeline=False,
)
_FOE_USAGE = {
    "AutoModelForSequenceClassification": Usage("example = {text}\ninputs = processor([example])", CLASSES),
    "AutoModelForImageClassification": Usage(
        f"{PICTURE}inputs = processor(images=[example])", CLASSES, imports=IMAGE_IMPORT
    ),
    "AutoModelForCausalLM": _FOE_GENERATION,
    "AutoModelForSeq2SeqLM": _FOE_GENERATION,
}


def _foe_usage(facts: CardFacts) -> str:
    usage, revision = usage_row(_FOE_USAGE, facts.auto_class), facts.revision or "main"
    pipeline = f'pipe = pipeline("{facts.pipeline_tag}", model=repo, revision=revision, trust_remote_code=True)'
    return (
        f"{usage.imports}from transformers import {facts.auto_class}, AutoProcessor"
        f"{', pipeline' if usage.pipeline else ''}\n\n"
        f'repo, revision = "{facts.repo_id}", "{revision}"\n'
        f"processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)\n"
        f"model = {facts.auto_class}.from_pretrained(repo, revision=revision, trust_remote_code=True)\n\n"
        + usage.inputs.format(text='"Some text to look at."')
        + f"\n{usage.answer}\n"
        + (f"\n{pipeline}\nprint(pipe(example))\n" if usage.pipeline else "")
    )


def _foe_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {key: config.get(key) for key in ("mode", "features_from", "frugal", "rule", "over", "weights")}


def _foe_lacking(results: Mapping[str, Any]) -> list[str]:
    lacking = [key for key in ("dataset", "n", "metric", "systems") if results.get(key) is None]
    lacking += lacking_each(results, "systems", ("name", "kind", "score", "ci95", "cost"))
    return lacking + [f"dataset.{key}" for key in ("name", "split") if key not in results.get("dataset", ())]


def _foe_measured(results: Mapping[str, Any]) -> list[Measured]:
    data, own = results["dataset"], [s for s in results["systems"] if s["kind"] in ("foe", "frugal")]
    name, kind, split = (str(data[key]) for key in ("name", "type" if data.get("type") else "name", "split"))
    metric = str(results["metric"])
    return [Measured(name, kind, split, results["n"], metric, system["name"], system["score"]) for system in own]


# ---------------------------------------------------------------- PHATGOOSE


def _routed_usage(facts: CardFacts) -> str:
    features = FEATURES[facts.options.get("reads", "texts")]
    usage, revision = usage_row({**PLAIN_USAGE, "AutoModel": features}, facts.auto_class), facts.revision or "main"
    if facts.options.get("chats") and not facts.routing:  # rows that were measured have their markup
        usage = CHAT
    example = (facts.routing or {}).get("example") or "Some text to look at."
    return (
        f"{usage.imports}from transformers import {facts.auto_class}, {usage.processor}\n\n"
        f'repo, revision = "{facts.repo_id}", "{revision}"\n'
        f"processor = {usage.processor}.from_pretrained(repo, revision=revision, trust_remote_code=True)\n"
        f"model = {facts.auto_class}.from_pretrained(repo, revision=revision, trust_remote_code=True)\n\n"
        "model.record_routing = 4096  # tokens to keep; 0, the default, costs nothing\n"
        + usage.inputs.format(text=json.dumps(str(example), ensure_ascii=False))
        + f"\n{usage.answer}\n"
        "print(model.routing_trace().usage())  # whom its tokens met\n"
    )


def _routed_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from the model it describes, built without memory."""
    from hf_fusion.hub.headers import on_meta
    from hf_fusion.models.assembly_phatgoose import readers_of
    from hf_fusion.models.configuration_phatgoose import PhatgooseConfig
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter

    refuse_kernels(config, str(folder))
    model = on_meta(lambda: PhatgooseRouter(PhatgooseConfig.from_pretrained(folder)))
    summary, towers = model.summary(), len(readers_of(model.backbone, model.config.is_encoder_decoder))
    known = ("parameters", "expert_parameters", "routed_linears", "relative_cost")
    given = ("router_temperature", "routing", "base_by_reference", "head")
    options = {key: config.get(key) for key in given} | {key: summary[key] for key in known}
    reads = "texts and images" if towers > 1 else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {"num_experts_per_tok": summary["top_k"], "reads": reads}


def _most_by_task(experts: Sequence[str], tasks: Sequence[str], rows: Sequence[Sequence[float]], form: str) -> str:
    """A map of tasks × experts in words: who gets most on each of the first tasks."""
    shown = [
        f"{task}: {experts[row.index(max(row))].rpartition('/')[2]} {form.format(max(row))}".replace("%", " %")
        for task, row in zip(tasks, map(list, rows), strict=True)
    ]
    more = "" if len(shown) <= MOST_TOLD else f"; and {len(shown) - MOST_TOLD} tasks more"
    return "; ".join(shown[:MOST_TOLD]) + more


def _routed_view(facts: CardFacts) -> dict[str, Any]:
    """What the suite's tables need, the kinds of gates, and the picture in words."""
    gates = {word for expert in facts.experts for word in (expert.gates or "").split()}
    view, routing = suite_view(facts) | {"gates": gates}, facts.routing
    if routing:
        most = _most_by_task(routing["experts"], routing["tasks"], routing["weights"], "{:.0%}")
        view["alt"] = f"Heat map of tasks and experts. The expert with the most weight on {most}"
    return view


# ---------------------------------------------------------------- WEMoE

_OF_TASK = (
    "task = {task}  # whose head answers: one of model.experts\n"
    "answer = model(**inputs, task=task).logits[0].argmax(-1)\n"
    'labels = model.config.experts[model.experts.index(task)]["labels"]\n'
)
_MERGED_TEXT = Usage(TEXT.inputs, _OF_TASK + "print(labels[int(answer)])")
_MERGED_USAGE = {
    "AutoModelForCausalLM": GENERATION,
    "AutoModelForSeq2SeqLM": GENERATION,
    "AutoModelForSequenceClassification": _MERGED_TEXT,
    "AutoModelForTokenClassification": Usage(TEXT.inputs, _OF_TASK + "print([labels[i] for i in answer.tolist()])"),
    "AutoModelForImageClassification": Usage(
        PLAIN_USAGE["AutoModelForImageClassification"].inputs,
        _MERGED_TEXT.answer,
        imports=IMAGE_IMPORT,
        processor="AutoImageProcessor",
    ),
}
# whether and how task vectors are stored -> what the card says of it
STORAGE = {
    "exact": "in the model's own precision",
    "bfloat16": "in bfloat16, beside a base in the model's own precision",
    "sparse": "without all but the largest {density:.0%} of their entries",
    "low-rank": "as products of rank {ranks}, which keep {energy:.1%} of their squared norm ({least:.1%} at least)",
}
STORAGE["low-rank-bfloat16"] = f"{STORAGE['low-rank']}, in bfloat16"


def _merged_usage(facts: CardFacts) -> str:
    reads = facts.options.get("reads", "texts")
    features = FEATURES[reads]
    if reads == "texts and images":  # two towers, of which a call of one keeps no trace
        image = FEATURES["images"]
        features = replace(image, answer="print(model.backbone.get_image_features(**inputs).pooler_output.shape)")
    usage, revision = usage_row({**_MERGED_USAGE, "AutoModel": features}, facts.auto_class), facts.revision or "main"
    if facts.options.get("chats") and not facts.routing:
        usage = CHAT
    if facts.auto_class.endswith("Classification") and not facts.options.get("task_heads"):
        usage = replace(usage, answer=PLAIN_USAGE[facts.auto_class].answer)  # one head for all
    example = (facts.routing or {}).get("example") or "Some text to look at."
    names = [expert.id for expert in facts.experts]
    owned = next(iter((facts.routing or {}).get("owners", {}).values()), None)
    task = owned if owned in names else facts.options.get("default_task") or names[0]
    answer = usage.answer.replace("{task}", json.dumps(str(task), ensure_ascii=False))
    traced = reads != "texts and images"
    return (
        f"{usage.imports}from transformers import {facts.auto_class}, {usage.processor}\n\n"
        f'repo, revision = "{facts.repo_id}", "{revision}"\n'
        f"processor = {usage.processor}.from_pretrained(repo, revision=revision, trust_remote_code=True)\n"
        f"model = {facts.auto_class}.from_pretrained(repo, revision=revision, trust_remote_code=True)\n\n"
        + ("model.record_routing = True  # keeps the coefficients of the last call\n" if traced else "")
        + usage.inputs.format(text=json.dumps(str(example), ensure_ascii=False))
        + f"\n{answer}\n"
        + (
            "means = model.routing_trace().coefficients().mean((0, 1))  # over samples and layers\n"
            "print(dict(zip(model.experts, means.tolist())))\n"
            if traced
            else ""
        )
    )


def _merged_options(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """From the config, and from the model it describes, built without memory."""
    from hf_fusion.hub.headers import on_meta
    from hf_fusion.models.configuration_wemoe import WEMoEConfig
    from hf_fusion.models.modeling_wemoe import WEMoEModel

    refuse_kernels(config, str(folder))
    model = on_meta(lambda: WEMoEModel(WEMoEConfig.from_pretrained(folder)))
    own, summary = model.config, model.summary()
    known = ("parameters", "upscaled_linears", "upscaled_parameters", "merged_parameters", "head_parameters")
    given = ("head", "routing", "router_layers", "shared_router", "batch_reduce", "scaling", "merge", "adaptation")
    options = {key: getattr(own, key) for key in given} | {key: summary[key] for key in known}
    linears = [linear for unit in model.units for linear in unit.linears if linear.biases is not None]
    options["upscaled_parameters"] += sum(linear.out_features for linear in linears)  # the base's biases
    ranks = [rank for unit in own.units for size in unit["sizes"] for rank in (size if isinstance(size, list) else [])]
    energy = list(summary["energy"].values()) or [1.0]
    storage = STORAGE[own.task_vectors].format(
        density=own.density,
        ranks=f"{min(ranks, default=0)} to {max(ranks, default=0)}" if len(set(ranks)) > 1 else max(ranks, default=0),
        energy=sum(energy) / len(energy),
        least=min(energy),
    )
    towers = all(hasattr(model.backbone, f"get_{kind}_features") for kind in ("text", "image"))
    reads = "texts and images" if towers else "images" if model.main_input_name == "pixel_values" else "texts"
    return options | {
        "router_parameters": summary["trainable"],
        "units": len(summary["units"]),
        "stored_bytes": summary["stored_bytes"],
        "merges": summary["relative_merge"] > 0,
        "storage": storage.replace("%", " %"),
        "top_k": own.num_experts_per_tok,
        "default_task": own.default_task,
        "task_heads": bool(own.task_heads),
        "adapters": sum(bool(row.get("adapter")) for row in own.experts),
        "reads": reads,
    }


def _merged_view(facts: CardFacts) -> dict[str, Any]:
    """What the suite's tables need, and the picture in words."""
    view, found = suite_view(facts), facts.routing
    if found:
        means = [[sum(layer) / len(rows) for layer in zip(*rows, strict=True)] for rows in found["coefficients"]]
        most = _most_by_task(found["experts"], found["tasks"], means, "{:.2f}")
        view["alt"] = f"Coefficients by layer, one panel a task. The expert with the largest mean on {most}"
    return view


CONTENTS = {
    "foe": CardContents(_foe_options, _foe_lacking, _foe_measured, _foe_usage),
    "phatgoose": CardContents(_routed_options, suite_lacking, suite_measured, _routed_usage, _routed_view),
    "wemoe": CardContents(_merged_options, suite_lacking, suite_measured, _merged_usage, _merged_view),
}
"""Name of a family, as in `families.FAMILIES` → what its cards say."""
