"""What is refused, with which status and words; and what a server does under pressure and at its end."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving.worlds import LIMITS, PROMPTS, client_of, own_answer, server_of, world

from hf_fusion import FusionError
from hf_fusion.serving import Limits, ModelServer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server():
    with server_of("llama") as running:
        yield running


REFUSED = {
    "no field": ({}, "messages: Field required"),
    "an unknown field": ({"mesages": []}, "mesages is not a field|Field required"),
    "no messages": ({"messages": []}, "at least 1"),
    "a hot one": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "a text as a number": ({"max_tokens": "ten"}, "max_tokens: Input should be a valid integer"),
    "no tokens": ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "too many tokens": ({"max_tokens": 49}, "49 tokens were asked for; this server gives at most 48"),
    "tools": ({"tools": [{"type": "function"}]}, "tools is not supported"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    "pictures": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
    "alternatives of nothing": ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
    "no token": ({"logit_bias": {"300": 1}}, "logit_bias names '300'"),
    "a long prompt": ({"messages": [{"role": "user", "content": "fox " * 80}]}, "the prompt has"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_cannot_be_answered_says_why(server, what):
    given, words = REFUSED[what]
    body = {"messages": [{"role": "user", "content": "a"}], **given} if given else {}
    refused = httpx.post(f"{server.endpoint}/v1/chat/completions", json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert any(word in error["message"] for word in words.split("|")), error


def test_fields_that_change_nothing_are_taken(server):
    messages = [{"role": "user", "content": "a"}]
    given = {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "response_format": {"type": "text"}}
    client_of(server).chat.completions.create(model="tiny", messages=messages, max_tokens=2, **given)


def test_other_requests_are_refused_by_name(server):
    client, url = client_of(server), server.endpoint
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; there is tiny"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("gpt-4")
    assert httpx.post(f"{url}/v1/completions", content=b"{").status_code == 400
    assert httpx.post(f"{url}/v1/completions", content=b"x" * 9_000_000).status_code == 413
    assert "/v1/completions" in httpx.post(f"{url}/v1/images").json()["error"]["message"]
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    for prompt, words in (([300], "token 300"), ("", "empty"), ([], "0 entries"), ([[1], []], "empty")):
        with pytest.raises(openai.BadRequestError, match=words):
            client.completions.create(model="tiny", prompt=prompt)


def test_no_room_after_a_prompt_is_said(server):
    with pytest.raises(openai.BadRequestError) as refused:
        client_of(server).completions.create(model="tiny", prompt=[5] * 60, max_tokens=5)
    assert refused.value.code == "context_length_exceeded"
    assert "room for 4" in str(refused.value)


def test_a_model_without_a_template_has_no_chats():
    served = world("gpt2")
    template, served.processor.chat_template = served.processor.chat_template, None
    try:
        with server_of("gpt2") as running, pytest.raises(openai.BadRequestError, match="no chat template"):
            client_of(running).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    finally:
        served.processor.chat_template = template
    served.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with server_of("gpt2") as running, pytest.raises(openai.BadRequestError, match="roles must alternate"):
        client_of(running).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    served.processor.chat_template = template


def test_a_full_queue_refuses_and_loses_nothing():
    limits = Limits(rows=1, waiting=2, tokens=48, seconds=60)
    want = own_answer("llama", PROMPTS[0], 40)
    with server_of("llama", limits) as running:
        client = client_of(running)

        def ask(_) -> str:
            try:
                return client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=40).choices[0].text
            except openai.InternalServerError as error:
                assert error.status_code == 503
                assert error.code == "queue_full"
                assert error.response.headers["retry-after"]
                return "refused"

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, range(12)))
        assert set(found) == {want, "refused"}
        assert ask(0) == want
        with pytest.raises(openai.BadRequestError, match="3 answers were asked for, and the queue holds 2"):
            client.completions.create(model="tiny", prompt=PROMPTS[0], n=3)


def test_a_late_answer_is_given_up():
    with server_of("llama", Limits(rows=1, waiting=4, tokens=48, seconds=0.01)) as running:
        client = client_of(running)
        with pytest.raises(openai.InternalServerError, match="not ready after 0.01 seconds") as late:
            client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=48)
        assert (late.value.status_code, late.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="not ready after"):
            for _ in client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=48, stream=True):
                pass


def test_what_nobody_waits_for_is_not_computed():
    limits = Limits(rows=1, waiting=4, tokens=48, seconds=60)
    with server_of("llama", limits) as running:
        url = f"{running.endpoint}/v1/completions"
        body = {"prompt": PROMPTS[0], "max_tokens": 48, "n": 4}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.05)
        with httpx.stream("POST", url, json={**body, "stream": True}) as answer:
            next(answer.iter_lines())
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 1}).status_code == 200
        lines = httpx.get(f"{running.endpoint}/metrics").text.splitlines()
    counted = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    assert counted["hf_fusion_generated_tokens_total"] < 8 * 48


def test_metrics_count_requests_and_tokens(server):
    client = client_of(server)
    before = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=3).usage
    lines = httpx.get(f"{server.endpoint}/metrics").text
    [done] = [
        line
        for line in lines.splitlines()
        if line.startswith('hf_fusion_requests_total{endpoint="/v1/completions",status="200"}')
    ]
    assert float(done.split()[-1]) >= 1
    assert 'hf_fusion_requests_total{endpoint="/v1/chat/completions",status="400"}' in lines
    assert 'hf_fusion_request_seconds_count{endpoint="/v1/completions"}' in lines
    assert float(lines.split("\nhf_fusion_generated_tokens_total ")[1].split()[0]) >= before.completion_tokens
    for name in ("waiting_rows", "running_rows", "prompt_tokens_total", "batch_rows_count"):
        assert f"\nhf_fusion_{name} " in lines


def test_a_stop_finishes_what_runs_and_takes_nothing_more():
    running = server_of("llama", LIMITS).start()
    found = []

    def ask() -> None:
        stream = client_of(running).completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=48, stream=True)
        found.extend(chunk.choices[0].text for chunk in stream)

    asking = threading.Thread(target=ask)
    asking.start()
    while not found:
        time.sleep(0.002)
    running.stop()
    asking.join()
    assert "".join(found) == own_answer("llama", PROMPTS[0], 48)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.endpoint}/health")


def test_a_model_that_fails_says_so_and_the_server_goes_on():
    served = world("gpt2")
    weight, served.model.transformer.wte.weight = served.model.transformer.wte.weight, None
    with server_of("gpt2") as running:
        client = client_of(running)
        with pytest.raises(openai.InternalServerError, match="the model failed") as failed:
            client.completions.create(model="tiny", prompt="a", max_tokens=2)
        assert failed.value.status_code == 500
        served.model.transformer.wte.weight = weight
        assert client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=5).choices[0].text == own_answer(
            "gpt2", PROMPTS[0], 5
        )


def test_a_port_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FusionError, match=f"cannot listen on 127.0.0.1 port {port}"):
            ModelServer(world("llama"), port=port).start()


def test_events_are_as_browsers_read_them(server):
    body = {"prompt": PROMPTS[0], "max_tokens": 3, "stream": True}
    answer = httpx.post(f"{server.endpoint}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = [part for part in answer.text.split("\n\n") if part]
    assert end == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)
