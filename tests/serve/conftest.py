"""A tiny random model whose greedy text varies, with a tokenizer of its own, and an engine over it."""

import jax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.tokenizer import Tokenizer, train_byte_bpe
from meshloom.serve.config import EngineConfig
from meshloom.serve.engine import Engine

CHAT_TEMPLATE = """\
{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

CONFIG = DecoderConfig(
    vocab_size=320,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    context=64,
    tie_embeddings=False,
    init_scale=0.5,  # large weights, so that greedy text does not fall into one repeated token
)

SIZES = EngineConfig(buckets=(1, 8, 32), max_num_seqs=4, page_size=4)
SMALL = EngineConfig(buckets=(8,), max_num_seqs=4, page_size=4)  # one program: engines that only one test needs


@pytest.fixture(scope="package", autouse=True)
def programs_are_compiled_once(tmp_path_factory):
    """Many engines of the same shape are made here; each program takes seconds to compile and 0.2 s to load again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_byte_bpe([jax.jit.__doc__, jax.vmap.__doc__], CONFIG.vocab_size)


@pytest.fixture(scope="session")
def lm(tokenizer) -> LanguageModel:
    """Completes text; no chat template."""
    return LanguageModel(Decoder(CONFIG, rngs=nnx.Rngs(0)), CONFIG, tokenizer)


@pytest.fixture(scope="session")
def chat_lm(lm, tokenizer) -> LanguageModel:
    chatty = Tokenizer(tokenizer.backend, bos_id=0, eos_ids=tokenizer.eos_ids, chat_template=CHAT_TEMPLATE)
    return LanguageModel(lm.module, lm.config, chatty)


@pytest.fixture(scope="session")
def engine(chat_lm):
    with Engine(chat_lm, SIZES, name="tiny") as engine:
        yield engine
