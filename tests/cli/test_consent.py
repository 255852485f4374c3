"""Remote code runs only with consent: planted in each file of each kind of folder, tried with each command."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from planted import MODULE, PLACES, Planter, edit
from tiny import TEXTS, bert, distilbert, image_processor, images, make_tokenizer, vit
from tiny_fused import save_fine_tunes
from tiny_routed import save_base, save_lora

from hf_fusion import Expert, FoEModel, FusionError, fuse, load_experts, load_fused, save_fused
from hf_fusion.cards.card import write_card
from hf_fusion.hub.compat import ReasonKind, check_compatibility
from hf_fusion.hub.discover import discover
from hf_fusion.publishing.publish import publish

LABELS = ("x", "y")
Verb = Callable[[Path], Any]
# kind of a fused model's folder -> the part of `fit` for it, if there is one
FUSED = {"foe": "fuser", "texts": "fuser", "pictures": "fuser", "phatgoose": "", "wemoe": "routers", "merge": ""}
# kind of an expert's folder, or a base's -> the expert that is fused with it
OTHERS = {"foxes": "dogs", "vit-0": "vit-1", "lora-0": "lora-1", "base": "dogs", "llama": ""}
ROWS = {"pictures": "pixels", "vit-0": "pixels", "phatgoose": "prompts", "lora-0": "prompts", "llama": "prompts"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and bases of every kind, fused models of every family, and rows."""
    folder = tmp_path_factory.mktemp("made")
    save_fine_tunes(folder)
    save_base(folder / "llama")
    for number in range(2):
        save_lora(folder / f"lora-{number}", str(folder / "llama"), number)
        vit(LABELS, number).save_pretrained(folder / f"vit-{number}")
        image_processor(16).save_pretrained(folder / f"vit-{number}")
    tuned, loras = [folder / "foxes", folder / "dogs"], [folder / "lora-0", folder / "lora-1"]
    several = [
        Expert("me/bert", bert(LABELS), processor=make_tokenizer(), labels=list(LABELS)),
        Expert("me/distilbert", distilbert(LABELS), processor=make_tokenizer(290, lower=True), labels=list(LABELS)),
    ]
    save_fused(fuse("foe", tuned), folder / "foe")
    FoEModel.from_experts(several).save_pretrained(folder / "texts")
    save_fused(fuse("foe", [folder / "vit-0", folder / "vit-1"]), folder / "pictures")
    save_fused(fuse("phatgoose", loras), folder / "phatgoose")
    save_fused(fuse("wemoe", tuned, folder / "base"), folder / "wemoe")
    save_fused(fuse("linear", tuned, weights=[0.5, 0.5]), folder / "merge")
    tasks = [{"task": name, "expert": name, "text": TEXTS[0], "label": i} for i, name in enumerate(("foxes", "dogs"))]
    prompts = [{"task": f"lora-{i}", "expert": f"lora-{i}", "prompt": "a", "target": "b"} for i in range(2)]
    pixels = [{"image": image, "label": i % 2} for i, image in enumerate(images(2))]
    for name, rows in (("tasks", tasks), ("prompts", prompts), ("pixels", pixels)):
        Dataset.from_list(rows * 4).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def planter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planter]:
    """Plants code; whoever asks on stdin gets consent; the hostile module can be imported, as PEFT does."""
    elsewhere = tmp_path / "elsewhere"
    planter = Planter(tmp_path / "marker", elsewhere)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10_000))
    monkeypatch.syspath_prepend(str(elsewhere))
    yield planter
    sys.modules.pop(MODULE, None)


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token("consent"))


