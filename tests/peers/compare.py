"""Our methods beside mergekit's, fusion_bench's and PEFT's, on the same small checkpoints.

    make peers                                         # installs them in an environment of their own, then runs this
    .venv/bin/python tests/peers/compare.py --only ties --output peers.json

A LLaMA of 3 layers and three experts that differ from it in every element, in float32. The difference of a case is the
largest one of any element, as a share of the peer's largest step from the base.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import CASES, MODELS, Case
from more_cases import ADAPTERS, ADDED, OTHERS, ROWS, VOCABULARIES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.recipe_files import load_recipe
from hf_fusion.recipe import Recipe, RecipeExpert, Slice, SliceSource
from hf_fusion.training.expert_statistics import Statistics

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NOT_COMPARED = {
    "recombination": "drawn at random, layer by layer: which layers is all that there is to compare",
}


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        difference: largest difference of an element, as a share of the peer's largest step from the base.
        outliers: share of the elements that differ by more than the tolerance.
        kept: shares of the elements that moved, ours and the peer's, where entries are dropped at random.
        off: of half-precision checkpoints, how far ours and the peer's are from the merge in float32, as a share of
            the step from the base (root mean square).
        error: of the peer, or ours.
    """

    case: str
    method: str
    peer: str
    difference: float | None = None
    outliers: float | None = None
    kept: tuple[float, float] | None = None
    off: tuple[float, float] | None = None
    error: str = ""
    agrees: bool = False
    differs: str = ""


