"""Small stand-ins of what the Hub suites name, under the same ids.

Architectures, columns, classes and splits are the real ones; the weights are chance, and the rows few.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from standin_data import DATA, HEIGHT, WIDTH, numbered, save_data
from tiny import (
    bert,
    distilbert,
    image_processor,
    llama,
    make_tokenizer,
    names,
    resnet,
    save_linearized,
    save_phatgoose_checkpoint,
    t5,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    ConvNextImageProcessorPil,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_fusion.bench.sources import is_hub_id
from hf_fusion.bench.suite import Suite, Task, load_suite, suite_names
from hf_fusion.hub.refs_to_files import repo_ref

disable_progress_bars()

# ---------------------------------------------------------------- models

Maker = Callable[[str, int, list[str], Path], None]  # source, seed, labels, folder


def _saved(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _clip(seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **sizes,
        "hidden_size": 48,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def clip_base(source: str, seed: int, labels: list[str], folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 128
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    _saved(_clip(0), CLIPProcessor(images, tokenizer), folder)


def clip_tower(source: str, seed: int, labels: list[str], folder: Path) -> None:
    tower = CLIPVisionModel(_clip(0).config.vision_config)
    missing = tower.load_state_dict(_clip(0).state_dict(), strict=False).missing_keys
    if missing:  # the tower bears a prefix of its own
        tower.load_state_dict(_clip(0).vision_model.state_dict())
    _saved(moved(tower, seed), None, folder)


def clip_lora(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _adapter(_clip(0).vision_model, seed, ["q_proj", "v_proj"], "openai/clip-vit-base-patch16", folder)


def clip_l_lora(source: str, seed: int, labels: list[str], folder: Path) -> None:
    save_linearized(
        folder, _clip(0).vision_model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), seed
    )


def moved(model: torch.nn.Module, seed: int, by: float = 0.02) -> torch.nn.Module:
    """A fine-tune of a model: every weight a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def _adapter(model: Any, seed: int, targets: list[str], base: str, folder: Path, **options: Any) -> None:
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: peft\n---\n")


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}


def gpt2_base(source: str, seed: int, labels: list[str], folder: Path) -> None:
    torch.manual_seed(0)
    _saved(GPT2LMHeadModel(GPT2Config(**_GPT2)), make_tokenizer(), folder)


def gpt2_classifier(source: str, seed: int, labels: list[str], folder: Path) -> None:
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**_GPT2, pad_token_id=0, **names(labels)))
    torch.manual_seed(0)
    model.transformer.load_state_dict(GPT2LMHeadModel(GPT2Config(**_GPT2)).transformer.state_dict())
    _saved(moved(model, seed), make_tokenizer(), folder)


