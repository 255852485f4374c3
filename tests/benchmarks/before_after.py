"""This tree against an older one, in one process and by turns: CPU seconds of one thread, the least of several.

    git worktree add --detach ../before COMMIT
    python tests/benchmarks/before_after.py ../before [--only foe wemoe] [--repeats 9] [--output FILE]

Both trees are imported: whatever is called finds the modules of its own. Models are built by each tree's own
tests/benchmarks (foe_forward, phatgoose, wemoe, merging), so that they are the same models; a ratio above 1 means that
this tree is slower.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

HERE = Path(__file__).resolve().parents[2]
Call = Callable[[], object]
# of the models that are merged
SMALL = {"HIDDEN": 512, "LAYERS": 4, "INNER": 2048, "WORDS": 8_192}
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "slerp")


class Tree:
    """A checkout, whose modules are there only while it is entered."""

    def __init__(self, root: Path) -> None:
        self.root, self.modules = root, dict[str, ModuleType]()
        self.paths = [str(root), str(root / "tests"), str(root / "tests" / "benchmarks")]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within this context the tree's modules are imported, and no other's."""
        sys.modules.update(self.modules)
        sys.path[:0] = self.paths
        importlib.invalidate_caches()
        try:
            yield
        finally:
            del sys.path[: len(self.paths)]
            self.modules = {
                name: module
                for name, module in sys.modules.items()
                if str(getattr(module, "__file__", None) or "").startswith(f"{self.root}{os.sep}")
                and ".venv" not in str(module.__file__)
                and name != "__main__"
            }
            for name in self.modules:
                del sys.modules[name]

    def load(self, name: str) -> Any:
        """One of its benchmarks."""
        return importlib.import_module(name)


def foe(tree: Tree, folder: Path) -> dict[str, Call]:
    """Forwards of six full models and of six adapters of one base."""
    bench = tree.load("foe_forward")
    calls: dict[str, Call] = {}
    arguments = argparse.Namespace(batch=8, tokens=32)
    for build in (bench.full_models, bench.images, bench.adapters):
        torch.manual_seed(0)
        model, _, inputs = build(6, arguments)
        calls[f"foe forward, {build.__name__}"] = lambda model=model, inputs=inputs: model(**inputs)
    return calls


def phatgoose(tree: Tree, folder: Path) -> dict[str, Call]:
    """A forward, and generations of one and of 17 tokens, of flan-t5-small's shape with 32 experts."""
    bench = tree.load("phatgoose")
    base = bench.t5_small()
    torch.manual_seed(1)
    return {f"phatgoose {name}": call for name, call in bench.jobs(bench.router_of(base, 32), base).items()}


def wemoe(tree: Tree, folder: Path) -> dict[str, Call]:
    """Forwards of ViT-B/32 with 4 experts, and a training step."""
    bench = tree.load("wemoe")
    base, head = bench.vit_b32(), torch.randn(768, bench.CLASSES, generator=torch.Generator().manual_seed(2))
    pixels = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    calls: dict[str, Call] = {}
    for storage in ("exact", "low-rank-bfloat16"):
        model = bench.fused(base, "features", 4, storage)
        calls[f"wemoe forward, {storage}"] = lambda model=model: model(pixel_values=pixels)
    model = bench.fused(base, "features", 4, "exact")
    step = bench.step(model, pixels, head)

    def trained() -> None:
        with torch.enable_grad():
            step()

    return {**calls, "wemoe step, exact": trained}


def merging(tree: Tree, folder: Path) -> dict[str, Call]:
    """Static merges of four models of 24M parameters, bfloat16."""
    bench = tree.load("merging")
    vars(bench).update(SMALL)
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    bench.CONFIG.update(zip(names, SMALL.values(), strict=True))
    if not (folder / "base").exists():
        bench.make_models(folder)
    calls: dict[str, Call] = {}
    for method in METHODS:
        recipe, out = bench.recipe_of(method, folder), folder / f"out-{method}"

        def merge(recipe: Any = recipe, out: Path = out) -> None:
            bench.merge(recipe, out, threads=1)
            bench.shutil.rmtree(out)

        calls[f"merge, {method}"] = merge
    return calls


TOPICS = {each.__name__: each for each in (foe, phatgoose, wemoe, merging)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the older commit")
    parser.add_argument("--only", nargs="*", choices=TOPICS, default=list(TOPICS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trees, rows = (Tree(args.before.resolve()), Tree(HERE)), []
    for topic in args.only:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            calls = []
            for tree in trees:
                with tree.entered():
                    calls.append(TOPICS[topic](tree, Path(folder)))
            for name in calls[0]:
                least = [float("inf")] * 2
                for repeat in range(args.repeats + 1):
                    for which in (0, 1) if repeat % 2 else (1, 0):
                        with trees[which].entered():
                            start = time.process_time()
                            calls[which][name]()
                            taken = time.process_time() - start
                        if repeat:  # the first round warms up
                            least[which] = min(least[which], taken)
                rows.append({"what": name, "before s": least[0], "after s": least[1], "ratio": least[1] / least[0]})
                print(
                    f"{name:34} before {least[0]:.4f} s, after {least[1]:.4f} s, ratio {rows[-1]['ratio']:.3f}",
                    flush=True,
                )
    if args.output:
        args.output.write_text(json.dumps({"command": f"python {' '.join(sys.argv)}", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
