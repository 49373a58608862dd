"""The golden cases: tiny models of every family, with the logits that transformers gives."""

import importlib.util
import json
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

_spec = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

NAMES = sorted(path.stem for path in (GOLDEN / "families").glob("*.json"))


class Golden:
    """One case: the config.json and tensors of a checkpoint, inputs, and expected logits."""

    def __init__(self, name: str):
        text = json.loads((GOLDEN / "families" / f"{name}.json").read_text())
        self.name = name
        self.config: dict = text["config"]
        self.tensors: dict[str, list[int]] = text["tensors"]
        arrays = np.load(GOLDEN / "families" / f"{name}.npz")
        self.tokens = arrays["tokens"]
        self.decoder_tokens = arrays.get("decoder_tokens")
        self.logits = arrays["logits"]

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return (self.tokens,) if self.decoder_tokens is None else (self.tokens, self.decoder_tokens)

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        recipe.write_checkpoint(folder, self.config, self.tensors)
        return folder