def t5_base(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(t5(0), make_tokenizer(), folder)


def t5_full(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(moved(t5(0), seed), make_tokenizer(), folder)


def t5_lora(source: str, seed: int, labels: list[str], folder: Path) -> None:
    base = "google/flan-t5-base" if "-base_" in source else "google/flan-t5-large"
    _adapter(t5(0), seed, ["q", "v"], base, folder, task_type="SEQ_2_SEQ_LM")


def phatgoose_checkpoint(source: str, seed: int, labels: list[str], folder: Path) -> None:
    """As many experts as the real one has, in one file."""
    save_phatgoose_checkpoint(folder / "best.pt", t5(0), 36 if "P3" in source else 166)


def classifier(source: str, seed: int, labels: list[str], folder: Path) -> None:
    """Experts that share nothing: two architectures and four vocabularies."""
    model = (bert if seed % 2 else distilbert)(labels, seed)
    _saved(model, make_tokenizer(300 + 10 * (seed % 7), lower=True), folder)


def _sequences(config: Any, model: Any, seed: int, folder: Path, start: int) -> None:
    """An encoder-decoder; `start` is the token that its decoder begins with."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 300, "max_position_embeddings": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
    made = model(config(**sizes, **heads, **ids, decoder_start_token_id=start))
    _saved(moved(made, seed), make_tokenizer(), folder)


def pegasus(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _sequences(PegasusConfig, PegasusForConditionalGeneration, seed, folder, start=0)


def bart(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _sequences(BartConfig, BartForConditionalGeneration, seed, folder, start=2)


def superclass_expert(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(resnet(numbered(20), seed), image_processor(32), folder)


def language_model(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(llama(seed), make_tokenizer(), folder)


_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "bottleneck"}


def resnet_encoder() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return seen(ResNetForImageClassification(ResNetConfig(**_RESNET)))


def seen(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose batch norms have counted the pictures that they saw."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(4, 3, HEIGHT, WIDTH))
    return model.eval()


def resnet_base(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(resnet_encoder(), ConvNextImageProcessorPil(size={"shortest_edge": 64}), folder)


def dense(source: str, seed: int, labels: list[str], folder: Path) -> None:
    """A ResNet under a decoder of its own, for as many numbers a pixel as the task has; the base's are two."""
    config = ResNetConfig(**_RESNET, out_features=[f"stage{number}" for number in range(1, 5)])
    count = {"segmentation": 13, "depth": 1, "normal": 3}.get(source.rpartition("/")[2], 2)
    sizes = {"hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2]}
    torch.manual_seed(seed)
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, num_labels=count, **sizes))
    model.backbone.load_state_dict(resnet_encoder().resnet.state_dict())
    if count != 2:
        seen(moved(model, seed))
    _saved(model, ConvNextImageProcessorPil(do_resize=False), folder)


# a pattern of ids -> what is made under them; the first that fits
MODELS: tuple[tuple[str, Maker], ...] = (
    (r"openai/clip-.*", clip_base),
    (r"tanganke/clip-.*_lora-16", clip_lora),
    (r"tanganke/clip-.*_l-lora-16", clip_l_lora),
    (r"tanganke/clip-.*", clip_tower),
    (r"openai-community/gpt2", gpt2_base),
    (r"tanganke/gpt2_.*", gpt2_classifier),
    (r"tanganke/flan-t5-.*_lora-16|lorahub/.*", t5_lora),
    (r"tanganke/flan-t5-.*", t5_full),
    (r"google/flan-t5-.*", t5_base),
    (r"google/t5-.*", t5_base),
    (r"r-three/.*", phatgoose_checkpoint),
    (r"google/pegasus-.*", pegasus),
    (r"facebook/bart-.*", bart),
    (r"MingZhong/unieval-.*", t5_full),
    (r"cache:foe-cifar100/.*", superclass_expert),
    (r".*/(finbert|clasificador|auditor|Reviews).*", classifier),
    (r"microsoft/resnet-.*", resnet_base),
    (r"cache:nyuv2/.*", dense),
    (r".*", language_model),
)


def maker(source: str) -> Maker:
    """What makes the stand-in of an id."""
    return next(make for pattern, make in MODELS if re.fullmatch(pattern, source))


# ---------------------------------------------------------------- filling a Hub


def labels_of(task: Task | None) -> list[str]:
    """The classes of a task, as its expert's head has them."""
    if task is None or task.prompt or not is_hub_id(task.data):
        return []
    if task.classes:
        return list(task.classes)
    known = DATA[task.data]
    stored = known.get(task.config or "default") or next(iter(known.values()))
    found = stored.columns[task.columns.get("label", "label")]
    return list(found) if isinstance(found, list) else []


def fill(hub: Any, suite: Suite | str, only: tuple[str, ...] = ()) -> None:
    """Pushes a suite's base, experts and data, or those of some of its tasks, as their owners; what is there stays."""
    suite = load_suite(suite) if isinstance(suite, str) else suite
    tasks = [task for name, task in suite.tasks.items() if not only or name in only]
    owners = {task.expert: task for task in tasks if task.expert}
    sources = [source for source in suite.experts.values() if not only or source in owners or not owners]
    named = [*([suite.base] if suite.base else []), *sources]
    models = [repo_ref(source).repo for source in named if is_hub_id(source)]
    data: dict[str, list[str]] = {}
    others = [task for name in suite_names() for task in load_suite(name).tasks.values()]
    for task in (*suite.tasks.values(), *others):  # a data set has all the configurations that any suite names
        if task.data in {own.data for own in tasks}:
            config = task.config or next(iter(DATA[task.data]))
            data.setdefault(task.data, [])
            data[task.data] += [config] if config not in data[task.data] else []
    for name in data:
        data[name] = list(dict.fromkeys([*data[name], *(c for c in DATA[name] if c != "*")]))
    for source in dict.fromkeys(models):
        push(hub, source, labels_of(owners.get(source)))
    for source, api in _missing(hub, list(data), "dataset"):
        with tempfile.TemporaryDirectory() as folder:
            save_data(source, data[source], Path(folder))
            api.upload_folder(repo_id=source, folder_path=folder, repo_type="dataset")


def push(hub: Any, source: str, labels: list[str] | None = None) -> None:
    """Pushes the stand-in of a model as its owner, if it is not there."""
    for _, api in _missing(hub, [source], "model"):
        with tempfile.TemporaryDirectory() as folder:
            maker(source)(source, sum(source.encode()), labels or [], Path(folder))
            api.upload_folder(repo_id=source, folder_path=folder)


def make_here(suite: Suite, cache: Path) -> None:
    """Makes what a suite's build command would leave in the cache's folder."""
    for source in filter(None, (suite.base, *suite.experts.values())):
        if source.startswith("cache:"):
            maker(source)(source, sum(source.encode()), [], cache / source.removeprefix("cache:"))


def _missing(hub: Any, ids: list[str], kind: str) -> Iterator[tuple[str, HfApi]]:
    for source in dict.fromkeys(ids):
        api = HfApi(endpoint=hub.endpoint, token=hub.token(source.partition("/")[0]))
        if not api.repo_exists(source, repo_type=kind):
            api.create_repo(source, repo_type=kind)
            yield source, api
