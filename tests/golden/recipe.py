"""The weights of the golden models: a function of a tensor's name and shape, so that only logits are stored.

Used by `make_goldens.py` (which runs transformers) and by the tests (which run Meshloom).
"""

import json
import pathlib
import zlib

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values for the tensor `name` of a checkpoint, of a size that keeps activations near 1."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return draw / np.float32(np.sqrt(shape[-1]))
    return draw * np.float32(0.1) if name.endswith("bias") else np.float32(1) + draw * np.float32(0.2)


def write_checkpoint(folder: pathlib.Path, config: dict, tensors: dict[str, list[int]]) -> None:
    """A Hugging Face folder of these names and shapes, filled by the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: weight(name, tuple(shape)) for name, shape in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(file: pathlib.Path, metadata: dict, tensors: dict[str, list]) -> None:
    """A GGUF file of this metadata; each tensor is `[quantization, shape]`, filled by the recipe."""
    writer = GGUFWriter(file, metadata["general.architecture"])
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for name, (kind, shape) in tensors.items():
        quantization = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(weight(name, tuple(shape)), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