def checkpoints(folder: Path) -> None:
    """The base, the experts, and what might have been measured of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save(model, folder, "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, name in enumerate(MODELS[1:], 1):
        step = {key: torch.randn_like(value) * 0.01 * number for key, value in base.items()}
        model.load_state_dict({key: value + step[key] for key, value in base.items()})
        save(model, folder, name)
        squares = {key: torch.rand_like(value) ** 4 * number for key, value in base.items()}
        Statistics("fisher", name, 1, squares, {key: (key, 0) for key in squares}).save(folder / f"{name}-fisher")
        inputs = {key: torch.randn(4 * m.in_features, m.in_features) for key, m in linears(model).items()}
        grams = {key: x.T @ x / len(x) for key, x in inputs.items()}
        places = {f"{key}.weight": (key, 1) for key in grams}
        Statistics("gram", name, 1, grams, places).save(folder / f"{name}-gram")
    more_checkpoints(folder)


def more_checkpoints(folder: Path) -> None:
    """Adapters of the base, LLaMAs of unlike vocabularies and a GPT-2."""
    place = folder / "float32"
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(number)
        base = LlamaForCausalLM.from_pretrained(place / "base")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(place / name)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    for number, name in enumerate(VOCABULARIES):
        torch.manual_seed(10 + number)
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=ROWS[name])).save_pretrained(place / name)
        words = ["<s>", "</s>", "<unk>", *(f"word{i}" for i in range(3, 64))]
        save_tokenizer(place / name, words, [*words[:3], *ADDED[name]])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64))
    model.save_pretrained(place / "gpt2")
    tensors = load_file(place / "gpt2" / "model.safetensors")  # with the names that the Hub's GPT-2 has
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, place / "gpt2" / "model.safetensors", metadata={"format": "pt"})


def save(model: LlamaForCausalLM, folder: Path, name: str) -> None:
    """A model in both types, with a tokenizer that all versions of transformers read."""
    words = ["<s>", "</s>", "<unk>", "fox", "dog", "router", "gate", "lazy", "experts", "are", "fused"]
    for dtype, own in (("float32", model), ("bfloat16", deepcopy(model).bfloat16())):
        own.save_pretrained(folder / dtype / name)
        save_tokenizer(folder / dtype / name, words, words[:3])


def save_tokenizer(place: Path, words: list[str], special: list[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(special)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps(kind))


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def placed(content: Any, folder: Path) -> Any:
    """A recipe with the models' folders for their names; "=base" is the word."""
    if isinstance(content, dict):
        return {key: placed(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [placed(value, folder) for value in content]
    if isinstance(content, str) and content.startswith("="):
        return content[1:]
    return str(folder / content) if content in (*MODELS, *OTHERS) else content


def ours(case: Case, folder: Path, out: Path) -> None:
    """Merges a case with hf_fusion."""
    if case.peer == "mergekit":  # its recipe, as it is
        recipe = out.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(placed(case.theirs, folder / case.stored)))
        merge(load_recipe(recipe), out)
        return
    own = case.own or ({},) * len(case.experts)
    experts = tuple(
        RecipeExpert(
            str(folder / case.stored / name),
            settings.get("weight"),
            {k: placed_statistics(v, folder) for k, v in settings.items() if k != "weight"},
        )
        for name, settings in zip(case.experts, own, strict=True)
    )
    slices = tuple(Slice((SliceSource(experts[0].model, tuple(layers)),)) for layers in case.slices)
    if case.method == "lora":  # adapters become one, which is then merged into its base
        merge(Recipe("lora", experts, None, dict(case.ours)), out.with_name(f"{out.name} adapter"))
        merge(Recipe("linear", (RecipeExpert(str(out.with_name(f"{out.name} adapter"))),)), out)
        return
    base = str(folder / case.stored / "base") if case.base else None
    merge(Recipe(case.method, experts, base, dict(case.ours), slices=slices), out)


def placed_statistics(value: Any, folder: Path) -> Any:
    return str(folder / value) if isinstance(value, str) else value


def theirs(cases: list[Case], folder: Path, python: Path) -> dict[str, dict[str, Any]]:
    """Merges cases with the peers: name → seconds or error."""
    jobs: dict[str, dict[str, Any]] = {"mergekit": {}, "fusion_bench": {}, "peft": {}}
    for case in cases:
        out = str(folder / "theirs" / case.peer / case.name)
        if case.peer == "mergekit":
            jobs[case.peer][case.name] = {"recipe": placed(case.theirs, folder / case.stored), "out": out}
            continue
        if case.peer == "peft":
            base, adapters = (folder / case.stored / "base", [folder / case.stored / name for name in case.experts])
            more = {"base": str(base), "adapters": list(map(str, adapters)), "out": out}
            jobs[case.peer][case.name] = {**case.theirs, **more}
            continue
        models = {"_pretrained_": str(folder / case.stored / "base")} if case.base else {}
        models |= {name: str(folder / case.stored / name) for name in case.experts}
        statistics = [str(folder / settings["statistics"]) for settings in case.own if "statistics" in settings]
        jobs[case.peer][case.name] = {**case.theirs, "models": models, "statistics": statistics, "out": out}
    done = {}
    for peer, work in jobs.items():
        if work:
            (folder / f"{peer}.json").write_text(json.dumps(work))
            own = sys.executable if peer == "peft" else python
            command = [own, HERE / f"run_{peer}.py", folder / f"{peer}.json", folder / f"{peer}.done.json"]
            log = folder / f"{peer}.log"
            with log.open("w") as stream:
                status = subprocess.run(
                    command, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, env=quiet()
                ).returncode
            if status:
                sys.exit(f"{peer} could not be run:\n{log.read_text()[-3000:]}")
            results = json.loads((folder / f"{peer}.done.json").read_text())
            done.update({f"{peer} {name}": result for name, result in results.items()})
    return done


def quiet() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors by name; GPT-2's without the prefix that its Hub repo does without as well."""
    files = folder.glob("*.safetensors")
    return {k.removeprefix("transformer."): v.double() for file in files for k, v in load_file(file).items()}


def by_token(tensors: dict[str, torch.Tensor], mine: dict[str, int], theirs: dict[str, int]) -> dict[str, torch.Tensor]:
    """Embeddings with their rows in the order of another tokenizer of the same tokens."""
    if mine.keys() != theirs.keys():
        raise ValueError(f"other tokens: {sorted(mine.keys() ^ theirs.keys())[:3]}")
    order = {theirs[token]: number for token, number in mine.items()}

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[[order.get(number, number) for number in range(len(tensor))]]

    return {key: ordered(value) if "embed" in key or "lm_head" in key else value for key, value in tensors.items()}


def measured(case: Case, folder: Path) -> Outcome:
    """Compares what both wrote."""
    outcome = Outcome(case.name, case.method, case.peer, differs=case.differs)
    places = [folder / side / case.peer / case.name for side in ("ours", "theirs")]
    mine, other = map(weights, places)
    if case.theirs.keys() & {"tokenizer", "tokenizer_source"}:
        mine = by_token(mine, *(Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab() for place in places))
    if mine.keys() != other.keys() or any(mine[key].shape != other[key].shape for key in mine):
        outcome.error = f"other tensors: {sorted(mine.keys() ^ other.keys())[:3]}"
        return outcome
    base = weights(folder / case.stored / (case.first if not case.slices else case.experts[0]))
    start = [
        base.get(key, value) if base.get(key, value).shape == value.shape else value for key, value in other.items()
    ]
    flat: Callable[[Any], torch.Tensor] = lambda tensors: torch.cat([tensor.reshape(-1) for tensor in tensors])  # noqa: E731
    left, right, start = flat(mine[key] for key in other), flat(other.values()), flat(start)
    step = float((right - start).abs().max()) or float(right.abs().max())
    apart = (left - right).abs()
    if case.random:
        moved = [(side - start).abs() > 1e-6 * step for side in (left, right)]
        outcome.kept = tuple(float(side.double().mean()) for side in moved)
        apart = apart[moved[0] & moved[1]]
    outcome.difference = float(apart.max()) / step
    outcome.outliers = float((apart > case.tolerance * step).double().mean())
    outcome.agrees = outcome.outliers <= case.outliers
    if case.stored != "float32" and case.differs:
        exact = folder / "exact" / case.name
        exact.parent.mkdir(exist_ok=True)
        ours(replace(case, theirs=case.theirs | {"dtype": "float32"}), folder, exact)
        found = weights(exact)
        wanted = flat(found[key] for key in other)
        outcome.off = tuple(float((side - wanted).norm() / (wanted - start).norm()) for side in (left, right))
    if outcome.kept:  # five standard deviations of a share that is drawn twice
        share, count = outcome.kept[1], len(left)
        outcome.agrees &= abs(outcome.kept[0] - share) < 5 * (2 * share * (1 - share) / count) ** 0.5
    return outcome


def compared(cases: list[Case], python: Path) -> list[Outcome]:
    """Runs and compares cases."""
    with tempfile.TemporaryDirectory(prefix="peers_") as place:
        folder = Path(place)
        checkpoints(folder)
        done = theirs(cases, folder, python)
        outcomes = []
        for case in cases:
            outcome = Outcome(
                case.name, case.method, case.peer, error=done[f"{case.peer} {case.name}"].get("error", "")
            )
            if not outcome.error:
                out = folder / "ours" / case.peer / case.name
                out.parent.mkdir(parents=True, exist_ok=True)
                try:
                    ours(case, folder, out)
                    outcome = measured(case, folder)
                except Exception as error:
                    outcome.error = f"ours: {type(error).__name__}: {error}"
            outcomes.append(outcome)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    lines = ["| peer | case | method | largest difference | differing | |", "|---|---|---|---|---|---|"]
    for o in outcomes:
        if o.error:
            said = o.error.splitlines()[0][:160]
            lines.append(f"| {o.peer} | {o.case} | {o.method} | | | {said} |")
            continue
        kept = f"kept {o.kept[0]:.3f} / {o.kept[1]:.3f}" if o.kept else ""
        off = f"off by {o.off[0]:.2%} / {o.off[1]:.2%}" if o.off else ""
        verdict = "agrees" if o.agrees else "differs"
        note = "; ".join(filter(None, [verdict, kept, o.differs, off]))
        lines.append(f"| {o.peer} | {o.case} | {o.method} | {o.difference:.1e} | {o.outliers:.1e} | {note} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name, method or peer has this")
    parser.add_argument(
        "--python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python", help="where the peers are"
    )
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if not args.python.exists():
        sys.exit(f"{args.python} is not there: make peers installs it")
    args.python = args.python.absolute()  # as it is: what a link leads to is not in its environment
    cases = [case for case in CASES if args.only in f"{case.peer} {case.method} {case.name}"]
    outcomes = compared(cases, args.python)
    print(table(outcomes))
    missing = sorted(MERGE_METHODS.keys() - {case.method for case in CASES})
    for name in missing if not args.only else []:
        print(f"not compared: {name}: {NOT_COMPARED.get(name, 'no case yet')}")
    if args.output:
        args.output.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    wrong = [o for o in outcomes if o.error or o.agrees == bool(o.differs)]
    if wrong:
        sys.exit(
            f"{len(wrong)} of {len(outcomes)} are not as expected: " + ", ".join(f"{o.peer} {o.case}" for o in wrong)
        )


if __name__ == "__main__":
    main()
