"""GGUF's architectures: metadata to a configuration, and its names of the weights.

Facts that differ from Hugging Face files: Llama's q and k rows are ordered to rotate neighbours, Gemma's norms have
their `1 +` baked in, GPT-2's matrices are `[out, in]`, experts are stacked, and Llama 3.1's and Phi's rope factors are
tensors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig, MoEConfig, RopeConfig
from meshloom.models.gguf import GGUFSource
from meshloom.models.weight_map import AS_IS, RotaryPairs, Rows, Rule, Shifted, linear, rule

_REQUIRED = object()


class _Metadata:
    """The keys of one architecture in a file."""

    def __init__(self, source: GGUFSource):
        self.source = source
        self.architecture: str = source.metadata.get("general.architecture", "")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.source.metadata.get(f"{self.architecture}.{name}", default)
        if value is _REQUIRED:
            raise ModelError(
                f"{self.source.path}: the metadata has no {self.architecture}.{name}, which the architecture needs"
            )
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise ModelError(f"{self.source.path}: {name} differs between layers ({value}), which is not supported")
            return value[0]
        return value

    def factors(self, tensor: str) -> tuple[float, ...]:
        return tuple(map(float, self.source.read(tensor))) if tensor in self.source.shapes else ()


def _common(meta: _Metadata, family: str, **differences: Any) -> DecoderConfig:
    vocab_size, d_model = meta.source.shapes["token_embd.weight"]
    heads = meta.take("attention.head_count")
    head_dim = meta.take("attention.key_length", d_model // heads)
    fields = {
        "family": family,
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_layers": meta.take("block_count"),
        "n_heads": heads,
        "n_kv_heads": meta.take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "d_ff": meta.take("feed_forward_length"),
        "context": meta.take("context_length"),
        "norm_eps": meta.take("attention.layer_norm_rms_epsilon", None) or meta.take("attention.layer_norm_epsilon"),
        "tie_embeddings": "output.weight" not in meta.source.shapes,
        "qkv_bias": "blk.0.attn_q.bias" in meta.source.shapes,
    }
    if "rope" not in differences:
        differences["rope"] = _rope(meta, head_dim)
    return DecoderConfig(**fields | differences)


def _rope(meta: _Metadata, head_dim: int) -> RopeConfig:
    shared = {
        "theta": float(meta.take("rope.freq_base", 10_000.0)),
        "fraction": meta.take("rope.dimension_count", head_dim) / head_dim,
    }
    original = meta.take("rope.scaling.original_context_length", meta.take("context_length"))
    if baked := meta.factors("rope_freqs.weight"):  # Llama 3.1's ramp, already worked out
        return RopeConfig(
            **shared, scaling="longrope", long_factors=baked, short_factors=baked, original_context=original
        )
    if long := meta.factors("rope_factors_long.weight"):
        attention_factor = float(meta.take("rope.scaling.attn_factor", 1.0))
        short = meta.factors("rope_factors_short.weight")
        return RopeConfig(
            **shared,
            scaling="longrope",
            long_factors=long,
            short_factors=short,
            original_context=original,
            attention_factor=attention_factor,
        )
    kind = meta.take("rope.scaling.type", "none")
    if kind == "linear":
        return RopeConfig(**shared, scaling="linear", factor=float(meta.take("rope.scaling.factor")))
    if kind != "none":
        raise ModelError(
            f"{meta.source.path}: rope scaling {kind!r} is not supported in GGUF files; supported: none, linear"
        )
    return RopeConfig(**shared)


def _moe(meta: _Metadata, d_ff: int) -> MoEConfig:
    return MoEConfig(
        n_experts=meta.take("expert_count"), top_k=meta.take("expert_used_count"), d_ff=d_ff, normalize=True
    )


def _llama(meta: _Metadata) -> DecoderConfig:
    if meta.take("expert_count", 0):
        return _common(meta, "mixtral", moe=_moe(meta, meta.take("feed_forward_length")))
    return _common(meta, "llama")


def _qwen2(meta: _Metadata) -> DecoderConfig:
    return _common(meta, "qwen2", qkv_bias=True)


def _qwen3(meta: _Metadata) -> DecoderConfig:
    return _common(meta, "qwen3", qk_norm=True)


def _qwen3_moe(meta: _Metadata) -> DecoderConfig:
    return _common(meta, "qwen3_moe", qk_norm=True, moe=_moe(meta, meta.take("expert_feed_forward_length")))


def _gemma(meta: _Metadata, family: str, largest: int, **differences: Any) -> DecoderConfig:
    d_model, heads = meta.take("embedding_length"), meta.take("attention.head_count")
    # The 27B models, told by their depth, scale by d_model / heads; the file does not say.
    scalar = d_model // heads if meta.take("block_count") == largest else meta.take("attention.key_length")
    return _common(
        meta,
        family,
        activation="gelu_tanh",
        norm_offset=True,
        post_norm=True,
        embed_scale=d_model**0.5,
        attention_scale=scalar**-0.5,
        attention_soft_cap=meta.take("attn_logit_softcapping", None),
        logit_soft_cap=meta.take("final_logit_softcapping", None),
        window=meta.take("attention.sliding_window"),
        **differences,
    )


def _gemma2(meta: _Metadata) -> DecoderConfig:
    return _gemma(meta, "gemma2", 46, global_every=2)


def _gemma3(meta: _Metadata) -> DecoderConfig:
    local = RopeConfig(theta=float(meta.take("rope.freq_base_swa", 10_000.0)))
    return _gemma(meta, "gemma3", 62, global_every=6, local_rope=local, qk_norm=True)


def _phi3(meta: _Metadata) -> DecoderConfig:
    return _common(meta, "phi3", window=meta.take("attention.sliding_window", None))


def _gpt2(meta: _Metadata) -> DecoderConfig:
    return _common(
        meta,
        "gpt2",
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        rope=None,
        learned_positions=meta.take("context_length"),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _outer(config: DecoderConfig, norm: Rows | Shifted = AS_IS) -> tuple[Rule, ...]:
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("token_embd.weight", "embed.weight"),
        rule("position_embd.weight", "positions.weight"),
        *linear("output_norm", "final_norm", norm),
        rule("output.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
    )


def _norms(names: dict[str, str], form: Rows | Shifted = AS_IS) -> tuple[Rule, ...]:
    return tuple(r for file, part in names.items() for r in linear(f"blk.{{i}}.{file}", f"layers.{{i}}.{part}", form))


_PRE_NORMS = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}


def _attention(form_q: Rows | RotaryPairs = AS_IS, form_k: Rows | RotaryPairs = AS_IS, norm: Rows | Shifted = AS_IS):
    block, layer = "blk.{i}", "layers.{i}.attention"
    projections = {
        "attn_q": ("q", form_q),
        "attn_k": ("k", form_k),
        "attn_v": ("v", AS_IS),
        "attn_output": ("out", AS_IS),
    }
    return (
        *(
            rule(f"{block}.{file}.{kind}", f"{layer}.{part}.{kind}", form=form)
            for file, (part, form) in projections.items()
            for kind in ("weight", "bias")
        ),
        rule(f"{block}.attn_q_norm.weight", f"{layer}.q_norm.weight", form=norm),
        rule(f"{block}.attn_k_norm.weight", f"{layer}.k_norm.weight", form=norm),
        rule(f"{block}.attn_qkv.weight", *(f"{layer}.{part}.weight" for part in "qkv")),
        rule(f"{block}.attn_qkv.bias", *(f"{layer}.{part}.bias" for part in "qkv")),
    )


def _mlp() -> tuple[Rule, ...]:
    return tuple(
        r for part in ("gate", "up", "down") for r in linear(f"blk.{{i}}.ffn_{part}", f"layers.{{i}}.mlp.{part}")
    )


def _experts() -> tuple[Rule, ...]:
    stacked = (
        rule(f"blk.{{i}}.ffn_{part}_exps.weight", f"layers.{{i}}.mlp.{part}.weight") for part in ("gate", "up", "down")
    )
    return (rule("blk.{i}.ffn_gate_inp.weight", "layers.{i}.mlp.router.weight"), *stacked)


def _separate(attention: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(each for each in attention if ".attn_qkv." not in each.file)


def _fused(attention: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(each for each in attention if ".attn_qkv." in each.file or ".attn_output." in each.file)


def _plain_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    inner = _mlp() if config.moe is None else _experts()
    return (*_outer(config), *_norms(_PRE_NORMS), *_separate(_attention()), *inner)


def _llama_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    attention = _attention(RotaryPairs(config.n_heads), RotaryPairs(config.n_kv_heads))
    inner = _mlp() if config.moe is None else _experts()
    return (*_outer(config), *_norms(_PRE_NORMS), *_separate(attention), *inner)


def _gemma_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    baked = Shifted(1.0)
    norms = _PRE_NORMS | {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_mlp_norm"}
    return (*_outer(config, baked), *_norms(norms, baked), *_separate(_attention(norm=baked)), *_mlp())


def _phi3_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    mlp = "layers.{i}.mlp"
    return (
        *_outer(config),
        *_norms(_PRE_NORMS),
        *_fused(_attention()),
        rule("blk.{i}.ffn_up.weight", f"{mlp}.gate.weight", f"{mlp}.up.weight"),
        rule("blk.{i}.ffn_down.weight", f"{mlp}.down.weight"),
    )


def _gpt2_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (*_outer(config), *_norms(_PRE_NORMS), *_fused(_attention()), *_mlp())


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` is read."""

    config: Callable[[_Metadata], DecoderConfig]
    rules: Callable[[DecoderConfig], tuple[Rule, ...]]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _llama_rules),
    "qwen2": Architecture(_qwen2, _plain_rules),
    "qwen3": Architecture(_qwen3, _plain_rules),
    "qwen3moe": Architecture(_qwen3_moe, _plain_rules),
    "gemma2": Architecture(_gemma2, _gemma_rules),
    "gemma3": Architecture(_gemma3, _gemma_rules),
    "phi3": Architecture(_phi3, _phi3_rules),
    "gpt2": Architecture(_gpt2, _gpt2_rules),
}

# Tensors that the configuration has taken up.
IGNORED = (r"^rope_freqs\.weight$", r"^rope_factors_(long|short)\.weight$")


def read_gguf_config(source: GGUFSource) -> tuple[DecoderConfig, tuple[Rule, ...]]:
    """Configuration of a GGUF file, and the names of its weights.

    Raises:
        ModelError: the architecture, or a setting of it, is not supported.
    """
    meta = _Metadata(source)
    if meta.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{source.path}: architecture {meta.architecture!r} is not supported in GGUF files;"
            f" supported: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[meta.architecture]
    config = architecture.config(meta)
    return config, architecture.rules(config)
