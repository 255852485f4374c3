"""Completions and chats by the unmodified client: equal to `generate()`, streamed, stopped, seeded, scored, routed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serving.worlds import PROMPTS, client_of, own_answer, server_of, world

from hf_fusion.serving import ModelServer

pytestmark = pytest.mark.long
GENERATING = ("llama", "gpt2", "t5", "phatgoose", "phatgoose seq2seq", "wemoe", "wemoe seq2seq", "foe")


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with server_of("phatgoose") as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return client_of(server)


@pytest.mark.parametrize("name", GENERATING)
def test_answers_are_the_models_own_alone_and_together(name):
    want = [own_answer(name, prompt) for prompt in PROMPTS]
    assert len(set(want)) > 1
    with server_of(name) as running:
        client = client_of(running)
        alone = [client.completions.create(model="tiny", prompt=prompt, max_tokens=12) for prompt in PROMPTS]
        assert [each.choices[0].text for each in alone] == want
        together = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12)
        assert [choice.text for choice in together.choices] == want
        with ThreadPoolExecutor(8) as pool:
            many = pool.map(lambda p: client.completions.create(model="tiny", prompt=p, max_tokens=12), PROMPTS * 3)
            assert [each.choices[0].text for each in many] == want * 3
    usage = together.usage
    lengths = [max(map(len, world(name).prompt(prompt))) for prompt in PROMPTS]
    assert (usage.prompt_tokens, usage.completion_tokens) == (sum(lengths), 12 * len(PROMPTS))
    assert {choice.finish_reason for choice in together.choices} == {"length"}


def test_answers_of_different_lengths_share_a_batch(client):
    with ThreadPoolExecutor(4) as pool:
        sizes = (1, 5, 12, 3)
        found = pool.map(lambda n: client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=n), sizes)
        for size, answer in zip(sizes, found, strict=True):
            assert answer.choices[0].text == own_answer("phatgoose", PROMPTS[0], size)
            assert answer.usage.completion_tokens == size


def test_a_chat_is_its_template_s_prompt(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "the quick"}, {"type": "text", "text": " fox"}]}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
    served = world("phatgoose")
    ids = served.chat([{"role": "user", "content": "the quick fox"}])[0]
    own = served.model.generate(torch.tensor([ids]), max_new_tokens=9)[0, len(ids) :]
    assert found.choices[0].message.content == served.processor.decode(own, skip_special_tokens=True)
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == len(ids)
    to_the_limit = client.chat.completions.create(model="tiny", messages=messages)
    assert to_the_limit.usage.completion_tokens == min(48, served.context - len(ids))


def test_streams_add_up_to_the_answer(client):
    whole = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12)
    parts = dict.fromkeys(range(len(PROMPTS)), "")
    reasons, usage = {}, None
    given = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12, **given):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert [parts[index] for index in sorted(parts)] == [choice.text for choice in whole.choices]
    assert reasons == dict.fromkeys(range(len(PROMPTS)), "length")
    assert usage == whole.usage
    messages = [{"role": "user", "content": "a dog"}]
    want = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, n=2).choices
    got = ["", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, n=2, stream=True):
        got[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert got == [choice.message.content for choice in want]


def test_a_stop_string_ends_the_answer_before_it(client):
    whole = own_answer("phatgoose", PROMPTS[1])
    stop = whole[len(whole) // 2 :][:3]
    want = whole[: whole.index(stop)]
    found = client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=12, stop=[stop, "never there"])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (want, "stop")
    assert found.usage.completion_tokens < 12
    streamed = client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=12, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == want


def test_a_token_that_ends_answers_does():
    served = world("llama")
    ids = served.prompt(PROMPTS[0])[0]
    own = served.model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
    served.model.generation_config.eos_token_id = own[4]
    try:
        with server_of("llama") as running:
            found = client_of(running).completions.create(model="tiny", prompt=[ids, ids[:2]], max_tokens=12)
    finally:
        served.model.generation_config.eos_token_id = None
    end = own.index(own[4])
    assert found.choices[0].text == served.processor.decode(own[:end], skip_special_tokens=True)
    assert found.choices[0].finish_reason == "stop"


def test_a_seed_gives_generate_s_own_sample_in_any_company(client):
    options = {"temperature": 0.8, "top_p": 0.9}
    served = world("phatgoose")
    inputs = served.processor(PROMPTS[0], return_tensors="pt")
    ids = inputs["input_ids"]
    torch.manual_seed(7)
    own = served.model.generate(ids, max_new_tokens=12, do_sample=True, top_k=0, **options)[0, ids.shape[1] :]
    want = served.processor.decode(own, skip_special_tokens=True)

    def ask(seed: int, prompt: str = PROMPTS[0]) -> str:
        given = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": seed, **options}
        return client.completions.create(**given).choices[0].text

    assert ask(7) == want
    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(ask, (7, 8, 9, 7), (PROMPTS[0], *PROMPTS[:2], PROMPTS[0])))
    assert crowd[0] == crowd[3] == want
    assert len({ask(seed) for seed in range(4)}) > 1
    several = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, seed=7, n=2, **options)
    assert [choice.text for choice in several.choices] == [want, ask(8)]


def test_the_model_s_own_sampling_is_the_default(client):
    served = world("phatgoose")
    config = served.model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 0.7, 5
    try:
        ids = torch.tensor(served.prompt(PROMPTS[0]))
        torch.manual_seed(3)
        own = served.model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
        found = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, seed=3)
        greedy = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=12, temperature=0)
    finally:
        config.do_sample, config.temperature, config.top_k = False, None, None
    assert found.choices[0].text == served.processor.decode(own, skip_special_tokens=True)
    assert greedy.choices[0].text == own_answer("phatgoose", PROMPTS[0])


def test_log_probabilities_are_those_of_a_forward(client):
    served = world("phatgoose")
    messages = [{"role": "user", "content": "a dog"}]
    given = {"model": "tiny", "messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    ids = served.chat(messages)[0]
    own = served.model.generate(torch.tensor([ids]), max_new_tokens=6)
    with torch.no_grad():
        logits = served.model(input_ids=own).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    values, tokens = logits.topk(3)
    content = client.chat.completions.create(**given).choices[0].logprobs.content
    assert [each.token for each in content] == [served.processor.decode([t]) for t in own[0, len(ids) :]]
    found = torch.tensor([[each.logprob for each in token.top_logprobs] for token in content])
    assert torch.allclose(found, values, atol=1e-4)
    assert [[each.token for each in token.top_logprobs] for token in content] == [
        [served.processor.decode([t]) for t in row] for row in tokens
    ]
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**given, stream=True)]
    assert [each.token for part in streamed if part for each in part.content] == [each.token for each in content]
    old = client.completions.create(model="tiny", prompt=[ids], max_tokens=6, logprobs=2).choices[0]
    assert old.logprobs.tokens == [each.token for each in content]
    assert torch.allclose(torch.tensor(old.logprobs.token_logprobs), values[:, 0], atol=1e-4)
    lengths = [len(token) for token in old.logprobs.tokens]
    assert old.logprobs.text_offset == [sum(lengths[:index]) for index in range(6)]
    for token in content:
        assert bytes(token.bytes).decode() == token.token if token.bytes else "\ufffd" in token.token


def test_penalties_and_bias_change_the_scores(client):
    served = world("phatgoose")
    first = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=1, logprobs=2).choices[0]
    second = list(first.logprobs.top_logprobs[0])[1]
    token = served.processor(second)["input_ids"][0]
    biased = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=8, logit_bias={str(token): 100})
    assert biased.choices[0].text == second * 8
    given = {"logit_bias": {str(token): 20}, "presence_penalty": 2, "frequency_penalty": 2}
    punished = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=48, **given)
    assert punished.choices[0].text.startswith(second)
    assert punished.choices[0].text != second * 48


@pytest.mark.parametrize("name", ["phatgoose", "phatgoose seq2seq", "wemoe", "foe", "llama"])
def test_the_routing_comes_with_the_answer_on_request(name):
    served = world(name)
    model = served.model
    with server_of(name) as running:
        client = client_of(running)
        plain = client.completions.create(model="tiny", prompt=PROMPTS[:3], max_tokens=5)
        given = {"model": "tiny", "prompt": PROMPTS[:3], "max_tokens": 5, "extra_body": {"routing": True}}
        routed = client.completions.create(**given)
        *_, last = client.completions.create(**{**given, "prompt": PROMPTS[0]}, stream=True)
    assert [c.text for c in routed.choices] == [c.text for c in plain.choices]
    assert "routing" not in plain.choices[0].model_dump()
    shown = [choice.routing for choice in routed.choices]
    if name == "llama":
        assert shown == [None] * 3
        return
    assert last.choices[0].routing == shown[0]
    names = [row["name"] for row in model.config.experts]
    assert all(each["experts"] == names for each in shown)
    if name == "foe":
        chosen = model.select(served.processor(text=PROMPTS[:3])).tolist()
        assert [each["expert"] for each in shown] == [names[index] for index in chosen]
        return
    if name == "wemoe":
        with torch.no_grad():
            for prompt, each in zip(PROMPTS, shown, strict=False):
                trace = model.trace_forward(input_ids=torch.tensor(served.prompt(prompt)))
                assert list(each["layers"]) == trace.layers
                found = torch.tensor(list(each["layers"].values()))
                assert torch.allclose(found, trace.coefficients()[0], atol=1e-3)
        return
    for prompt, each in zip(PROMPTS, shown, strict=False):
        ids = torch.tensor(served.prompt(prompt))
        before, model.record_routing = model.record_routing, 1000
        out = model.generate(ids, max_new_tokens=5)
        trace = model.routing_trace()
        model.record_routing = before
        own = [m for m in trace.modules if name == "phatgoose" or trace.choices(m)[0].shape[1] == 5]
        weights = trace.mean_weights(own)[0]
        assert torch.allclose(torch.tensor([token["weights"] for token in each["tokens"]]), weights, atol=1e-3)
        if name == "phatgoose":
            assert [token["token"] for token in each["tokens"]] == [served.processor.decode([t]) for t in out[0, :-1]]
            assert len(weights) == ids.shape[1] + 4
        assert abs(sum(each["usage"].values()) - 1) < 1e-3
