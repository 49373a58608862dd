"""The real model, end to end: loaded, served, and asked over HTTP."""

import openai
import pytest

from meshloom import models
from meshloom.serve.api.server import ServerThread
from meshloom.serve.config import EngineConfig, ServeConfig
from meshloom.serve.engine import Engine


@pytest.fixture(scope="module")
def client():
    lm = models.load("smollm2")
    sizes = EngineConfig(max_num_seqs=2, buckets=(2, 64), kv_cache_memory=0.05)
    with (
        Engine(lm, sizes) as engine,
        ServerThread(engine, ServeConfig(port=0, model_name="smollm2")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        yield client


def test_it_knows_the_capital_of_france(client):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    stream = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=24, stream=True
    )
    text, reasons = "", []
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert text == "The capital of France is Paris."
    assert reasons[-1] == "stop"


def test_it_completes_text(client):
    reply = client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=4)
    assert reply.choices[0].text.startswith(" Paris")
