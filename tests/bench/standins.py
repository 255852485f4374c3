"""Small stand-ins of what the Hub suites name, under the same ids.

Architectures, columns, classes and splits are the real ones; the weights are chance, and the rows few.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image, Sequence, Value, disable_progress_bars
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from tiny import bert, distilbert, llama, make_tokenizer, names, save_linearized, save_phatgoose_checkpoint, t5
from transformers import (
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

from hf_fusion.bench.suite import Suite, Task, is_hub_id, load_suite, suite_names
from hf_fusion.hub.files import repo_of

disable_progress_bars()

ROWS = 40

# ---------------------------------------------------------------- data sets

TEXT, NUMBER, FRACTION, PICTURE, FOUR, WORTH = "text", "number", "fraction", "picture", "four", "worth"
PIXELS, SEGMENTS, DEPTHS, NORMALS = "pixels", "segments", "depths", "normals"
HEIGHT, WIDTH = 32, 48  # of maps
Column = str | list[str] | tuple[str, ...]  # a kind, the names of classes, or plain values


@dataclass(frozen=True)
class Stored:
    """One configuration of a data set as it is on the Hub: its columns in order, and its splits."""

    columns: dict[str, Column]
    splits: tuple[str, ...] = ("train", "test")


def _glue(classes: list[str] | str, *texts: str, validation: tuple[str, ...] = ("validation",)) -> Stored:
    return Stored({**dict.fromkeys(texts, TEXT), "label": classes, "idx": NUMBER}, ("train", *validation))


def _superglue(*texts: str, classes: list[str]) -> Stored:
    return Stored({**dict.fromkeys(texts, TEXT), "idx": NUMBER, "label": classes}, ("train", "validation", "test"))


def _numbered(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


_DIGITS = [str(number) for number in range(10)]
_ENTAILED = ["entailment", "not_entailment"]
_SUMMARY = ("train", "validation", "test")
# id -> configuration -> what it holds; "*": any
# fmt: off
DATA: dict[str, dict[str, Stored]] = {
    **{
        f"tanganke/{name}": {"default": Stored({"image": PICTURE, "label": _numbered(count)})}
        for name, count in (("sun397", 397), ("stanford_cars", 196), ("resisc45", 45), ("eurosat", 10), ("gtsrb", 43))
    },
    "tanganke/dtd": {"default": Stored({"image": PICTURE, "label": _numbered(47)})},
    "ufldl-stanford/svhn": {"cropped_digits": Stored({"image": PICTURE, "label": _DIGITS}, ("train", "test", "extra"))},
    "ylecun/mnist": {"mnist": Stored({"image": PICTURE, "label": _DIGITS})},
    "nyu-mll/glue": {
        "cola": _glue(["unacceptable", "acceptable"], "sentence"),
        "mnli": _glue(
            ["entailment", "neutral", "contradiction"],
            *("premise", "hypothesis"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        "mrpc": _glue(["not_equivalent", "equivalent"], "sentence1", "sentence2"),
        "qnli": _glue(_ENTAILED, "question", "sentence"),
        "qqp": _glue(["not_duplicate", "duplicate"], "question1", "question2"),
        "rte": _glue(_ENTAILED, "sentence1", "sentence2"),
        "sst2": _glue(["negative", "positive"], "sentence"),
        "stsb": _glue(FRACTION, "sentence1", "sentence2"),
    },
    "lukaemon/bbh": {
        "boolean_expressions": Stored({"input": TEXT, "target": ("True", "False")}, ("test",)),
        "web_of_lies": Stored({"input": TEXT, "target": ("Yes", "No")}, ("test",)),
        "*": Stored({"input": TEXT, "target": TEXT}, ("test",)),
    },
    "cais/mmlu": {
        "*": Stored(
            {"question": TEXT, "subject": TEXT, "choices": FOUR, "answer": list("ABCD")},
            ("test", "validation", "dev"),
        )
    },
    "zeroshot/twitter-financial-news-sentiment": {
        "default": Stored({"text": TEXT, "label": NUMBER}, ("train", "validation"))
    },
    "google-research-datasets/poem_sentiment": {
        "default": Stored(
            {"id": NUMBER, "verse_text": TEXT, "label": ["negative", "positive", "no_impact", "mixed"]}, _SUMMARY
        )
    },
    "FinanceInc/auditor_sentiment": {
        "default": Stored({"sentence": TEXT, "label": ["negative", "neutral", "positive"]})
    },
    "Kaludi/data-reviews-sentiment-analysis": {
        "default": Stored({"text": TEXT, "target": ["Negative", "Positive"]}, ("train", "validation"))
    },
    "abisee/cnn_dailymail": {"3.0.0": Stored({"article": TEXT, "highlights": TEXT, "id": TEXT}, _SUMMARY)},
    "EdinburghNLP/xsum": {"default": Stored({"document": TEXT, "summary": TEXT, "id": TEXT}, _SUMMARY)},
    "alexfabbri/multi_news": {"default": Stored({"document": TEXT, "summary": TEXT}, _SUMMARY)},
    "FiscalNote/billsum": {
        "default": Stored({"text": TEXT, "summary": TEXT, "title": TEXT}, ("train", "test", "ca_test"))
    },
    "NortheasternUniversity/big_patent": {"all": Stored({"description": TEXT, "abstract": TEXT}, _SUMMARY)},
    "cornell-movie-review-data/rotten_tomatoes": {
        "default": Stored({"text": TEXT, "label": ["neg", "pos"]}, _SUMMARY)
    },
    "fancyzhx/ag_news": {"default": Stored({"text": TEXT, "label": ["World", "Sports", "Business", "Sci/Tech"]})},
    "google-research-datasets/paws": {
        "labeled_final": Stored({"id": NUMBER, "sentence1": TEXT, "sentence2": TEXT, "label": ["0", "1"]}, _SUMMARY)
    },
    "facebook/anli": {
        "plain_text": Stored(
            {"uid": TEXT, "premise": TEXT, "hypothesis": TEXT, "label": ["entailment", "neutral", "contradiction"],
             "reason": TEXT},
            tuple(f"{part}_r{number}" for number in (1, 2, 3) for part in ("train", "dev", "test")),
        )
    },
    "aps/super_glue": {
        "cb": _superglue("premise", "hypothesis", classes=["entailment", "contradiction", "neutral"]),
        "copa": _superglue("premise", "choice1", "choice2", "question", classes=["choice1", "choice2"]),
        "rte": _superglue("premise", "hypothesis", classes=_ENTAILED),
        "wic": _superglue("word", "sentence1", "sentence2", classes=["False", "True"]),
        "wsc.fixed": _superglue("text", "span1_text", "span2_text", classes=["False", "True"]),
    },
    "allenai/winogrande": {
        "winogrande_xl": Stored(
            {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": ("1", "2")}, ("train", "test", "validation")
        )
    },
    "Rowan/hellaswag": {
        "default": Stored(
            {"ind": NUMBER, "activity_label": TEXT, "ctx": TEXT, "endings": FOUR, "label": tuple("0123")},
            ("train", "test", "validation"),
        )
    },
    "tasksource/bigbench": {
        "*": Stored({"inputs": TEXT, "targets": FOUR, "multiple_choice_targets": FOUR,
                     "multiple_choice_scores": WORTH, "idx": NUMBER}, ("train", "validation"))
    },
    "tanganke/nyuv2": {
        "default": Stored(
            {"image": PIXELS, "segmentation": SEGMENTS, "depth": DEPTHS, "normal": NORMALS, "noise": DEPTHS},
            ("train", "val"),
        )
    },
    "Yale-LILY/aeslc": {"default": Stored({"email_body": TEXT, "subject_line": TEXT}, _SUMMARY)},
}
# fmt: on
_WORDS = ["fused", "experts", "answer", "better", "than", "any", "of", "them", "alone", "the", "router", "said"]


def _maps(chance: np.random.Generator) -> dict[str, Callable[[int], Any]]:
    """A scene whose left half is black and far, the right one bright and near; a strip of it was not measured."""
    left = np.arange(WIDTH) < WIDTH // 2

    def half(row: int, black: float, bright: float, channels: int, blank: float) -> np.ndarray:
        found = np.full((channels, HEIGHT, WIDTH), bright, dtype=np.float32)
        found[..., left] = black
        found[:, row % HEIGHT] = blank
        return found

    def normals(row: int) -> np.ndarray:
        found = half(row, 0.6, 0.8, 3, 0)
        found[0] = half(row, 0.8, 0.6, 1, 0)
        found[2] = 0
        return found

    return {
        PIXELS: lambda row: chance.uniform(0, 0.5, (3, HEIGHT, WIDTH)).astype("float32") + half(row, 0, 0.5, 3, 0),
        SEGMENTS: lambda row: half(row, 2, 7, 1, -1)[0].astype("int64"),
        DEPTHS: lambda row: half(row, 4, 1.5, 1, 0),
        NORMALS: normals,
    }


def rows(stored: Stored, split: str) -> Dataset:
    """`ROWS` rows of chance, others for each split; no two have the same texts or pictures."""
    chance = np.random.default_rng(sum(split.encode()))
    makers: dict[str, Callable[[int], Any]] = {
        TEXT: lambda row: " ".join(chance.choice(_WORDS, 5)) + f" {split} {row}",
        NUMBER: lambda row: row % 2,
        FRACTION: lambda row: round(float(chance.uniform(0, 5)), 1),
        PICTURE: lambda row: Pillow.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
        FOUR: lambda row: [f"{word} {row}" for word in chance.choice(_WORDS, 4)],
        WORTH: lambda row: [1, row % 2, 0, 0],
        **_maps(chance),
    }
    kinds = {TEXT: Value("string"), NUMBER: Value("int32"), FRACTION: Value("float32"), PICTURE: Image()}
    kinds |= {FOUR: Sequence(Value("string")), WORTH: Sequence(Value("int32"))}
    kinds |= {SEGMENTS: Array2D((HEIGHT, WIDTH), "int64"), DEPTHS: Array3D((1, HEIGHT, WIDTH), "float32")}
    kinds |= dict.fromkeys((PIXELS, NORMALS), Array3D((3, HEIGHT, WIDTH), "float32"))
    columns, features = {}, {}
    for name, kind in stored.columns.items():
        if isinstance(kind, list):
            features[name] = ClassLabel(names=kind)
            columns[name] = [int(chance.integers(len(kind))) for _ in range(ROWS)]
        elif isinstance(kind, tuple):
            features[name] = Value("string")
            columns[name] = [kind[int(chance.integers(len(kind)))] for _ in range(ROWS)]
        else:
            features[name] = kinds[kind]
            columns[name] = [makers[kind](row) for row in range(ROWS)]
    return Dataset.from_dict(columns, Features(features))


def save_data(name: str, configs: list[str], folder: Path) -> None:
    """A data set's repo: parquet for each configuration and split, and the README that lists them."""
    known, listed = DATA[name], []
    for config in configs:
        stored = known.get(config) or known["*"]
        (folder / config).mkdir(parents=True)
        for split in stored.splits:
            rows(stored, split).to_parquet(folder / config / f"{split}.parquet")
        files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in stored.splits]
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


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


