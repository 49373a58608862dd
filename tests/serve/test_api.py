"""The HTTP side with the real `openai` client, over a real socket."""

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshloom.serve.api.server import ServerThread
from meshloom.serve.config import ServeConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams

from .conftest import SMALL

CONFIG = ServeConfig(port=0, model_name="tiny", drain_seconds=5)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(engine):
    with ServerThread(engine, CONFIG) as server:
        yield server


def connect(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as client:
        yield client


def refused(call, **fields):
    with pytest.raises(openai.BadRequestError) as error:
        call(model="tiny", **fields)
    return error.value


def metrics(server):
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {sample.name: sample.value for family in families for sample in family.samples}


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "meshloom"


def test_a_completion_is_what_the_engine_generates(client, engine):
    reply = client.completions.create(model="tiny", prompt="def f", max_tokens=12, temperature=0)
    expected = engine.generate(["def f"], SamplingParams(max_tokens=12))[0]
    assert reply.choices[0].text == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage.prompt_tokens == expected.usage.prompt_tokens
    assert reply.usage.total_tokens == expected.usage.total_tokens


def test_prompts_may_be_texts_or_token_ids_one_or_many(client, tokenizer):
    def texts(prompt):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    ids = tokenizer.encode("return the")
    one, two = texts("return the"), texts(["return the", "hello"])
    assert texts(ids) == one == two[:1]
    assert texts([ids, tokenizer.encode("hello")]) == two


def test_streamed_pieces_join_to_the_whole_answer(client):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_streams_the_same_text(client):
    options = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_an_answer_can_be_sent_back_as_it_came(client):
    first = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "then"}]
    messages = [*HELLO, first.choices[0].message, {"role": "user", "content": parts}]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=4).usage.completion_tokens > 0


def test_several_answers_with_a_seed_are_different_and_repeat(client):
    def ask():
        options = {"messages": HELLO, "n": 4, "seed": 11, "temperature": 1.0, "max_tokens": 8}
        reply = client.chat.completions.create(model="tiny", **options)
        return [choice.message.content for choice in reply.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_stop_strings_are_honoured_in_streams(client):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[4:7]
    text, reason = "", None
    for chunk in client.completions.create(**options, stop=[stop], stream=True):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_sixteen_streams_at_once_get_what_each_gets_alone(server, engine):
    prompts = [f"def f{i}(x" for i in range(16)]
    alone = [c.text for c in engine.generate(prompts, SamplingParams(max_tokens=20))]

    async def one(client, prompt):
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(everybody()) == alone


def test_a_client_that_stops_reading_a_stream_gives_its_pages_back(client, engine):
    options = {"model": "tiny", "prompt": "def f", "max_tokens": 50, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**options, n=4, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: engine.free_pages == engine.cache.num_pages)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_disconnects_is_aborted(server, engine, monkeypatch, stream):
    step = engine._runner.step

    def slow(chunks):
        time.sleep(0.05)
        return step(chunks)

    monkeypatch.setattr(engine._runner, "step", slow)
    before = engine.metrics.registry.get_sample_value(
        "meshloom:request_success_total", {"model_name": "tiny", "finished_reason": "abort"}
    )
    body = json.dumps({"prompt": "def f", "max_tokens": 50, "ignore_eos": True, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: engine.free_pages < engine.cache.num_pages)
    wait_until(lambda: engine.free_pages == engine.cache.num_pages)
    after = engine.metrics.registry.get_sample_value(
        "meshloom:request_success_total", {"model_name": "tiny", "finished_reason": "abort"}
    )
    assert after == (before or 0) + 1


def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers(client):
    error = refused(client.completions.create, prompt=[5] * 100, max_tokens=1)
    assert "64 tokens" in error.message
    assert "100 in the prompt" in error.message
    error = refused(client.chat.completions.create, messages=HELLO, max_tokens=1000)
    assert "64 tokens" in error.message
    assert "1000 to generate" in error.message


def test_an_unknown_field_is_named_with_the_nearest_known_one(client):
    error = refused(client.completions.create, prompt="x", extra_body={"temprature": 1})
    assert error.param == "temprature"
    assert "did you mean 'temperature'" in error.message
    error = refused(client.chat.completions.create, messages=HELLO, extra_body={"max_new_tokens": 3})
    assert "max_new_tokens" in error.message
    assert "did you mean 'max_tokens'" in error.message
    error = refused(client.chat.completions.create, messages=[HELLO[0] | {"colour": "red"}])
    assert "colour" in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 10}),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_known_field_that_is_not_supported_is_refused_unless_it_asks_for_nothing(client, field, value):
    error = refused(client.chat.completions.create, messages=HELLO, **{field: value})
    assert error.param == field
    assert "not supported" in error.message
    default = {"presence_penalty": 0, "logit_bias": {}, "logprobs": False, "response_format": {"type": "text"}}[field]
    options = {"user": "me", "metadata": {"a": "b"}, field: default}
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, **options)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": "x", "temperature": 3}, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "x", "n": 1000}, "n"),
        ({"prompt": [5, 4000]}, "prompt"),
    ],
)
def test_bad_values_are_named(client, fields, named):
    error = refused(client.completions.create, **fields)
    assert named in error.message


