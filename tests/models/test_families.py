"""Configurations translate both ways without loss, and what is not supported is refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig
from meshloom.models.config_dict import config_from_dict, config_to_dict
from meshloom.models.families import FAMILIES, family_of
from meshloom.models.presets import PRESETS
from tests.models.golden_cases import NAMES, Golden

# Strategies draw plain dictionaries; configurations are built from them in the test, since their executed annotations
# use `random`.


def one_of(**fields):
    """A dictionary with one of the values for each field."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in fields.items()})


def flag(*names):
    """All of these fields true, or all false."""
    return st.booleans().map(lambda value: dict.fromkeys(names, value))


sizes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(2, 300_000),
        "n_layers": st.integers(1, 12),
        "d_model": st.sampled_from([64, 96, 128]),
        "d_ff": st.integers(1, 999),
        "context": st.integers(16, 10_000),
        "tie_embeddings": st.booleans(),
        "norm_eps": st.sampled_from([1e-5, 1e-6]),
        "init_scale": st.sampled_from([0.02, 0.1]),
        "activation": st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    }
)
scalings = [
    {},
    {"scaling": "linear", "factor": 4.0},
    {"scaling": "llama3", "factor": 8.0, "original_context": 16},
    {"scaling": "yarn", "factor": 2.0, "attention_factor": 1.1, "beta_fast": 16.0},
    {
        "scaling": "longrope",
        "long_factors": [2.0, 3.0],
        "short_factors": [1.0, 1.5],
        "attention_factor": 1.2,
        "original_context": 8,
    },
]
ropes = st.builds(
    lambda rope, scaling: rope | ({"original_context": 8192} if "original_context" not in scaling else {}) | scaling,
    one_of(theta=[1e4, 5e5], fraction=[0.25, 0.5, 1.0]),
    st.sampled_from(scalings),
)
windows = one_of(window=[None, 1, 8, 64])
biases = flag("qkv_bias", "out_bias")


@st.composite
def decoder(draw, *parts, **fixed):
    """Fields of a configuration: the common sizes, then what the family adds, then what it fixes."""
    fields = draw(sizes) | draw(one_of(head_dim=[16, 24], n_kv_heads=[1, 2, 4])) | {"n_heads": 4, "rope": draw(ropes)}
    for part in parts:
        fields |= draw(part)
    return fields | fixed