def pegasus(source: str, seed: int, labels: list[str], folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 300, "max_position_embeddings": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
    _saved(
        moved(PegasusForConditionalGeneration(PegasusConfig(**sizes, **heads, **ids)), seed), make_tokenizer(), folder
    )


def language_model(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(llama(seed), make_tokenizer(), folder)


_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "bottleneck"}


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    return seen(ResNetForImageClassification(ResNetConfig(**_RESNET)))


def seen(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose batch norms have counted the pictures that they saw."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(4, 3, HEIGHT, WIDTH))
    return model.eval()


def resnet_base(source: str, seed: int, labels: list[str], folder: Path) -> None:
    _saved(resnet(), ConvNextImageProcessorPil(size={"shortest_edge": 64}), folder)


def dense(source: str, seed: int, labels: list[str], folder: Path) -> None:
    """A ResNet under a decoder of its own, for as many numbers a pixel as the task has; the base's are two."""
    config = ResNetConfig(**_RESNET, out_features=[f"stage{number}" for number in range(1, 5)])
    count = {"segmentation": 13, "depth": 1, "normal": 3}.get(source.rpartition("/")[2], 2)
    sizes = {"hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2]}
    torch.manual_seed(seed)
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, num_labels=count, **sizes))
    model.backbone.load_state_dict(resnet().resnet.state_dict())
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
    models = [repo_of(source)[0] for source in named if is_hub_id(source)]
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