def test_a_missing_field_is_named(client):
    with pytest.raises(openai.BadRequestError, match="missing field 'messages'"):
        client.post("/chat/completions", body={"model": "tiny"}, cast_to=object)


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="x")


def test_what_is_not_json_and_unknown_paths_are_told_in_the_same_shape(server):
    def error_of(path, body):
        with pytest.raises(urllib.error.HTTPError) as failure:
            urllib.request.urlopen(urllib.request.Request(server.url + path, body))
        with failure.value as reply:
            return reply.code, json.loads(reply.read())["error"]["message"]

    status, message = error_of("/v1/completions", b"{")
    assert status == 400
    assert "not JSON" in message
    assert error_of("/v1/completions", b"[]")[0] == 400
    assert error_of("/v1/nothing", None)[0] == 404
    assert error_of("/v1/completions", None)[0] == 405


def test_metrics_parse_and_count(server, client):
    before = metrics(server)
    reply = client.completions.create(
        model="tiny", prompt="def f", max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    )
    wait_until(lambda: metrics(server)["meshloom:num_requests_running"] == 0)
    after = metrics(server)

    def grown(name):
        return after[name] - before[name]

    assert grown("meshloom:generation_tokens_total") == 5
    assert grown("meshloom:prompt_tokens_total") == reply.usage.prompt_tokens
    assert grown("meshloom:time_to_first_token_seconds_count") == 1
    assert grown("meshloom:inter_token_latency_seconds_count") == 4
    assert grown("meshloom:e2e_request_latency_seconds_count") == 1
    assert after["meshloom:kv_cache_usage_perc"] == 0
    assert after["meshloom:compiles_after_ready_total"] == 0


def test_an_api_key_is_asked_for_when_set(engine):
    with ServerThread(engine, ServeConfig(port=0, model_name="tiny", api_key="s3cret", drain_seconds=1)) as server:
        with connect(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with connect(server, "s3cret") as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=2).choices
        with urllib.request.urlopen(f"{server.url}/health") as reply:
            assert reply.status == 200


def test_a_model_without_chat_template_points_to_completions(lm):
    with Engine(lm, SMALL) as engine, ServerThread(engine, CONFIG) as server, connect(server) as client:
        error = refused(client.chat.completions.create, messages=HELLO)
        assert "/v1/completions" in error.message


def test_a_failed_engine_is_unhealthy_and_says_why(chat_lm):
    with Engine(chat_lm, SMALL) as engine, ServerThread(engine, CONFIG) as server:
        engine.close()
        with pytest.raises(urllib.error.HTTPError) as failure:
            urllib.request.urlopen(f"{server.url}/health")
        with failure.value as reply:
            assert reply.code == 503
            assert "closed" in json.loads(reply.read())["status"]
        with connect(server) as client, pytest.raises(openai.InternalServerError, match="closed"):
            client.completions.create(model="tiny", prompt="x")


def test_a_step_that_fails_mid_stream_is_told_in_the_stream(chat_lm, monkeypatch, caplog):
    with Engine(chat_lm, SMALL) as engine, ServerThread(engine, CONFIG) as server:
        step, calls = engine._runner.step, []

        def explode(chunks):
            calls.append(chunks)
            if len(calls) > 3:
                raise FloatingPointError("the device caught fire")
            return step(chunks)

        monkeypatch.setattr(engine._runner, "step", explode)
        with connect(server) as client:
            options = {"model": "tiny", "prompt": "x", "max_tokens": 20, "extra_body": {"ignore_eos": True}}
            with pytest.raises(openai.APIError, match="the device caught fire"):
                list(client.completions.create(**options, stream=True))
            with pytest.raises(openai.InternalServerError, match="the device caught fire"):
                client.completions.create(**options)
