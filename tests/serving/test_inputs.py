"""Embeddings and classes: equal to the model's forward, for every family; as packed floats, of pairs and of images."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from serving.worlds import PROMPTS, client_of, server_of, world
from tiny import SUMS, images

from hf_fusion.serving import ModelServer
from hf_fusion.serving.served import pooling_of

pytestmark = pytest.mark.long


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.endpoint}{path}", json=body, timeout=60)


def forward(name: str, *texts, task: str | None = None):
    served = world(name)
    with torch.no_grad():
        inputs = served.processor(*texts, return_tensors="pt")
        return served.model(**inputs, **({} if task is None else {"task": task}))


@pytest.mark.parametrize("name", ["features", "features phatgoose", "features wemoe"])
def test_embeddings_are_the_mean_of_the_states(name):
    want = []
    for text in PROMPTS:
        mean = forward(name, [text]).last_hidden_state.mean(1)
        want.append(torch.nn.functional.normalize(mean, dim=-1)[0])
    with server_of(name) as server:
        client = client_of(server)
        packed = client.embeddings.create(model="tiny", input=PROMPTS)  # the client asks for base64
        plain = client.embeddings.create(model="tiny", input=PROMPTS[0], encoding_format="float")
        routed = post(server, "/v1/embeddings", input=PROMPTS[:2], routing=True).json()["data"]
    found = torch.tensor([each.embedding for each in packed.data])
    assert torch.allclose(found, torch.stack(want), atol=SUMS)
    assert torch.allclose(torch.tensor(plain.data[0].embedding), want[0], atol=SUMS)
    assert packed.usage.prompt_tokens == sum(map(len, world(name).processor(PROMPTS)["input_ids"]))
    if name == "features phatgoose":
        tokens = [each["token"] for each in routed[0]["routing"]["tokens"]]
        assert "".join(tokens) == PROMPTS[0]
    if name == "features wemoe":
        assert set(routed[0]["routing"]) == {"experts", "means", "layers"}


@pytest.mark.parametrize("how", ["cls", "last"])
def test_embeddings_pool_as_sentence_transformers_saved(how):
    states = [forward("features", [text]).last_hidden_state[0, 0 if how == "cls" else -1] for text in PROMPTS]
    with ModelServer(replace(world("features"), pooling=how)) as server:
        found = client_of(server).embeddings.create(model="tiny", input=PROMPTS)
    want = torch.nn.functional.normalize(torch.stack(states), dim=-1)
    assert torch.allclose(torch.tensor([each.embedding for each in found.data]), want, atol=SUMS)


def test_pooling_is_read_from_the_folder(tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling

    assert pooling_of(tmp_path, "me/x") == "mean"
    for mode, name in {"mean": "mean", "cls": "cls", "lasttoken": "last"}.items():
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        Pooling(8, pooling_mode=mode).save(str(tmp_path / "1_Pooling"))
        assert pooling_of(tmp_path, "me/x") == name
    Pooling(8, pooling_mode="max").save(str(tmp_path / "1_Pooling"))
    with pytest.raises(Exception, match="pools in another way"):
        pooling_of(tmp_path, "me/x")


@pytest.mark.parametrize("name", ["classes", "classes phatgoose", "classes wemoe", "classes foe"])
def test_classes_are_the_forward_s(name):
    want = [forward(name, [text]).logits[0].softmax(-1) for text in PROMPTS]
    with server_of(name) as server:
        answer = post(server, "/classify", model="tiny", input=PROMPTS, routing=True).json()
        alone = post(server, "/classify", input=PROMPTS[0]).json()
    found = torch.tensor([each["probs"] for each in answer["data"]])
    assert torch.allclose(found, torch.stack(want), atol=SUMS)
    labels = world(name).model.config.id2label
    assert [each["label"] for each in answer["data"]] == [labels[int(p.argmax())] for p in want]
    assert torch.allclose(torch.tensor(alone["data"][0]["probs"]), want[0], atol=SUMS)
    assert ("routing" in answer["data"][0]) == (name != "classes")
    assert "routing" not in alone["data"][0]
    if name == "classes foe":
        assert answer["data"][0]["routing"]["queried"]


def test_pairs_are_read_together():
    for name in ("classes", "classes foe"):
        want = forward(name, [PROMPTS[0]], [PROMPTS[1]]).logits[0].softmax(-1)
        pair = {"text": PROMPTS[0], "text_pair": PROMPTS[1]}
        with server_of(name) as server:
            data = post(server, "/classify", input=[pair, PROMPTS[0]]).json()["data"]
        assert torch.allclose(torch.tensor(data[0]["probs"]), want, atol=SUMS)
        assert data[1]["probs"] != data[0]["probs"]


def test_a_task_chooses_the_head():
    served = world("classes wemoe")
    with server_of("classes wemoe") as server:
        for row in served.model.config.experts:
            want = forward("classes wemoe", [PROMPTS[0]], task=row["name"]).logits[0].softmax(-1)
            found = post(server, "/classify", input=PROMPTS[0], task=row["name"]).json()["data"][0]
            assert torch.allclose(torch.tensor(found["probs"]), want, atol=SUMS)
            assert found["labels"] == row["labels"]
        refused = post(server, "/classify", input="a", task="nobody")
    assert refused.status_code == 400
    assert served.model.config.experts[0]["name"] in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["images", "images wemoe"])
def test_images_come_as_data_urls(name):
    served = world(name)
    urls = []
    for image in images(3):
        file = io.BytesIO()
        image.save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    with torch.no_grad():
        want = served.model(**served.processor(images(3), return_tensors="pt")).logits.softmax(-1)
    with server_of(name) as server:
        found = post(server, "/classify", input=urls).json()["data"]
        for wrong in ("a cat", "data:image/png;base64,AAAA", {"text": "a", "text_pair": "b"}):
            refused = post(server, "/classify", input=wrong)
            assert refused.status_code == 400, refused.text
    assert torch.allclose(torch.tensor([each["probs"] for each in found]), want, atol=SUMS)


def test_what_a_model_does_not_give_is_refused():
    with server_of("classes") as server:
        client = client_of(server)
        with pytest.raises(openai.BadRequestError, match="gives classes, and this endpoint answers"):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.BadRequestError, match="this endpoint embeddings"):
            client.embeddings.create(model="tiny", input="a")
        assert post(server, "/classify", input=[]).status_code == 400
        assert post(server, "/classify", input="fox " * 100).json()["error"]["code"] == "context_length_exceeded"
