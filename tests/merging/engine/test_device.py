"""The device for products and decompositions of matrices: the CPU, or a GPU with equal results."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from in_memory import merged
from on_disk import models, recipe_of, weights_of
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_fusion import FusionError
from hf_fusion.merging.engine.checkpoint import SINGLE
from hf_fusion.merging.engine.tensors import Tensors, compute_device, compute_on, merge_tensors
from hf_fusion.merging.merge import merge
from hf_fusion.merging.methods import MERGE_METHODS, spectral

METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi")
SHAPES = {"high.weight": (90, 40), "wide.weight": (30, 70), "square.weight": (32, 32), "norm.weight": (40,)}


@pytest.fixture
def folders(tmp_path):
    return models(tmp_path / "inputs", shapes=SHAPES)


def test_the_cpu_is_the_default(folders, tmp_path):
    for name, options in {
        "default": {},
        "named": {"device": "cpu"},
        "given": {"device": torch.device("cpu", 0)},
    }.items():
        merge(recipe_of(folders, "iso_cts"), tmp_path / name, **options)
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "default")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", "device cuda:99 is not available: [0-9] of its type are"),
        ("gpu", "'gpu' is not a device"),
        ("mps", "mps: methods need float64"),
        ("cpu:1", "device cpu:1 is not available"),
    ],
)
def test_unavailable_device(device, message, folders, tmp_path):
    with pytest.raises(FusionError, match=message):
        merge(recipe_of(folders, "tsv_m"), tmp_path / "out", device=device)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_methods_of_whole_matrices_compute_there(method, shape):
    """On a device without values, the first that is asked for is missing."""
    base, experts = torch.randn(shape), [torch.randn(shape) for _ in range(2)]
    compute_on(torch.device("meta"))
    try:
        with pytest.raises((NotImplementedError, RuntimeError), match="[Mm]eta"):
            merged(method, base, experts)
    finally:
        compute_on(torch.device("cpu"))
    assert compute_device().type == "cpu"
    merged(method, base, experts)


class Nowhere:
    """A tensor of a size, whose values do not matter."""

    def __init__(self, shape):
        self.shape = shape

    def read(self, start, out):
        """Leaves what is there."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(90, 40), (30, 70)])
def test_inputs_are_moved_to_one_device_and_outputs_back(method, shape, monkeypatch):
    """torch computes sizes, types and devices alone, and refuses what lies on two of them."""
    monkeypatch.setattr(spectral, "_eigenvectors", torch.linalg.eigh)  # it asks for values
    monkeypatch.setattr(Tensors, "gram", lambda self: torch.ones(3, 3, dtype=torch.float64))
    row = MERGE_METHODS[method]
    own = {name: [1.0] * 3 for name, parameter in row.parameters.items() if parameter.per_expert}

    def run():
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = Tensors("weight", Nowhere(shape), [Nowhere(shape)] * 3)
            return [piece for _, piece in merge_tensors(tensors, row.function(tensors, **own))]

    # "lazy" is a kind of device that is never here; a thread's buffers are its own
    with ThreadPoolExecutor(1, initializer=compute_on, initargs=(torch.device("lazy"),)) as pool:
        pieces = pool.submit(run).result()
    assert {(piece.device.type, piece.dtype) for piece in pieces} == {("cpu", torch.float32)}
    assert sum(piece.numel() for piece in pieces) == shape[0] * shape[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_gives_equal_results(method, folders, tmp_path):
    for device in ("cpu", "cuda"):
        merge(recipe_of(folders, method), tmp_path / device, device=device)
    expected, found = (load_file(tmp_path / device / SINGLE) for device in ("cpu", "cuda"))
    base = load_file(folders[0] / SINGLE)
    for name, tensor in expected.items():
        step = (tensor - base[name]).abs().max()
        assert (found[name] - tensor).abs().max() <= 1e-4 * step, name
