"""Every family gives the logits of transformers in float32, all at once and step by step through the paged cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import meshloom.models as models
from meshloom.models.encoder_decoder import EncoderDecoder
from meshloom.pallas_kernels import Ragged
from tests.models.golden_cases import GOLDEN, NAMES, Golden

TOLERANCE = (
    2e-4  # logits are about 4, float32 resolves 4e-7 of that: room for sums in another order, none for a wrong formula
)

PAGE = 4
ROWS = 16
# Rows that the two sequences bring to each step: ragged chunks of the prompts, then one by one, at last the longer one
# alone.
STEPS = [(9, 5), (1, 11), *[(1, 1)] * 4]


def steps_to(length: int) -> list[tuple[int, int]]:
    done = np.sum(STEPS, axis=0)
    return [*STEPS, *[(0, 1)] * (length - done[1]), *[(1, 0)] * (length - done[0])]


def stepwise_logits(module, tokens: np.ndarray, memory) -> np.ndarray:
    """Logits `[2, T, V]` of two sequences fed through a paged cache whose pages lie in no order."""
    graphdef, state = nnx.split(module)
    length = tokens.shape[1]
    width = -(-length // PAGE)
    pages = np.random.default_rng(0).permutation(2 * width + 1)[: 2 * width].reshape(2, width).astype(np.int32)

    @jax.jit
    def step(state, rows, ragged, cache, memory):
        model = nnx.merge(graphdef, state)
        return model(rows, ragged, cache) if memory is None else model.decode(rows, memory, ragged, cache)

    cache = module.init_cache(2 * width + 1, PAGE)
    done = np.zeros(2, int)
    found = [[], []]
    for counts in steps_to(length):
        present = [s for s in range(2) if counts[s]]
        taken = [counts[s] for s in present]
        rows = np.concatenate([tokens[s, done[s] : done[s] + counts[s]] for s in present])
        done += counts
        absent = 2 - len(present)
        ragged = Ragged(
            kv_lens=jnp.asarray([*done[present], *[0] * absent], jnp.int32),
            page_table=jnp.asarray(np.concatenate([pages[present], np.zeros((absent, width), np.int32)])),
            cu_q_lens=jnp.asarray(np.cumsum([0, *taken, *[0] * absent]), jnp.int32),
            num_seqs=jnp.int32(len(present)),
        )
        # A step reads row s of the memory for its sequence s.
        order = jnp.asarray([*present, *[0] * absent])
        read = None if memory is None else jax.tree.map(lambda x, order=order: x[order], memory)
        logits, cache = step(state, jnp.asarray(np.pad(rows, (0, ROWS - rows.size))), ragged, cache, read)
        for s, part in zip(present, np.split(np.asarray(logits)[: rows.size], np.cumsum(taken)[:-1]), strict=True):
            found[s].append(part)
    return np.stack([np.concatenate(each) for each in found])


# Unrolled layers differ from scanned ones in how weights and pages are stacked, not by variant: one case per pattern
# will do. Scanned ones compile in half the time.
UNROLLED = ["llama", "gemma3", "qwen3-moe-mixed", "gpt2", "neox", "phi3", "mixtral", "t5"]
CASES = [*((name, True) for name in NAMES), *((name, False) for name in UNROLLED)]


@pytest.mark.parametrize(("name", "scan"), CASES, ids=[name if scan else f"{name}-unrolled" for name, scan in CASES])
def test_logits_equal_transformers(name, scan, tmp_path):
    golden = Golden(name)
    lm = models.load(golden.write(tmp_path / "model"), scan_layers=scan)
    np.testing.assert_allclose(lm.logits(*golden.inputs), golden.logits, rtol=0, atol=TOLERANCE)
    memory, tokens = None, golden.tokens
    if isinstance(lm.module, EncoderDecoder):
        memory, tokens = lm.module.encode(jnp.asarray(golden.tokens)), golden.decoder_tokens
    np.testing.assert_allclose(stepwise_logits(lm.module, tokens, memory), golden.logits, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def smollm2():
    text = json.loads((GOLDEN / "smollm2.json").read_text())
    return models.load("smollm2", scan_layers=True), text, np.load(GOLDEN / "smollm2.npz")


def test_smollm2_logits_on_english_equal_transformers(smollm2):
    lm, text, golden = smollm2
    assert lm.tokenizer.encode(text["english"])[:64] == golden["tokens"].tolist()
    logits = np.asarray(lm.logits(golden["tokens"][None]))[0]
    np.testing.assert_allclose(logits[:, ::97], golden["columns"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), golden["logsumexp"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])


def test_smollm2_continues_eight_prompts_as_transformers_does(smollm2):
    lm, text, _ = smollm2
    assert [lm.tokenizer.encode(prompt) for prompt in text["prompts"]] == text["prompt_ids"]
    # Teacher forcing over prompt and answer: each answer token must be the argmax of what comes before it.
    rows = [prompt + answer for prompt, answer in zip(text["prompt_ids"], text["greedy"], strict=True)]
    width = max(map(len, rows))
    best = np.asarray(lm.logits(np.asarray([row + [0] * (width - len(row)) for row in rows], np.int32)).argmax(-1))
    for row, prompt, answer, chosen in zip(rows, text["prompt_ids"], text["greedy"], best, strict=True):
        assert len(answer) == 48
        assert chosen[len(prompt) - 1 : len(row) - 1].tolist() == answer
