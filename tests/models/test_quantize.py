"""Models with int8 weights: near the float32 model, served with its guarantees, and refused where they cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import meshloom
from meshloom import models
from meshloom.core.errors import ModelError
from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.presets import PRESETS
from meshloom.models.quantize import is_quantized, quantize_weights
from meshloom.models.source import abstract_module
from meshloom.pallas_kernels import QArray
from meshloom.serve.config import EngineConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams

SIZES = {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 4 % 97


def decoder(**options) -> Decoder:
    return Decoder(DecoderConfig(**(SIZES | {"init_scale": 0.2} | options)), rngs=nnx.Rngs(0))


def logits(module: nnx.Module) -> np.ndarray:
    return np.asarray(LanguageModel(module, module.config, None).logits(TOKENS))


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"scan_layers": False}, {"tie_embeddings": False}], ids=str)
def test_logits_are_near_those_of_the_weights(options):
    exact = logits(decoder(**options))
    rounded = logits(quantize_weights(decoder(**options)))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.08  # 0.04: rows of 32 numbers; a wrong scale would give 1


def test_weights_take_a_quarter_of_the_bytes():
    def held(module: nnx.Module) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    # A scale per row of 32 or 64 numbers and the norms come on top of the quarter here.
    assert held(quantize_weights(decoder())) < 0.4 * held(decoder())


def test_tokens_do_not_depend_on_the_batch():
    module = quantize_weights(decoder(scan_layers=False))
    lm = LanguageModel(module, module.config, None)
    prompts = [[5, 9, 2], [7] * 20, [11, 3]]
    with Engine(lm, EngineConfig(max_num_seqs=4, buckets=(1, 4, 16), kv_cache_memory=0.001)) as engine:
        params = SamplingParams(max_tokens=8)
        together = [each.token_ids for each in engine.generate(prompts, params)]
        alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone


def test_spread_over_devices_it_gives_the_same_logits():
    mesh = meshloom.make_mesh("fsdp=4,tensor=2")
    module = decoder(scan_layers=True)
    layout = meshloom.derive(module, mesh)
    nnx.update(module, layout.place(nnx.state(module, nnx.Param)))
    spread = quantize_weights(module)
    values = spread.embed.weight.get_value().values
    assert len(values.sharding.device_set) == 8
    assert values.addressable_shards[0].data.size < values.size
    np.testing.assert_allclose(logits(spread), logits(quantize_weights(decoder(scan_layers=True))), atol=2e-3)


def test_smollm2_says_nearly_what_it_says_in_float32():
    tokens = models.load("smollm2", scan_layers=True).tokenizer.encode("The sea was calm that morning, and the boat")
    exact, rounded = (
        jax.nn.log_softmax(models.load("smollm2", scan_layers=True, quantize=q).logits(np.asarray([tokens], np.int32)))
        for q in (None, "auto")
    )
    divergence = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - rounded), axis=-1))
    assert 1e-5 < divergence < 0.02


def test_auto_leaves_float_weights_alone():
    assert not is_quantized(models.load("smollm2-135m", quantize="auto", scan_layers=True).module)


def test_quantized_weights_are_not_saved(tmp_path):
    module = quantize_weights(decoder())
    lm = LanguageModel(module, module.config, None)
    for save in (lm.save, lm.save_checkpoint):
        with pytest.raises(ModelError, match="load the model without quantize"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_form_is_refused():
    with pytest.raises(ModelError, match='quantize is "int8", "auto" or None; got \'int4\''):
        models.load("smollm2-135m", quantize="int4")


MIXTURE = {"n_layers": 2, "moe": MoEConfig(n_experts=4, top_k=2, d_ff=16)}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_mixture_of_experts_says_nearly_what_it_says_in_full(scan):
    exact, rounded = (
        jax.nn.log_softmax(logits(module))
        for module in (
            decoder(scan_layers=scan, **MIXTURE),
            quantize_weights(decoder(scan_layers=scan, **MIXTURE)),
        )
    )
    divergence = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - rounded), axis=-1))
    assert 0 < divergence < 5e-3  # 0.0003; 0.0017 where a token at the margin goes to another expert


def test_routers_stay_as_they_are():
    module = quantize_weights(decoder(scan_layers=False, **MIXTURE))
    layer = module.layers.unrolled[0].mlp
    assert not isinstance(layer.router.weight.get_value(), QArray)
    assert [isinstance(each.weight.get_value(), QArray) for each in (layer.gate, layer.up, layer.down)] == [True] * 3


def test_experts_spread_over_devices_are_served_as_on_one():
    prompts, params = [[5, 9, 2], [7] * 20], SamplingParams(max_tokens=8)
    config = EngineConfig(max_num_seqs=4, buckets=(8,), page_size=4, kv_cache_memory=0.001)
    told = []
    for axes, count in ((None, 1), ({"expert": 2, "tensor": 2}, 4)):
        module = decoder(scan_layers=False, **(MIXTURE | {"n_layers": 1}))
        mesh = None if axes is None else make_mesh(axes, jax.devices()[:count])
        if mesh is not None:
            nnx.update(module, meshloom.derive(module, mesh).place(nnx.state(module, nnx.Param)))
        lm = LanguageModel(quantize_weights(module), module.config, None, mesh)
        values = module.layers.unrolled[0].mlp.down.weight.get_value().values
        assert values.addressable_shards[0].data.size == values.size // count
        with Engine(lm, config, quiet=True) as engine:
            told.append([each.token_ids for each in engine.generate(prompts, params)])
    assert told[0] == told[1]


def test_an_encoder_decoder_is_refused():
    module = abstract_module(PRESETS["t5-base"], jnp.float32)
    with pytest.raises(ModelError, match="int8 weights: only decoders have them, not a EncoderDecoder"):
        quantize_weights(module)
