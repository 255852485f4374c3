"""The usage block of a card: the Python that a reader copies to load the model and call it once.

`usage_block` picks the script of the model's family; a family has one row in `SCRIPTS`, and so have static merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_fusion.cards.static_merge import MERGE
from hf_fusion.errors import FusionError
from hf_fusion.hub.task_heads import head_of_architecture
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from hf_fusion.cards.facts import CardFacts


@dataclass(frozen=True)
class ModelCall:
    """How a model with one kind of head is called: lines of Python.

    Attributes:
        inputs: prepare ``inputs``, and ``example`` where `pipeline` is set; ``{text}`` is an example text.
        outputs: call the model and print its prediction.
        imports: lines above the import from transformers.
        processor: Auto class of the processor; empty where the model is called without one.
        pipeline: whether `transformers.pipeline` takes ``example`` too (shown for a Fusion of Experts only).
    """

    inputs: str
    outputs: str
    imports: str = ""
    processor: str = "AutoTokenizer"
    pipeline: bool = True


def usage_block(facts: CardFacts) -> str:
    """The usage block of a card, with the revision pinned that `facts` names.

    Raises:
        FusionError: the family has no example for a head of that Auto class.
    """
    return SCRIPTS[facts.family](facts)


def usage_code(card: str) -> str:
    """The usage block in a rendered card.

    Raises:
        FusionError: the card has none.
    """
    match = re.search(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    if match is None:
        raise FusionError("the card has no usage block")
    return match[1]


def pinned_revision(card: str) -> str | None:
    """The commit that the usage block of a rendered card pins; None for a card that `usage_block` did not write."""
    match = re.search(r'^repo, revision = "[^"]+", "([0-9a-f]{40})"', card, re.MULTILINE)
    return match[1] if match else None


def _script(
    facts: CardFacts, call: ModelCall, *, auto: str, example: str, load: str = "", code: bool = True, names: str = ""
) -> str:
    """Imports, the pinned repo, processor and model, and one call.

    Args:
        facts: about the model.
        call: for its head.
        auto: class that loads the model.
        example: the example text, unquoted.
        load: lines that load the model; default is ``auto.from_pretrained``.
        code: whether the repo's code has to be trusted.
        names: further names to import from transformers, with a comma in front.
    """
    arguments = f"repo, revision=revision{', trust_remote_code=True' if code else ''}"
    lines = [
        f"{call.imports}from transformers import {', '.join(filter(None, (auto, call.processor)))}{names}",
        "",
        f"repo, revision = {json.dumps(facts.repo_id)}, {json.dumps(facts.revision or 'main')}",
        f"processor = {call.processor}.from_pretrained({arguments})" if call.processor else None,
        load or f"model = {auto}.from_pretrained({arguments})",
        "",
        call.inputs.format(text=json.dumps(example, ensure_ascii=False)) or None,
        call.outputs,
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"


def _call_of(calls: Mapping[str, ModelCall], auto_class: str) -> ModelCall:
    if auto_class not in calls:
        raise FusionError(f"usage code for {auto_class} is not supported")
    return calls[auto_class]


# ---------------------------------------------------------------- calls, by Auto class of the head

EXAMPLE = "An example sentence."
_IMAGE = 'example = Image.new("RGB", (64, 64))  # your image\n'
_IMAGE_IMPORT = "from PIL import Image\n"
_LABELS = "print([model.config.id2label[i] for i in model(**inputs).logits.argmax(-1).tolist()])"

_GENERATION = ModelCall(
    'example = {text}\ninputs = processor(example, return_tensors="pt")',
    "answer = model.generate(**inputs, max_new_tokens=20)\n"
    "print(processor.decode(answer[0], skip_special_tokens=True))",
)
# a language model that was tuned on a chat template gives nonsense without it
_CHAT = ModelCall(
    'example = [{{"role": "user", "content": {text}}}]\n'
    "inputs = processor.apply_chat_template("
    'example, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
    "answer = model.generate(**inputs, max_new_tokens=20)\n"
    'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)
_TEXT = ModelCall('example = {text}\ninputs = processor(example, return_tensors="pt")', _LABELS)
_CALLS = {
    "AutoModelForCausalLM": _GENERATION,
    "AutoModelForSeq2SeqLM": _GENERATION,
    "AutoModelForSequenceClassification": _TEXT,
    "AutoModelForTokenClassification": ModelCall(_TEXT.inputs, _LABELS.replace(".tolist()", "[0].tolist()")),
    "AutoModelForImageClassification": ModelCall(
        f'{_IMAGE}inputs = processor(images=[example], return_tensors="pt")',
        _LABELS,
        imports=_IMAGE_IMPORT,
        processor="AutoImageProcessor",
    ),
}
# models without a head, by their modality
_FEATURES = {
    "texts": ModelCall(_TEXT.inputs, "print(model(**inputs).last_hidden_state.shape)"),
    "images": ModelCall(
        _CALLS["AutoModelForImageClassification"].inputs,
        "print(model(**inputs).last_hidden_state.shape)",
        imports=_IMAGE_IMPORT,
        processor="AutoImageProcessor",
    ),
    "texts and images": ModelCall(
        _TEXT.inputs, "print(model.backbone.get_text_features(**inputs).pooler_output.shape)"
    ),
}

# ---------------------------------------------------------------- Fusion of Experts

_FOE_GENERATION = ModelCall(
    "inputs = processor([{text}])",
    "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True))",
    processor="AutoProcessor",
    pipeline=False,
)
_FOE_CALLS = {
    "AutoModelForSequenceClassification": ModelCall(
        "example = {text}\ninputs = processor([example])", _LABELS, processor="AutoProcessor"
    ),
    "AutoModelForImageClassification": ModelCall(
        f"{_IMAGE}inputs = processor(images=[example])", _LABELS, imports=_IMAGE_IMPORT, processor="AutoProcessor"
    ),
    "AutoModelForCausalLM": _FOE_GENERATION,
    "AutoModelForSeq2SeqLM": _FOE_GENERATION,
}


def _foe_script(facts: CardFacts) -> str:
    call = _call_of(_FOE_CALLS, facts.auto_class)
    task = json.dumps(facts.pipeline_tag)
    if not call.pipeline:
        return _script(facts, call, auto=facts.auto_class, example=EXAMPLE)
    return (
        _script(facts, call, auto=facts.auto_class, example=EXAMPLE, names=", pipeline")
        + f"\npipe = pipeline({task}, model=repo, revision=revision, trust_remote_code=True)\n"
        + "print(pipe(example))\n"
    )


# ---------------------------------------------------------------- PHATGOOSE and WEMoE


def _traced_call(call: ModelCall, before: str, after: str) -> ModelCall:
    """A call with routing recorded before it and printed after it."""
    return replace(call, inputs=f"{before}\n{call.inputs}", outputs=f"{call.outputs}\n{after}")


def _measured_example(facts: CardFacts) -> str:
    """A row of the data that routing was measured on, where it was measured."""
    return str((facts.routing or {}).get("example") or EXAMPLE)


def _phatgoose_script(facts: CardFacts) -> str:
    features = _FEATURES[facts.options.get("reads", "texts")]
    call = _call_of({**_CALLS, "AutoModel": features}, facts.auto_class)
    if facts.options.get("chats") and not facts.routing:  # measured rows have the chat template applied already
        call = _CHAT
    call = _traced_call(
        call,
        "model.record_routing = 4096  # tokens to keep; 0, the default, costs nothing",
        "print(model.routing_trace().usage())  # each expert's share of the routing weight",
    )
    return _script(facts, call, auto=facts.auto_class, example=_measured_example(facts))


_OF_TASK = (
    "task = {task}  # which expert's head predicts: one of model.experts\n"
    "answer = model(**inputs, task=task).logits[0].argmax(-1)\n"
    'labels = model.config.experts[model.experts.index(task)]["labels"]\n'
)
# with a head for each expert
_TASK_CALLS = {
    auto: replace(_CALLS[auto], outputs=_OF_TASK + printed)
    for auto, printed in (
        ("AutoModelForSequenceClassification", "print(labels[int(answer)])"),
        ("AutoModelForTokenClassification", "print([labels[i] for i in answer.tolist()])"),
        ("AutoModelForImageClassification", "print(labels[int(answer)])"),
    )
}


def _wemoe_script(facts: CardFacts) -> str:
    reads = facts.options.get("reads", "texts")
    features, traced = _FEATURES[reads], True
    if reads == "texts and images":  # two towers: a call of one of them records no trace
        image = _FEATURES["images"]
        features = replace(image, outputs="print(model.backbone.get_image_features(**inputs).pooler_output.shape)")
        traced = False
    heads = _TASK_CALLS if facts.options.get("task_heads") else {}
    call = _call_of({**_CALLS, **heads, "AutoModel": features}, facts.auto_class)
    if facts.options.get("chats") and not facts.routing:
        call = _CHAT
    names = [expert.id for expert in facts.experts]
    owned = next(iter((facts.routing or {}).get("owners", {}).values()), None)
    task = owned if owned in names else facts.options.get("default_task") or names[0]
    call = replace(call, outputs=call.outputs.replace("{task}", json.dumps(str(task), ensure_ascii=False)))
    if traced:
        call = _traced_call(
            call,
            "model.record_routing = True  # keeps the coefficients of the last call",
            "means = model.routing_trace().coefficients().mean((0, 1))  # over samples and layers\n"
            "print(dict(zip(model.experts, means.tolist())))",
        )
    return _script(facts, call, auto=facts.auto_class, example=_measured_example(facts))


# ---------------------------------------------------------------- static merges

_TEXT_AND_IMAGE = ModelCall(
    f'{_IMAGE}inputs = processor(text=[{{text}}], images=[example], return_tensors="pt", padding=True)',
    "print(model(**inputs).keys())",
    imports=_IMAGE_IMPORT,
    processor="AutoProcessor",
)
# a model without a processor, or with a head that has no example
_LOADED = ModelCall("", "print(type(model).__name__, model.num_parameters())", processor="")
_SENTENCES = """from sentence_transformers import SentenceTransformer

