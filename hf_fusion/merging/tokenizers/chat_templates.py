"""Sets the merged model's chat template: by name, from a model, the most common one, or literal Jinja."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.hub.manifests import TEMPLATES as FOLDER
from hf_fusion.io.files import own_file, read_file, read_text
from hf_fusion.io.json_files import read_json

if TYPE_CHECKING:
    from hf_fusion.merging.engine.open_models import Model

FILE = "chat_template.jinja"
# the formats that mergekit knows by name
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% set told = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
        "{% set turns = messages[1:] if told else messages %}{{ bos_token }}{% for message in turns %}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
        "{{ raise_exception('After a system message, if there is one, user and assistant take turns') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ ' [INST] ' + (told if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% set titles = {'user': '### Instruction:', 'assistant': '### Response:', 'user_context': '### Input:'} %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
        "{% elif message['role'] in titles %}"
        "{{ titles[message['role']] + '\\n' + message['content'] | trim + '\\n\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def set_template(files: dict[str, bytes], wanted: str, models: Mapping[str, Model]) -> dict[str, bytes]:
    """Replaces the chat template in a tokenizer's files, with the additional templates of the same model.

    Args:
        files: name -> content.
        wanted: "auto", the most common one of the models; a key of `TEMPLATES`; one of the models; or Jinja.
        models: the merged models, by their names in the recipe.

    Raises:
        FusionError: it is none of these, or the model has no template.
    """
    giver: Model | None = None
    if wanted == "auto":
        found = Counter(own for model in models.values() if (own := read_template(model)))
        if not found:
            return files
        [(template, _)] = found.most_common(1)
        giver = next(model for model in models.values() if read_template(model) == template)
    elif wanted in TEMPLATES:
        template = TEMPLATES[wanted]
    elif wanted in models:
        own = read_template(models[wanted])
        if own is None:
            raise FusionError(f"chat_template: {wanted} has none", f"use auto, {', '.join(TEMPLATES)}, or Jinja")
        template, giver = own, models[wanted]
    elif "{" in wanted:
        template = wanted
    else:
        raise FusionError(
            f"chat_template: {shown(wanted)} is neither a known template nor one of the models",
            f"{suggestion(wanted, ['auto', *TEMPLATES, *models])} (or Jinja)",
        )
    if "tokenizer_config.json" not in files:
        raise FusionError("chat_template: the merged model has no tokenizer_config.json", "leave it out")
    config = json.loads(files["tokenizer_config.json"])
    config.pop("chat_template", None)  # stored in chat_template.jinja instead
    # additional templates (for tools …) belong to the template of the same model
    others = {k: raw for k, raw in files.items() if k != "chat_template.json" and not k.startswith(f"{FOLDER}/")}
    further = sorted(giver.folder.glob(f"{FOLDER}/*.jinja")) if giver else []
    others |= {f"{FOLDER}/{file.name}": read_file(file, giver.folder) for file in further if giver}
    return others | {
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        FILE: template.encode(),
    }


def read_template(model: Model) -> str | None:
    """A model's chat template, stripped; None if it has none."""
    if own_file(model.folder / FILE):
        return read_text(model.folder / FILE).strip() or None
    if not own_file(model.folder / "tokenizer_config.json"):
        return None
    found = read_json(model.folder / "tokenizer_config.json", model.name).get("chat_template")
    if isinstance(found, list):  # several by name
        found = {row.get("name"): row.get("template") for row in found if isinstance(row, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found.strip() or None if isinstance(found, str) else None
