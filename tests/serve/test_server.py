"""`serve` as a process: it announces itself, and an interrupt lets a running answer finish."""

import re
import signal
import subprocess
import sys
import threading

import openai
import pytest

from meshloom.core.errors import ConfigError
from meshloom.serve.api.server import ServerThread
from meshloom.serve.config import ServeConfig

PROGRAM = """
import time
from flax import nnx
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.tokenizer import train_byte_bpe
from meshloom.serve.api.server import serve
from meshloom.serve.config import EngineConfig, ServeConfig
from meshloom.serve.runner import Runner

step = Runner.step

def slow(self, chunks):
    time.sleep(0.05)
    return step(self, chunks)

Runner.step = slow
config = DecoderConfig(vocab_size=260, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16, context=64)
lm = LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), config, train_byte_bpe([], 257))
sizes = EngineConfig(buckets=(8,), max_num_seqs=4, page_size=4)
serve(lm, ServeConfig(port=0, model_name="tiny", drain_seconds=20, engine=sizes))
"""


@pytest.fixture
def process():
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    timer = threading.Timer(120, process.kill)
    timer.start()
    yield process
    timer.cancel()
    process.kill()
    process.wait()
    process.stderr.close()


def test_an_interrupted_server_finishes_its_answers_and_leaves(process):
    said = ""
    while (ready := re.search(r"tiny is ready at (http://127\.0\.0\.1:\d+/v1)", said)) is None:
        line = process.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    assert "longest request 64 tokens" in said
    with openai.OpenAI(base_url=ready[1], api_key="none", max_retries=0) as client:
        options = {"max_tokens": 40, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
        options["stream_options"] = {"include_usage": True}
        stream = iter(client.completions.create(model="tiny", prompt=[40, 41], **options))
        next(stream)
        process.send_signal(signal.SIGINT)
        assert list(stream)[-1].usage.completion_tokens == 40
    assert process.wait(timeout=60) == 0


def test_a_taken_port_is_reported_with_its_number(engine):
    with ServerThread(engine, ServeConfig(port=0)) as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            ServerThread(engine, ServeConfig(port=port))
