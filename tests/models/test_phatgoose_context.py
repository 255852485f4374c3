"""Evidence in context: the scores of earlier tokens, in one call, over a cache's steps, and in pages."""

from __future__ import annotations

import copy

import pytest
import torch
from models.test_phatgoose import IDS, MASK
from models.test_phatgoose_gaussian import router_of
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import ContinuousBatchingConfig

from hf_fusion import PhatgooseForGeneration
from hf_fusion.models.context_phatgoose import REACH, Context, DynamicEvidence, decayed
from hf_fusion.models.fused_calls import cache_in

LONG = torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(5))  # longer than what is looked back


def rows_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_sums_reach_back_and_no_further():
    rows = rows_of((2, REACH + 20, 3))
    found = decayed(rows, 0.9)
    for token in (0, 1, 5, REACH - 1, REACH, REACH + 19):
        first = max(0, token - REACH + 1)
        weights = torch.tensor([0.9 ** (token - u) for u in range(first, token + 1)], dtype=torch.float64)
        want = torch.einsum("u,bud->bd", weights, rows[:, first : token + 1])
        assert torch.allclose(found[:, token], want)


def test_sequences_in_one_row_do_not_see_each_other():
    rows = rows_of((1, 30, 2))
    numbers = torch.tensor([[0] * 11 + [1] * 3 + [2] * 16])
    parts = [decayed(part, 0.9) for part in rows.split([11, 3, 16], 1)]
    assert torch.equal(decayed(rows, 0.9, numbers), torch.cat(parts, 1))
    positions = torch.cat([torch.arange(count) for count in (11, 3, 16)])[None]
    found = Context.of(0.9, None, {"position_ids": positions}).sequences
    assert found is not None and found.equal(numbers)
    assert Context.of(0.9, None, {"position_ids": torch.arange(4)[None]}).sequences is None


def test_padding_is_no_evidence():
    scores = rows_of((1, 5, 3))
    alone = Context(0.9).apply(0, scores[0], (1, 5), None)
    real = torch.tensor([2, 3, 4, 5, 6])
    assert torch.allclose(Context(0.9).apply(0, scores[0], (1, 9), real), alone)


def test_evidence_changes_the_choice():
    router = router_of("llama", top_k=1)
    assert router.config.gate_decay == 0.92
    with torch.no_grad():
        router(input_ids=LONG)
        chosen = router.calls.last().decisions[1][0]
        router.config.gate_decay = 0.0
        router(input_ids=LONG)
    assert not router.calls.last().decisions[1][0].equal(chosen)


def test_a_config_from_before_decides_token_by_token(tmp_path):
    router = router_of("llama")
    router.config.gate_decay = 0.0
    with torch.no_grad():
        want = router(input_ids=IDS).logits
        parts = [router(input_ids=IDS[:, : count + 1]).logits[:, -1] for count in range(IDS.shape[1])]
    assert torch.allclose(torch.stack(parts, 1), want, atol=1e-5)
    router.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"gate_decay": 0.0,', ""))
    with torch.no_grad():
        assert PhatgooseForGeneration.from_pretrained(tmp_path)(input_ids=IDS).logits.equal(want)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_keeps_the_evidence(shape, kind):
    router = router_of(shape)
    ids = LONG[:, :70] if shape == "llama" else LONG[:, :30]
    with torch.no_grad():
        want = router(input_ids=ids).logits
        config = router.backbone.config
        cache = StaticCache(config=config, max_cache_len=80) if kind == "static" else DynamicCache(config=config)
        found, start = [], 0
        for count in (20, 1, 1, 5, ids.shape[1] - 27):
            part = ids[:, start : start + count]
            found.append(router(input_ids=part, past_key_values=cache, use_cache=True).logits)
            start += count
    assert torch.allclose(torch.cat(found, 1), want, atol=1e-5)


def test_a_cache_goes_on_with_packed_sequences():
    scores, start = rows_of((12, 3)), rows_of((1, 5, 4))
    start[..., -1] = 1
    cache, layer = DynamicCache(), DynamicEvidence(0)
    layer.update(start[:, None], start[:, None, :, :0])
    cache.layers.append(layer)
    positions = torch.tensor([[5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7]])
    got = Context.of(0.9, cache, {"position_ids": positions}).apply(0, scores, (1, 12), None)
    first = Context(0.9).apply(0, torch.cat([start[0, :, :-1], scores[:4]]), (1, 9), None)[5:]
    assert torch.allclose(got, torch.cat([first, Context(0.9).apply(0, scores[4:], (1, 8), None)]))


def test_a_cropped_copied_and_reordered_cache_keeps_its_evidence():
    router = router_of("llama")
    with torch.no_grad():
        cache = cache_in(router(input_ids=LONG[:, :80], use_cache=True))
        want = router(input_ids=LONG[:, :90]).logits[:, 70:]
        cropped = copy.deepcopy(cache)
        cropped.crop(-10)
        got = router(input_ids=LONG[:, 70:], past_key_values=cropped).logits
        assert torch.allclose(got, want, atol=1e-5)
        cache.crop(-10)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = router(input_ids=LONG[:, 70:].flip(0), past_key_values=cache).logits.flip(0)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "beams", "static", "assisted"],
)
def test_generation_routes_as_without_a_cache(options):
    router = router_of("llama")
    given = {"input_ids": LONG, "attention_mask": torch.ones_like(LONG)}
    if "prompt_lookup_num_tokens" in options:
        given = {name: tensor[:1] for name, tensor in given.items()}
    else:
        given["attention_mask"][1, :40] = 0
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    beams = {"num_beams": options.get("num_beams", 1)}
    plain = router.generate(**given, **common, **beams, use_cache=False)
    assert router.generate(**given, **common, **options).equal(plain)


def test_pages_keep_the_evidence():
    router = router_of("llama")
    given = [LONG[0, :70].tolist(), LONG[1, :33].tolist(), IDS[0].tolist()]
    pages = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=48)  # prompts come in parts
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = router.generate_batch(given, settings, continuous_batching_config=pages, warmup=False)
    for row, output in zip(given, found.values(), strict=True):
        alone = router.generate(torch.tensor([row]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert output.generated_tokens == alone[0, len(row) :].tolist()


def test_a_padded_batch_routes_as_its_rows_alone():
    router = router_of("llama")
    with torch.no_grad():
        batch = router(input_ids=IDS, attention_mask=MASK).logits
        for row, mask in enumerate(MASK.bool()):
            alone = router(input_ids=IDS[row : row + 1, mask]).logits[0]
            assert torch.allclose(batch[row, mask], alone, atol=1e-5)


def test_it_compiles_with_a_static_cache():
    router = router_of("llama")
    common = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    want = router.generate(LONG, **common, disable_compile=True)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        cache = StaticCache(config=router.backbone.config, max_cache_len=100)
        out = router(input_ids=LONG, past_key_values=cache, use_cache=True)
        ids = [out.logits[:, -1:].argmax(-1)]
        for _ in range(3):
            out = compiled(input_ids=ids[-1], past_key_values=cache, use_cache=True)
            ids.append(out.logits[:, -1:].argmax(-1))
    assert torch.cat(ids, 1).equal(want[:, LONG.shape[1] :])