@pytest.fixture
def verbs(made: Path, here: Callable[..., str], api: HfApi) -> Callable[[str], dict[str, Verb]]:
    """Kind of a folder -> what is done to it."""

    def use(model: Any, folder: Path) -> None:
        processor = model.processor
        for own in getattr(processor, "processors", [processor]):
            with contextlib.suppress(jinja2.exceptions.SecurityError):
                if getattr(own, "chat_template", None):
                    own.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        model.save_pretrained(folder.parent / "again")

    def judge(folder: Path) -> None:
        api.create_repo("consent/judged", exist_ok=True)
        sha = api.upload_folder(repo_id="consent/judged", folder_path=folder, delete_patterns="*").oid
        for agreed in (False, True):
            check_compatibility(discover(ids=["consent/judged"], api=api), trust_remote_code=agreed, api=api)
        load_experts([f"consent/judged@{sha}"], api=api)

    def of(kind: str) -> dict[str, Verb]:
        data = ("--data", str(made / f"{ROWS.get(kind, 'tasks')}.parquet"))

        def fused(method: str, *words: str, other: str = OTHERS.get(kind, "")) -> Verb:
            experts = [str(made / other)] if other else []
            line = (
                "fuse",
                "--method",
                method,
                *words,
                "--output",
                f"of-{method}",
                "--overwrite",
                "--experts",
                *experts,
            )
            return lambda folder: here(*line, str(folder))

        shared: dict[str, Verb] = {
            "eval": lambda folder: here("eval", str(folder), *data),
            "judge": judge,
            "publish": lambda folder: publish(folder, "consent/fused", api=api),
            "card": write_card,
            "expert": lambda folder: load_experts([folder]),
        }
        if kind in FUSED:
            more = ("--steps", "1") if FUSED[kind] == "routers" else ()
            fit: dict[str, Verb] = {"fit": lambda folder: here("fit", FUSED[kind], str(folder), *data, *more)}
            return {
                "load": lambda folder: use(load_fused(folder)[0], folder),
                "fuse again": lambda folder: here("fuse", str(folder), "--output", "once more", "--overwrite"),
                "merge": fused("linear"),
                **shared,
                **(fit if FUSED[kind] else {}),
            }
        if kind == "llama":
            lora = str(made / "lora-0")
            gates = ("fit", "gates", lora, *data, "--steps", "1", "--output", "gates", "--overwrite", "--base")
            merge = ("fuse", "--method", "linear", "--experts", lora, "--output", "merged", "--overwrite", "--base")
            return {
                "base": lambda folder: load_experts([lora], base=folder),
                "gates": lambda folder: here(*gates, str(folder)),
                "linear": lambda folder: here(*merge, str(folder)),
                "judge": judge,
            }
        methods = {name: fused(name) for name in ("foe", "ensemble", "phatgoose", "linear", "lora")}
        based = {name: fused(name, "--base", str(made / "base")) for name in ("wemoe", "ties")}
        gates = (
            "fit",
            "gates",
            str(made / "lora-0"),
            *data,
            "--steps",
            "1",
            "--output",
            "gates",
            "--overwrite",
            "--base",
        )
        return {
            **methods,
            **based,
            **shared,
            "static": lambda folder: fuse("linear", [folder, made / OTHERS[kind]]),
            "gates": lambda folder: here("fit", "gates", str(folder), *data, "--steps", "1", "--output", "gates"),
            "from_experts": lambda folder: FoEModel.from_experts([str(folder), str(made / OTHERS[kind])]),
        }

    return of


