"""Three BERTs of chemical reactions from the wheel rxnfp (arXiv 2012.06051): one base and two fine-tunes of it.

The wheel has no reactions, and no wheel on PyPI has many. The reactions here are combinations of reaction families and
building blocks, as SMILES: enough to compare the models' outputs, but not to measure their quality in chemistry.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.io.cache import cache_folder
from hf_fusion.io.folders import make_once

if TYPE_CHECKING:
    from datasets import Dataset

MODELS = ("bert_pretrained", "bert_ft", "bert_ft_10k_25s")
# The pattern by which the wheel's tokenizer splits SMILES.
TOKENS = (
    r"%\([0-9]{3}\)|\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p"
    r"|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
MAX_LENGTH = 512
_SHAPE = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)

# family -> reactants and product of an alkyl and an aryl
FAMILIES = {
    "esterification": "{alkyl}O.O=C(O){aryl}>>{alkyl}OC(=O){aryl}",
    "amide coupling": "{alkyl}N.O=C(O){aryl}>>{alkyl}NC(=O){aryl}",
    "acylation": "{alkyl}N.O=C(Cl){aryl}>>{alkyl}NC(=O){aryl}",
    "Suzuki coupling": "{alkyl}B(O)O.Br{aryl}>>{alkyl}{aryl}",
    "Williamson ether": "{alkyl}Br.O{aryl}>>{alkyl}O{aryl}",
    "reductive amination": "{alkyl}N.O=C{aryl}>>{alkyl}NC{aryl}",
    "sulfonamide": "{alkyl}N.O=S(=O)(Cl){aryl}>>{alkyl}NS(=O)(=O){aryl}",
    "urea": "{alkyl}N.O=C=N{aryl}>>{alkyl}NC(=O)N{aryl}",
    "ester hydrolysis": "{alkyl}OC(=O){aryl}.O>>O=C(O){aryl}",
    "Boc deprotection": "{alkyl}N(C(=O)OC(C)(C)C){aryl}>>{alkyl}N{aryl}",
    "alcohol oxidation": "{alkyl}C(O){aryl}>>{alkyl}C(=O){aryl}",
    "Grignard addition": "{alkyl}[Mg]Br.O=C{aryl}>>{alkyl}C(O){aryl}",
}
_ALKYLS = ("C", "CC", "CCC", "CC(C)", "CCCC", "C1CCCCC1", "C1CCCC1", "CCOCC", "CC(C)C", "C=CC", "CCCCCC", "C1CC1C")
_ARYLS = (
    *("c1ccccc1", "c1ccc(C)cc1", "c1ccc(OC)cc1", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "c1ccncc1", "c1ccc(C#N)cc1"),
    *("c1cccc(C(F)(F)F)c1", "c1ccc2ccccc2c1", "c1ccsc1", "c1ccoc1", "c1ccc(C(C)(C)C)cc1"),
)


def reactions() -> Dataset:
    """Every family with every pair of building blocks.

    Returns:
        1,728 rows with columns text (SMILES) and label (the family).
    """
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [
        {"text": family.format(alkyl=alkyl, aryl=aryl), "label": label}
        for (label, family), alkyl, aryl in product(enumerate(FAMILIES.values()), _ALKYLS, _ARYLS)
    ]
    return Dataset.from_list(rows, Features({"text": Value("string"), "label": ClassLabel(names=list(FAMILIES))}))


def rxnfp_folder(name: str) -> Path:
    """The folder of one of the wheel's `MODELS` in the cache (config, safetensors, tokenizer), made on the first call.

    The wheel contains pickles, which are read with ``weights_only=True``, and configs without ``model_type``. The heads
    for pre-training and classification are left out. The wheel is not imported, since its code needs RDKit.

    Raises:
        FusionError: the name is unknown, or the wheel is not installed.
    """
    if name not in MODELS:
        raise FusionError(f"rxnfp has no model {name!r}", hint=suggestion(name, MODELS))
    folder = cache_folder() / "models" / "rxnfp" / name
    if folder.is_dir():
        return folder
    spec = find_spec("rxnfp")
    source = Path(spec.origin).parent / "models" / "transformers" / name if spec and spec.origin else None
    if source is None or not (source / "pytorch_model.bin").is_file():
        raise FusionError("the wheel rxnfp was not found", hint="pip install --no-deps rxnfp")
    return make_once(folder, lambda partial: _convert(source, partial))


def _convert(source: Path, folder: Path) -> None:
    """Converts the pickle in `source` to config, safetensors and tokenizer in `folder`."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    old_config = json.loads((source / "config.json").read_text())
    model = BertModel(BertConfig(**{key: old_config[key] for key in _SHAPE}))
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    tensors = {key.removeprefix("bert."): tensor for key, tensor in state.items()}
    model.load_state_dict({key: tensors[key] for key in model.state_dict()})
    model.save_pretrained(folder)
    lines = (source / "vocab.txt").read_text().split("\n")
    vocabulary = {token: index for index, token in enumerate(lines) if token}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKENS), "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **special).save_pretrained(folder)