repo, revision = {repo}, {revision}
model = SentenceTransformer(repo, revision=revision{code})
print(model.encode(["{example}"]).shape)  # pooled as its modules configure
"""


def _merge_script(facts: CardFacts) -> str:
    """Plain transformers: the repo's code is trusted only where the experts have custom code."""
    options, auto = facts.options, facts.auto_class
    if options.get("sentences"):
        code = ", trust_remote_code=True" if options["code"] else ""
        repo, revision = json.dumps(facts.repo_id), json.dumps(facts.revision or "main")
        return _SENTENCES.format(repo=repo, revision=revision, code=code, example=EXAMPLE)
    call = _CHAT if options.get("chats") else _merge_call(facts)
    if auto == "AutoModel" and options["class"] and not head_of_architecture(options["class"]) and not options["code"]:
        auto = options["class"]  # no Auto class that we know loads this head
    if not options["adapter"]:
        return _script(facts, call, auto=auto, example=EXAMPLE, code=options["code"])
    base = ModelRef.parse_repo(facts.base or "owner/base")
    labels = f", num_labels={len(facts.experts[0].labels)}" if facts.experts[0].labels else ""
    pin = f", revision={json.dumps(base.revision)}" if base.revision else ""
    load = f"base = {auto}.from_pretrained({json.dumps(base.id)}{pin}{labels})\n"
    load += "model = PeftModel.from_pretrained(base, repo, revision=revision)"
    call = replace(call, imports=f"{call.imports}from peft import PeftModel\n")
    return _script(facts, call, auto=auto, example=EXAMPLE, load=load, code=options["code"])


def _merge_call(facts: CardFacts) -> ModelCall:
    """By the processors that the merge has, and its head."""
    options = facts.options
    if options["texts"] and options["images"]:
        return _TEXT_AND_IMAGE
    if not options["texts"] and not options["images"]:
        return _LOADED
    if facts.auto_class == "AutoModel":
        features = _FEATURES["images" if options["images"] else "texts"]
        return features if head_of_architecture(options["class"]) else _LOADED
    call = _CALLS.get(facts.auto_class, _LOADED)
    return call if (call.processor == "AutoImageProcessor") == options["images"] else _LOADED


SCRIPTS: dict[str, Callable[[CardFacts], str]] = {
    "foe": _foe_script,
    "phatgoose": _phatgoose_script,
    "wemoe": _wemoe_script,
    MERGE: _merge_script,
}
"""Family, as in `families.FAMILIES`, or `MERGE` → what writes its usage block."""