def attack(planter: Planter, source: Path, place: str, folder: Path, verb: Verb) -> Exception | None:
    """What a verb says to a copy of a folder with code planted in one place, of which none runs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    planter.plant(place, folder)
    said = None
    try:
        verb(folder)
    except Exception as error:  # what it says is told below; here it only must not run
        said = error
    assert not planter.marker.exists(), f"{place}: {planter.marker.read_text()} ran"
    return said


KINDS = [*FUSED, *OTHERS]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_code_runs_without_consent(kind, verbs, made, planter, tmp_path):
    """Every verb on every kind of folder, each with code in another place; the slow test has all places."""
    for number, verb in enumerate(verbs(kind).values()):
        place = PLACES[(11 * KINDS.index(kind) + number) % len(PLACES)]
        attack(planter, made / kind, place, tmp_path / "work" / kind, verb)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_code_runs_without_consent_from_any_file(kind, place, verbs, made, planter, tmp_path):
    for verb in verbs(kind).values():
        attack(planter, made / kind, place, tmp_path / "work" / kind, verb)


def own(auto: str, folder: Path) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)


# place -> the kind of folder, and what runs code there: a test of the plants themselves
ALIVE: dict[str, tuple[str, Verb]] = {
    "config": ("foxes", lambda folder: own("AutoConfig", folder)),
    "config_of_no_known_type": ("foxes", lambda folder: own("AutoModel", folder)),
    "config_without_type": ("foxes", lambda folder: own("AutoConfig", folder)),
    "tokenizer": ("foxes", lambda folder: own("AutoTokenizer", folder)),
    "tokenizer_of_a_known_class": ("foxes", lambda folder: own("AutoTokenizer", folder)),
    "tokenizer_of_old": ("foxes", lambda folder: own("AutoTokenizer", folder)),
    "tokenizer_without_class": ("foxes", lambda folder: own("AutoTokenizer", folder)),
    "processor": ("vit-0", lambda folder: own("AutoImageProcessor", folder)),
    "image_processor": ("vit-0", lambda folder: own("AutoImageProcessor", folder)),
    "image_processor_of_a_known_class": ("vit-0", lambda folder: own("AutoImageProcessor", folder)),
    "feature_extractor": ("vit-0", lambda folder: own("AutoFeatureExtractor", folder)),
    "generation": ("llama", lambda folder: own("AutoModelForCausalLM", folder)),
    "another_repo": ("foxes", lambda folder: own("AutoConfig", folder)),
    "pickles": ("foxes", lambda folder: torch.load(folder / "pytorch_model.bin", weights_only=False)),
    "recipe": ("merge", lambda folder: yaml.unsafe_load((folder / "fusion.yaml").read_text())),
    "copies_of_this_package": ("foe", lambda folder: own("AutoModel", folder)),
}


@pytest.mark.parametrize("place", ALIVE)
def test_planted_code_runs_without_the_checks(place, made, planter, tmp_path):
    """Else the tests above could not fail."""
    kind, load = ALIVE[place]
    shutil.copytree(made / kind, tmp_path / kind)
    planter.plant(place, tmp_path / kind)
    with contextlib.suppress(Exception):
        load(tmp_path / kind)
    assert planter.marker.exists()


NEEDS = "needs its own code to run"
FOREIGN = "runs code of another repo"


@pytest.mark.parametrize(
    ("kind", "place", "verb", "said"),
    [
        ("foe", "tokenizer", "eval", f"foe {NEEDS} (tokenizer_config.json: auto_map.AutoTokenizer is"),
        ("texts", "tokenizer", "fit", f"texts/processor_0 {NEEDS} (tokenizer_config.json: auto_map.AutoTokenizer is"),
        ("pictures", "image_processor", "load", f"{NEEDS} (preprocessor_config.json: auto_map.AutoImageProcessor is"),
        ("wemoe", "tokenizer_of_old", "fit", f"wemoe {NEEDS} (tokenizer_config.json: auto_map is"),
        ("phatgoose", "another_repo_where_code_is_needed", "eval", "phatgoose takes its code from another repo"),
        ("phatgoose", "kernels", "card", f"{FOREIGN} (config.json: attn_implementation is 'evil/kernel')"),
        ("wemoe", "nested_kernels", "load", f"{FOREIGN} (config.json: "),
        ("merge", "architectures", "load", f"merge {NEEDS} (config.json: auto_map.AutoConfig is"),
        ("foxes", "config_without_type", "foe", f"foxes {NEEDS} (config.json: auto_map.AutoConfig is"),
        ("foxes", "kernels", "expert", f"foxes {FOREIGN} (config.json: attn_implementation is 'evil/kernel')"),
        ("foxes", "pickles_alone", "expert", "foxes has only pickle weights"),
        ("foe", "pickles_alone", "load", "model.safetensors"),
        ("vit-0", "processor", "foe", f"vit-0 {NEEDS} (processor_config.json: auto_map.AutoImageProcessor is"),
    ],
)
def test_errors_name_the_thing_the_place_and_the_next_command(kind, place, verb, said, verbs, made, planter, tmp_path):
    error = attack(planter, made / kind, place, tmp_path / "work" / kind, verbs(kind)[verb])
    assert isinstance(error, FusionError)
    assert said in error.message
    assert NEEDS not in said or (f"read {MODULE}.py" in error.hint and "--trust-remote-code" in error.hint)


@pytest.mark.parametrize("place", ["tokenizer_of_a_known_class", "config"])
@pytest.mark.parametrize("kind", ["foxes", "foe", "merge"])
def test_library_class_is_preferred_to_remote_code(kind, place, made, planter, tmp_path):
    """The code that an auto_map names is not needed: it runs neither without consent nor with it."""
    folder = tmp_path / kind
    shutil.copytree(made / kind, folder)
    planter.plant(place, folder)
    for agreed in (False, True):
        if kind == "foxes":
            [model] = load_experts([folder], trust_remote_code=agreed)
        else:
            model, _ = load_fused(folder, trust_remote_code=agreed)
        assert model.processor is not None
    assert not planter.marker.exists()


# what follows is the code of a model that needs it

TOKENIZER = """
from transformers import PreTrainedTokenizerFast
open({marker!r}, "a").write(__name__)
class ShoutingTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        text = text.upper() if isinstance(text, str) else [line.upper() for line in text]
        return super().__call__(text, *args, **kwargs)
