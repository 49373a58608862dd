"""Where a model comes from: a name, a folder, a file or a Hugging Face id, as one thing to plan with or to load.

`resolve` reads configurations only; weights and tokenizer are read when asked for. It knows no device: placement is the
caller's.
"""

import dataclasses
import difflib
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshloom.core.errors import CheckpointError, ModelError
from meshloom.models.config import EncoderDecoderConfig, ModelConfig
from meshloom.models.config_dict import config_from_dict
from meshloom.models.decoder import Decoder
from meshloom.models.encoder_decoder import EncoderDecoder
from meshloom.models.families import family_named, family_of
from meshloom.models.families.gguf import IGNORED as GGUF_IGNORED
from meshloom.models.families.gguf import read_gguf_config
from meshloom.models.gguf import GGUFSource
from meshloom.models.gguf_tokenizer import read_gguf_tokenizer
from meshloom.models.presets import PRESETS
from meshloom.models.random_weights import random_weights
from meshloom.models.smollm2 import smollm2_file
from meshloom.models.tensor_files import SafetensorsSource
from meshloom.models.tokenizer import Tokenizer, train_byte_bpe
from meshloom.models.weights import Progress, load_weights, restack

_HF_FILES = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes:
        where: what to call it in messages.
        config: its architecture.
        dtype: the floating-point type its weights are kept in.
        tokenizer: reads the tokenizer; None comes back when there is none.
        weights: fills an abstract module: `weights(module, shardings, progress)`, shardings as in `load_weights`.
        quantized: its weights are kept in 8 bits or less.
    """

    where: str
    config: ModelConfig
    dtype: Any
    tokenizer: Callable[[], Tokenizer | None]
    weights: Callable[[nnx.Module, Any, Progress | None], nnx.Module]
    quantized: bool = False


def resolve(source: str | pathlib.Path) -> ModelSource:
    """The model that a source names: `smollm2`, a preset, a folder, a .gguf file or a Hugging Face id.

    Raises:
        ModelError: nothing of that name, or a model that is not supported.
    """
    text, path = str(source), pathlib.Path(source).expanduser()
    if text == "smollm2":
        return dataclasses.replace(_from_gguf(smollm2_file()), where="smollm2")
    if text in PRESETS:
        return _from_preset(text)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a file, but not a .gguf file; give the folder that holds config.json and the weights"
            )
        return _from_gguf(path)
    if path.is_dir():
        return _from_run(path) if (path / "meshloom.json").is_file() else _from_folder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _from_folder(_download(text))
    raise ModelError(_unknown(text))


def abstract(source: str | pathlib.Path, *, scan_layers: bool | None = None) -> tuple[ModelConfig, nnx.Module]:
    """Configuration and abstract module (shapes without weights) of a source, in its own dtype; reads no weights.

    Args:
        scan_layers: with the layers stacked, or unrolled; None is as the source has it.
    """
    text, path = str(source), pathlib.Path(source).expanduser()
    if text == "smollm2":
        # The file keeps the constant in float32; a program compiled for one is not one compiled for the other.
        config = dataclasses.replace(PRESETS["smollm2-135m"], norm_eps=float(np.float32(1e-5)))
        dtype = jnp.float32
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.exists():
        values = _read_config(_download(text, files=["config.json"]))
        config, dtype = family_of(values).read_config(values), _stated_dtype(values)
    else:
        resolved = resolve(source)
        config, dtype = resolved.config, resolved.dtype
    if scan_layers is not None:
        config = dataclasses.replace(config, scan_layers=scan_layers)
    return config, abstract_module(config, dtype)


def abstract_module(config: ModelConfig, dtype: Any) -> nnx.Module:
    """The module of a configuration with abstract parameters of a dtype."""
    kind = EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Decoder
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), param_dtype=dtype))


def _dtype_of(module: nnx.Module) -> Any:
    return jax.tree.leaves(nnx.state(module, nnx.Param))[0].dtype


def _unknown(text: str) -> str:
    near = difflib.get_close_matches(text, ["smollm2", *PRESETS], n=3, cutoff=0.5)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    return (
        f"there is no model {text!r}{hint}. A model is one of: smollm2 (the embedded default);"
        f" a preset ({', '.join(PRESETS)}); a folder with config.json and safetensors; a .gguf file;"
        " the folder of a training run; a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def _from_preset(name: str) -> ModelSource:
    config = PRESETS[name]
    # Random weights know no words: bytes make do, so that a preset can be served and measured.
    tokenizer = functools.partial(train_byte_bpe, (), 257)
    return ModelSource(
        f"preset {name} (random weights)",
        config,
        jnp.bfloat16,
        tokenizer,
        lambda module, shardings, progress: random_weights(module, seed=0, shardings=shardings),
    )


def _from_gguf(path: pathlib.Path) -> ModelSource:
    file = GGUFSource(path)
    config, rules = read_gguf_config(file)

    def weights(module: nnx.Module, shardings: Any, progress: Progress | None) -> nnx.Module:
        options = {"where": str(path), "ignored": GGUF_IGNORED}
        return load_weights(module, rules, file, shardings=shardings, progress=progress, **options)

    tokenizer = functools.partial(read_gguf_tokenizer, file.metadata)
    return ModelSource(str(path), config, file.plain_dtype(), tokenizer, weights, file.quantized)


def _from_folder(folder: pathlib.Path) -> ModelSource:
    values = _read_config(folder)
    family = family_of(values)
    config = family.read_config(values)

    def weights(module: nnx.Module, shardings: Any, progress: Progress | None) -> nnx.Module:
        return load_weights(
            module,
            family.rules(config),
            SafetensorsSource(folder),
            where=str(folder),
            shardings=shardings,
            renames=family.renames,
            ignored=family.ignored,
            progress=progress,
        )

    return ModelSource(
        str(folder), config, _stated_dtype(values), functools.partial(_folder_tokenizer, folder), weights
    )


def _folder_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
    held = (folder / "tokenizer.json").is_file() or (folder / "merges.txt").is_file()
    return Tokenizer.load(folder) if held else None


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no model: expected config.json (Hugging Face) or meshloom.json (a training run)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _stated_dtype(values: dict[str, Any]) -> Any:
    """The dtype that a config.json gives: `dtype`, before transformers 5 `torch_dtype`; float32 if neither."""
    stated = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtypes = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16, "float64": np.float32}
    if stated not in dtypes:
        raise ModelError(f"config.json: dtype={stated!r} is not supported; supported: {', '.join(dtypes)}")
    return dtypes[stated]


def _from_run(folder: pathlib.Path) -> ModelSource:
    try:
        values = json.loads((folder / "meshloom.json").read_text(encoding="utf-8"))
        config = config_from_dict(values["model"])
        dtype = jnp.dtype(values.get("weights", "float32"))  # training keeps float32 masters and does not say so
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'meshloom.json'} cannot be read: {type(error).__name__}: {error}") from error
    family_named(config.family)

    def weights(module: nnx.Module, shardings: Any, progress: Progress | None) -> nnx.Module:
        from meshloom.models.run_weights import read_run  # orbax takes 1.5 s to import; only runs need it

        if module.config.scan_layers == config.scan_layers:
            return read_run(folder / "checkpoints", module, shardings)
        trained = read_run(folder / "checkpoints", abstract_module(config, _dtype_of(module)))
        return restack(trained, module, shardings=shardings)

    return ModelSource(str(folder), config, dtype, functools.partial(_folder_tokenizer, folder / "tokenizer"), weights)


def _download(repository: str, files: list[str] | None = None) -> pathlib.Path:
    """Folder of a Hugging Face repository in the user's cache, fetched if need be; its configuration first."""
    import huggingface_hub  # 0.3 s that other sources need not pay
    from huggingface_hub import errors

    try:
        first = huggingface_hub.snapshot_download(repository, allow_patterns=["config.json"])
        family_of(values := _read_config(pathlib.Path(first))).read_config(values)
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=files or _HF_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no Hugging Face model {repository!r}, or you may not see it (`hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"{repository} is not in the Hugging Face cache and huggingface.co cannot be reached"
            f" ({type(error).__name__}: {reason}); give a local folder or .gguf file, or use smollm2"
        ) from error


def default_axes(model: str, count: int) -> dict[str, int]:
    """The split that `Plan.mesh` documents."""
    config, _ = abstract(model)
    kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    if count < 4 or count % 2:
        return {"fsdp": count}
    if getattr(config, "moe", None) is not None:
        return {"fsdp": count // 2, "expert": 2}
    return {"fsdp": count // 2, "tensor": 2} if kv_heads % 2 == 0 else {"fsdp": count}
