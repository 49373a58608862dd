"""Makes the golden files, with transformers as the oracle. Not run by the tests.

    python -m venv oracle && oracle/bin/pip install torch transformers==5.23.0 safetensors gguf
    oracle/bin/python tests/golden/make_goldens.py                        # every family
    oracle/bin/python tests/golden/make_goldens.py --only gemma2          # names that contain it
    oracle/bin/python tests/golden/make_goldens.py --smollm2 FILE.gguf
    oracle/bin/python tests/golden/make_goldens.py --check FOLDER --logits FILE.npz

`--check` opens a folder that Meshloom saved, and compares with the logits which Meshloom gave (arrays `tokens`,
`logits`, and `decoder_tokens` of an encoder-decoder).
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import recipe
import torch
import transformers
from safetensors import safe_open

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = COMMON | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "rms_norm_eps": 1e-6}
PHI = {**COMMON, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}
GPT = {
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
OPT = {
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
QWEN_MOE = COMMON | {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
T5 = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}

# Name -> model_type and configuration. Windows (8) are shorter than the sequence (24).
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", COMMON | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", COMMON | {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 6}),
    "llama-bias": ("llama", COMMON | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3}),
    "llama3-rope": ("llama", COMMON | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        COMMON | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-yarn-rope": ("llama", COMMON | {"rope_parameters": YARN}),
    "mistral": ("mistral", COMMON | {"sliding_window": 8}),
    "mistral-tied-global": ("mistral", COMMON | {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", COMMON),
    "qwen2-tied-window": (
        "qwen2",
        COMMON | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", COMMON | {"head_dim": 16}),
    "qwen3-tied-bias": ("qwen3", COMMON | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-moe": ("qwen3_moe", QWEN_MOE | {"norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        QWEN_MOE
        | {"norm_topk_prob": False, "mlp_only_layers": [1], "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mixtral": ("mixtral", COMMON | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", COMMON | {"num_local_experts": 4, "sliding_window": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma2-untied": ("gemma2", GEMMA | {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 5, "sliding_window_pattern": 2}),
    "gemma3-rope": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", PHI | {"sliding_window": 8}),
    "phi3-tied-partial": (
        "phi3",
        PHI
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope-short": ("phi3", PHI | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3-longrope-long": ("phi3", PHI | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "gpt2": ("gpt2", GPT),
    "gpt2-untied-inner": ("gpt2", GPT | {"tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"}),
    "gptj": ("gptj", GPT | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "neox": ("gpt_neox", NEOX | {"rotary_pct": 0.25, "num_attention_heads": 3}),
    "neox-sequential-tied": (
        "gpt_neox",
        NEOX
        | {"rotary_pct": 0.5, "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "opt": ("opt", OPT),
    "opt-untied": ("opt", OPT | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "t5": ("t5", T5),
    "t5-gated-untied": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def gguf_case(architecture: str, **metadata) -> dict:
    common = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": 131,
    }
    named = {f"{architecture}.{key}": value for key, value in (common | metadata).items() if value is not None}
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}  # or transformers' own, beyond 131
    return {"general.architecture": architecture, **named, **ends}


def gguf_layer(heads: int, kv_heads: int, head_dim: int, kinds: tuple[str, ...], extra: dict | None = None) -> dict:
    """Tensors of a layer with separate projections, in different quantizations."""
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "attn_q": (q, 64),
        "attn_k": (kv, 64),
        "attn_v": (kv, 64),
        "attn_output": (64, q),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
    }
    layer = {f"{name}.weight": [kinds[i % len(kinds)], shape] for i, (name, shape) in enumerate(shapes.items())}
    norms = {f"{name}.weight": ["F32", (64,)] for name in ("attn_norm", "ffn_norm")}
    return layer | norms | (extra or {})


def gguf_model(layer: dict, layers: int, **outer) -> dict[str, list]:
    tensors = {"token_embd.weight": ["F16", (131, 64)], "output_norm.weight": ["F32", (64,)]}
    tensors |= {f"{name.replace('__', '.')}": value for name, value in outer.items()}
    return tensors | {f"blk.{i}.{name}": value for i in range(layers) for name, value in layer.items()}


ROUND = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
OUTPUT = {"output__weight": ["Q8_0", (131, 64)]}
BIASES = {f"attn_{name}.bias": ["F32", (size,)] for name, size in (("q", 64), ("k", 32), ("v", 32))}
QK_NORMS = {f"attn_{name}_norm.weight": ["F32", (16,)] for name in "qk"}
GEMMA_NORMS = {f"{name}.weight": ["F32", (64,)] for name in ("post_attention_norm", "post_ffw_norm")}
FUSED = {
    name: value
    for name, value in gguf_layer(4, 2, 16, ("Q8_0",)).items()
    if name.split(".")[0] not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
}
# transformers takes the query scale (256), Qwen3's head size (128), soft caps (50, 30) and expert width (768) from its
# own defaults, not from the file.
GEMMA_META = {
    "attention.key_length": 256,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.sliding_window": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
EXPERTS = {
    "ffn_gate_inp.weight": ["F32", (4, 64)],
    "ffn_gate_exps.weight": ["Q4_0", (4, 768, 64)],
    "ffn_up_exps.weight": ["Q5_0", (4, 768, 64)],
    "ffn_down_exps.weight": ["Q8_0", (4, 64, 768)],
}
GPT2_BIASES = {
    f"{name}.bias": ["F32", (size,)]
    for name, size in {
        "attn_norm": 64,
        "ffn_norm": 64,
        "attn_qkv": 192,
        "attn_output": 64,
        "ffn_up": 256,
        "ffn_down": 64,
    }.items()
}

GGUF_CASES: dict[str, tuple[dict, dict[str, list]]] = {
    "llama": (
        gguf_case("llama", **{"rope.dimension_count": 16}),
        gguf_model(gguf_layer(4, 2, 16, ROUND), 2, **OUTPUT),
    ),
    "llama-tied": (
        gguf_case("llama", **{"rope.dimension_count": 16}),
        gguf_model(gguf_layer(4, 2, 16, ("F32", "BF16", "F16")), 2),
    ),
    "qwen2": (gguf_case("qwen2"), gguf_model(gguf_layer(4, 2, 16, ROUND, BIASES), 2, **OUTPUT)),
    "qwen3": (
        gguf_case("qwen3", **{"attention.key_length": 128}),
        gguf_model(gguf_layer(4, 2, 128, ROUND, {k: ["F32", (128,)] for k in QK_NORMS}), 2),
    ),
    "qwen3moe": (
        gguf_case(
            "qwen3moe",
            expert_count=4,
            expert_used_count=2,
            expert_feed_forward_length=768,
            **{"attention.key_length": 16},
        ),
        gguf_model(
            {
                k: v
                for k, v in gguf_layer(4, 2, 16, ROUND, QK_NORMS).items()
                if k.split(".")[0] not in ("ffn_gate", "ffn_up", "ffn_down")
            }
            | EXPERTS,
            2,
            **OUTPUT,
        ),
    ),
    "phi3": (
        gguf_case("phi3", **{"rope.dimension_count": 16}),
        gguf_model(FUSED | {"attn_qkv.weight": ["Q8_0", (128, 64)], "ffn_up.weight": ["Q4_0", (192, 64)]}, 2, **OUTPUT),
    ),
    "gpt2": (
        gguf_case(
            "gpt2",
            context_length=1024,
            feed_forward_length=256,
            **{"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None, "rope.freq_base": None},
            **{"attention.head_count_kv": 4},
        )
        | {"tokenizer.ggml.tokens": [str(i) for i in range(131)]},
        gguf_model(
            FUSED
            | {
                "attn_qkv.weight": ["Q8_0", (192, 64)],
                "ffn_up.weight": ["Q4_0", (256, 64)],
                "ffn_down.weight": ["Q8_0", (64, 256)],
            }
            | GPT2_BIASES,
            2,
            position_embd__weight=["F32", (1024, 64)],
            output_norm__bias=["F32", (64,)],
        ),
    ),
    "gemma2": (gguf_case("gemma2", **GEMMA_META, **CAPS), gguf_model(gguf_layer(2, 1, 256, ("Q8_0",), GEMMA_NORMS), 2)),
    "gemma3": (
        gguf_case("gemma3", **GEMMA_META | {"block_count": 7, "rope.freq_base": 1e6}),
        gguf_model(gguf_layer(2, 1, 256, ("Q8_0",), GEMMA_NORMS | {k: ["F32", (256,)] for k in QK_NORMS}), 7),
    ),
}


def make_gguf_case(name: str, metadata: dict, tensors: dict[str, list]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        recipe.write_gguf(pathlib.Path(temporary) / "model.gguf", metadata, tensors)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file="model.gguf", dtype=torch.float32
        )
        tokens = tokens_of(1)
        logits = logits_of(model.eval(), tokens, None)
    target = recipe.FOLDER / "gguf"
    np.savez_compressed(target / f"{name}.npz", tokens=tokens, logits=logits)
    text = json.dumps({"metadata": metadata, "tensors": tensors}, indent=1)
    (target / f"{name}.json").write_text(text + "\n")
    print(f"gguf {name}: {len(tensors)} tensors, largest logit {np.abs(logits).max():.2f}")


def tokens_of(seed: int, length: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 131, (2, length), dtype=np.int32)


def open_folder(folder: pathlib.Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"transformers does not take {folder} as it is: {wrong}")
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens: np.ndarray, decoder_tokens: np.ndarray | None) -> np.ndarray:
    inputs = {"input_ids": torch.from_numpy(tokens).long()}
    if decoder_tokens is not None:
        inputs["decoder_input_ids"] = torch.from_numpy(decoder_tokens).long()
    return model(**inputs, use_cache=False).logits.float().numpy()


def names_on_disk(model_type: str, config: dict, folder: pathlib.Path) -> tuple[dict, dict[str, list[int]]]:
    """config.json and tensor names and shapes, as this transformers writes them."""
    made = transformers.AutoConfig.for_model(model_type, **config)
    kind = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    kind.from_config(made).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    return json.loads((folder / "config.json").read_text()), shapes


def make_case(name: str, model_type: str, config: dict) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        written, shapes = names_on_disk(model_type, config, folder / "random")
        if name == "t5-gated-untied":
            # T5 1.1 as it is published: its own unembedding, and a config.json that says so.
            shapes = dict(sorted((shapes | {"lm_head.weight": shapes["shared.weight"]}).items()))
            written["tie_word_embeddings"] = False
        recipe.write_checkpoint(folder / "filled", written, shapes)
        model = open_folder(folder / "filled")
        encoder_decoder = model.config.is_encoder_decoder
        tokens, decoder_tokens = tokens_of(1), tokens_of(2, 20) if encoder_decoder else None
        arrays = {"tokens": tokens, "logits": logits_of(model, tokens, decoder_tokens)}
        if encoder_decoder:
            arrays["decoder_tokens"] = decoder_tokens
    target = recipe.FOLDER / "families"
    np.savez_compressed(target / f"{name}.npz", **arrays)
    text = json.dumps({"config": written, "tensors": shapes}, indent=1, sort_keys=True)
    (target / f"{name}.json").write_text(text + "\n")
    print(f"{name}: {len(shapes)} tensors, largest logit {np.abs(arrays['logits']).max():.2f}")


ENGLISH = (
    "The sun had barely risen when the old fisherman pushed his boat into the calm water. He had done this every"
    " morning for forty years, and still he felt the same quiet joy when the shore grew small behind him and the gulls"
    " began to follow. Today, though, something was different: the sea was silent, and far away a dark line"
    " stood on the horizon."
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three primary colors are",
    "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)


@torch.no_grad()
def make_smollm2(file: pathlib.Path) -> None:
    """Logits on 64 tokens (every 97th column, log-sum-exp and argmax of all) and 48 greedy tokens on 8 prompts."""
    options = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    tokens = torch.tensor([tokenizer(ENGLISH, add_special_tokens=False).input_ids[:64]])
    logits = model(tokens).logits[0]
    prompts, greedy, margins = [], [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        step, cache, chosen, margin = ids, None, [], []
        for _ in range(48):
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            step = best.indices[None, :1]
            chosen.append(int(step[0, 0]))
            margin.append(float(best.values[0] - best.values[1]))
        prompts.append(ids[0].tolist())
        greedy.append(chosen)
        margins.append(min(margin))
        print(repr(tokenizer.decode(chosen)), f"smallest margin {min(margin):.4f}")
    np.savez_compressed(
        recipe.FOLDER / "smollm2.npz",
        tokens=tokens[0].numpy().astype(np.int32),
        columns=logits[:, ::97].numpy(),
        logsumexp=torch.logsumexp(logits, dim=-1).numpy(),
        argmax=logits.argmax(dim=-1).numpy().astype(np.int32),
    )
    text = {"english": ENGLISH, "prompts": PROMPTS, "prompt_ids": prompts, "greedy": greedy, "margins": margins}
    (recipe.FOLDER / "smollm2.json").write_text(json.dumps(text, indent=1) + "\n")


def check(folder: pathlib.Path, logits: pathlib.Path) -> None:
    arrays = np.load(logits)
    decoder_tokens = arrays.get("decoder_tokens")
    difference = np.abs(logits_of(open_folder(folder), arrays["tokens"], decoder_tokens) - arrays["logits"]).max()
    print(f"{folder}: largest logit difference {difference:.2e}")
    if not difference <= 2e-4:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--smollm2", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--logits", type=pathlib.Path)
    options = parser.parse_args()
    if options.check:
        check(options.check, options.logits)
    elif options.smollm2:
        make_smollm2(options.smollm2)
    else:
        for name, (model_type, config) in CASES.items():
            if options.only in name:
                make_case(name, model_type, config)
        for name, (metadata, tensors) in GGUF_CASES.items():
            if options.only in f"gguf-{name}":
                make_gguf_case(name, metadata, tensors)