"""


def bring_tokenizer(folder: Path, marker: Path) -> Path:
    """A folder whose tokenizer has a class that lies beside it."""
    (folder / "shouting.py").write_text(TOKENIZER.format(marker=str(marker)))
    named = {"AutoTokenizer": [None, "shouting.ShoutingTokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=named, tokenizer_class="ShoutingTokenizer")
    return folder


@pytest.fixture
def shouting(made: Path, planter: Planter, tmp_path: Path) -> dict[str, Path]:
    """Two classifiers and a Llama whose tokenizers run code of their own."""
    folders = {name: tmp_path / "own" / name for name in ("foxes", "dogs", "base", "llama")}
    for name, folder in folders.items():
        shutil.copytree(made / name, folder)
        bring_tokenizer(folder, planter.marker)
    return folders


def ran(planter: Planter) -> bool:
    """Whether code ran since the last look."""
    found = planter.marker.exists()
    planter.marker.unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.endswith("shouting")]:
        del sys.modules[name]  # else it would not run again
    return found


FAMILIES = ("foe", "several", "phatgoose", "wemoe", "merge")


@pytest.fixture
def fused_with_code(shouting: dict[str, Path], made: Path, planter: Planter, tmp_path: Path) -> Callable[[str], Path]:
    """Family -> the folder of a model made of experts with code."""

    def fused(family: str) -> Path:
        tuned, folder = [shouting["foxes"], shouting["dogs"]], tmp_path / family
        agreed: Any = {"trust_remote_code": True}
        if family == "several":  # and one expert with another tokenizer
            other = Expert(
                "me/other", distilbert(LABELS), processor=make_tokenizer(290, lower=True), labels=list(LABELS)
            )
            model: Any = FoEModel.from_experts([*load_experts([shouting["foxes"]], **agreed), other])
            model.save_pretrained(folder)
        elif family == "phatgoose":
            loras = [made / "lora-0", made / "lora-1"]
            experts = load_experts(loras, base=shouting["llama"], **agreed)
            save_fused(fuse("phatgoose", experts, **agreed), folder)
        elif family == "merge":
            save_fused(fuse("linear", tuned, **agreed), folder)
        else:
            save_fused(fuse(family, tuned, shouting["base"] if family == "wemoe" else None, **agreed), folder)
        assert ran(planter)
        return folder

    return fused


@pytest.mark.parametrize("family", FAMILIES)
def test_code_that_is_needed_runs_by_consent(family, fused_with_code, planter):
    folder = fused_with_code(family)
    with pytest.raises(FusionError, match=r"needs its own code to run \(tokenizer_config.json: auto_map") as caught:
        load_fused(folder)
    assert "read shouting.py" in caught.value.hint
    assert not ran(planter)
    model: Any = load_fused(folder, trust_remote_code=True)[0]
    tokenizer = getattr(model.processor, "processors", [model.processor])[0]
    assert tokenizer("the dog")["input_ids"] == make_tokenizer()("THE DOG")["input_ids"]
    assert ran(planter)
    if family == "several":
        assert (
            model.processor(text="the dog")["input_ids_1"][0].tolist()
            == make_tokenizer(290, lower=True)("the dog").input_ids
        )


@pytest.mark.parametrize("family", ["foe", "several", "phatgoose", "wemoe"])
def test_a_published_model_runs_its_code_by_consent(family, fused_with_code, planter):
    """As transformers loads it, without this package's classes: consent to the model's code is consent to this."""
    folder = fused_with_code(family)
    auto = transformers.AutoModelForCausalLM if family == "phatgoose" else transformers.AutoModel
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__
    tokenizer = getattr(model.processor, "processors", [model.processor])[0]
    assert tokenizer("the dog")["input_ids"] == make_tokenizer()("THE DOG")["input_ids"]
    assert ran(planter)


def test_code_of_another_repo_never_runs(fused_with_code, planter):
    folder = fused_with_code("several")
    foreign = {"AutoTokenizer": [None, f"{planter.elsewhere}--{MODULE}.Evil"]}
    edit(folder / "processor_0" / "tokenizer_config.json", auto_map=foreign)
    with pytest.raises(FusionError, match="takes its code from another repo"):
        load_fused(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="takes its code from another repo"):
        transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert not ran(planter)


@pytest.mark.long
def test_commands_pass_consent_on(fused_with_code, made, here, planter):
    data = ("--data", str(made / "tasks.parquet"))
    consent = "--trust-remote-code"
    for family, part in (("foe", "fuser"), ("wemoe", "routers")):
        folder = str(fused_with_code(family))
        more = ("--steps", "1") if part == "routers" else ()
        for words in (("eval", folder, *data), ("fit", part, folder, *data, *more, "--overwrite")):
            with pytest.raises(FusionError, match="needs its own code to run"):
                here(*words)
            assert not ran(planter)
            here(*words, consent)
            assert ran(planter)


def test_consent_does_not_extend_to_a_base_that_only_an_adapter_names(shouting, made, planter, tmp_path):
    adapter = tmp_path / "lora"
    shutil.copytree(made / "lora-0", adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(shouting["llama"]))
    with pytest.raises(FusionError, match="llama needs its own code to run, and its folder was not named") as caught:
        load_experts([adapter], trust_remote_code=True)
    assert str(shouting["llama"]) in caught.value.hint
    assert not ran(planter)
    load_experts([adapter], base=shouting["llama"], trust_remote_code=True)
    assert ran(planter)


@pytest.mark.parametrize(
    ("place", "said", "agreed"),
    [
        ("tokenizer", "needs its own code to run", True),
        ("config_of_no_known_type", "needs its own code to run", True),
        ("another_repo_where_code_is_needed", "takes its code from another repo", False),
        ("kernels", "runs code of another repo", False),
        ("tokenizer_of_a_known_class", "", True),
    ],
)
def test_discovery_marks_experts_with_code(place, said, agreed, made, planter, api, tmp_path):
    """What consent makes good, and what nothing does."""
    folder, repo = tmp_path / "foxes", f"consent/{place}"
    shutil.copytree(made / "foxes", folder)
    planter.plant(place, folder)
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
    found = discover(ids=[repo], api=api)
    for consent in (False, True):
        verdict = check_compatibility(found, trust_remote_code=consent, api=api)
        reasons = {reason.kind: str(reason) for rejected in verdict.rejected for reason in rejected.reasons}
        expected = said and not (consent and agreed)
        assert (ReasonKind.CUSTOM_CODE in reasons) == bool(expected)
        assert said in reasons.get(ReasonKind.CUSTOM_CODE, said)
    assert not ran(planter)