@st.composite
def gpt(draw, *parts, **fixed):
    """Families with one kv head per head and a head size that follows from the others."""
    fields = draw(decoder(*parts, n_kv_heads=4, gated=False, norm="layer", mlp_bias=True))
    return fields | {"head_dim": fields["d_model"] // 4} | fixed


def mixture(**fields):
    return one_of(n_experts=[4, 9], top_k=[1, 4], d_ff=[1, 99], normalize=[True, False], **fields).map(
        lambda moe: {"moe": moe}
    )


def learned(fields):
    return fields | {"rope": None, "learned_positions": fields["context"], "qkv_bias": True, "out_bias": True}


def gemma(**fixed):
    caps = one_of(
        attention_soft_cap=[None, 50.0],
        logit_soft_cap=[None, 30.0],
        attention_scale=[n**-0.5 for n in (1, 24, 224, 256)],
    )
    return decoder(caps, biases, norm_offset=True, post_norm=True, window=8, **fixed).map(
        lambda fields: fields | {"embed_scale": fields["d_model"] ** 0.5}
    )


def gptj(fields, rotated):
    return fields | {"rope": {"fraction": rotated / fields["head_dim"], "interleaved": True}}


qwen_windows = st.one_of(st.just({}), one_of(window=[1, 8, 64], window_from=[0, 3]))
FIELDS = {
    "llama": decoder(biases, flag("mlp_bias")),
    "mistral": decoder(windows),
    "qwen2": decoder(qwen_windows, qkv_bias=True),
    "qwen3": decoder(qwen_windows, biases, qk_norm=True),
    "qwen3_moe": decoder(windows, biases, mixture(dense_layers=[[], [0]]), qk_norm=True),
    "mixtral": decoder(windows, mixture()).map(
        lambda fields: fields | {"moe": fields["moe"] | {"d_ff": fields["d_ff"], "normalize": True}}
    ),
    "gemma2": gemma(global_every=2),
    "gemma3": st.builds(
        lambda fields, rope, every: fields | {"local_rope": rope, "global_every": every},
        gemma(qk_norm=True),
        ropes,
        st.integers(2, 7),
    ),
    "phi3": decoder(windows),
    "gpt2": gpt().map(learned),
    "opt": gpt(position_offset=2, norm_eps=1e-5).map(learned),
    "gptj": st.builds(
        gptj,
        gpt(parallel=True, shared_norm=True, unembed_bias=True, tie_embeddings=False),
        st.sampled_from([4, 6, 10]),
    ),
    "gpt_neox": gpt(biases, flag("parallel")),
    "t5": st.builds(
        lambda fields, tied: (
            fields
            | {
                "tie_embeddings": tied,
                "scale_tied_logits": tied,
                "activation": "relu" if tied else "gelu_tanh",
                "gated": not tied,
            }
        ),
        one_of(
            vocab_size=[2, 40_000],
            n_encoder_layers=[1, 5],
            n_decoder_layers=[1, 4],
            norm_eps=[1e-6, 1e-5],
            context=[1, 999],
            max_distance=[64, 200],
        ),
        st.booleans(),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_config_survives_hugging_face_and_back(name, data):
    config, family = config_from_dict(data.draw(FIELDS[name]) | {"family": name}), FAMILIES[name]
    written = json.loads(json.dumps(family.write_config(config)))
    assert family_of(written) is family
    assert family.read_config(written) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_architectures_that_hugging_face_files_can_say(name):
    config = PRESETS[name]
    family = FAMILIES[config.family]
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config


FLAT_ROPES = [name for name in NAMES if "rope_type" in (Golden(name).config.get("rope_parameters") or {})]


@pytest.mark.parametrize("name", FLAT_ROPES)
def test_older_rope_spellings_mean_the_same(name):
    values = dict(Golden(name).config)
    parameters = values.pop("rope_parameters")
    family = family_of(values)
    older = {"rope_theta": parameters["rope_theta"]}
    if parameters["rope_type"] != "default":
        older["rope_scaling"] = {("type" if name.startswith("phi3") else "rope_type"): parameters["rope_type"]} | {
            key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type")
        }
    elif "partial_rotary_factor" in parameters:
        older["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    assert family.read_config(values | older) == family.read_config(Golden(name).config)


LLAMA = Golden("llama").config


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish' is not supported; supported: silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, r"config.json sets quantization_config=\{'bits': 4\}"),
        ("llama", {"attention_sinks": 4}, "attention_sinks=4, which is not supported"),
        ("llama", {"hidden_size": None}, "has no 'hidden_size'"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ("llama", {"model_type": "llame"}, r"model_type='llame' is not supported \(nearest: llama\)"),
        ("llama", {"num_key_value_heads": 4}, "n_kv_heads=4 must divide n_heads=6"),
        (
            "qwen2-tied-window",
            {"layer_types": ["full_attention"] * 3},
            "layer_types=.* is not supported with the other",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ("opt", {"do_layer_norm_before": False}, "OPT-350m alone"),
        ("opt", {"word_embed_proj_dim": 24}, "OPT-350m alone"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True is not supported"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(case, change, message):
    values = Golden(case).config | change
    with pytest.raises(ModelError, match=message):
        family_of(values).read_config(values)


def test_keys_without_effect_and_unset_ones_pass():
    family = FAMILIES["llama"]
    extra = {
        "torch_dtype": "float16",
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "new_key": None,
        "other_key": False,
    }
    assert family.read_config(LLAMA | extra) == family.read_config(LLAMA)


@pytest.mark.parametrize(
    ("case", "published"),
    [
        (
            "llama-tied",
            {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "fp16"}},
        ),
        (
            "gptj",
            {"rotary": True, "scale_attn_weights": True, "summary_type": "cls_index", "gradient_checkpointing": False},
        ),
        ("neox", {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu_fast", "rotary_emb_base": 10000}),
        ("opt", {"prefix": "</s>", "activation_dropout": 0.0, "layerdrop": 0.0}),
        ("gpt2", {"n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True}}}),
        ("phi3", {"auto_map": {"AutoConfig": "x.y"}, "embd_pdrop": 0.0, "attention_bias": False}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("t5-gated-untied", {"output_past": True, "dense_act_fn": "gelu_new", "is_gated_act": True}),
        ("qwen3-moe", {"output_router_logits": False, "router_aux_loss_coef": 0.001, "max_window_layers": 48}),
    ],
)
def test_keys_of_published_models_are_understood(case, published):
    values = Golden(case).config
    assert family_of(values).read_config(values | published).family == family_of(values).name


def test_the_text_part_of_a_multimodal_gemma3_is_read():
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "model_type": "gemma3_text",
    }
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    values = {"model_type": "gemma3", "text_config": text | scaling, "vision_config": {}, "mm_tokens_per_image": 256}
    assert family_of(values).read_config(values) == PRESETS["gemma3-4b"]


def test_an_unknown_field_of_a_stored_config_is_refused():
    with pytest.raises(ModelError, match="DecoderConfig has no field colour"):
        config_from_dict(config_to_dict(DecoderConfig()) | {"colour": 1})
