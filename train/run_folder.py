"""The folder of a run: where everything lies, and the file that says what the run is.

`meshloom.json` is written before the first step and never again; serving reads the model from it, and a second start
compares itself with it, so that a run is either the same one or refused.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from meshloom.core.config import to_dict
from meshloom.core.errors import CheckpointError, ConfigError
from meshloom.models.config import ModelConfig
from meshloom.models.config_dict import config_to_dict
from meshloom.models.run_weights import FORMAT
from meshloom.models.tokenizer import Tokenizer
from meshloom.train.config import TrainConfig, continuity_errors


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes a run the same run.

    Attributes:
        model, train: configurations. dtype: of the computation. corpus: hash of documents and tokenizer.
    """

    model: ModelConfig
    train: TrainConfig
    dtype: str
    corpus: str

    def to_dict(self) -> dict[str, Any]:
        """As `meshloom.json` holds it."""
        return {
            "format": FORMAT,
            "family": self.model.family,
            "model": config_to_dict(self.model),
            "train": to_dict(self.train),
            "dtype": self.dtype,
            "corpus": self.corpus,
        }


class RunFolder:
    """Paths of a run, and its description."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path).expanduser().absolute()
        self.description = self.path / "meshloom.json"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "loss.png"

    def read(self) -> dict[str, Any] | None:
        """The description, or None if no run began here.

        Raises:
            CheckpointError: it cannot be read, or another version of Meshloom wrote it.
        """
        if not self.description.is_file():
            return None
        try:
            values = json.loads(self.description.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.description} cannot be read: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("train"), dict):
            raise CheckpointError(f"{self.description} is no description of a run of format {FORMAT}")
        return values

    def write(self, identity: Identity, tokenizer: Tokenizer) -> None:
        """The tokenizer, then the description; each appears complete."""
        partial = self.path / "tokenizer.partial"
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save(partial)
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        os.replace(partial, self.tokenizer)
        text = json.dumps(identity.to_dict(), indent=2, ensure_ascii=False) + "\n"
        described = self.path / "meshloom.json.partial"
        described.write_text(text, encoding="utf-8")
        os.replace(described, self.description)

    def check_configuration(self, stored: dict[str, Any], config: TrainConfig) -> None:
        """Raises ConfigError that names every field in which `config` is not the run that began here."""
        if changed := continuity_errors(stored["train"], to_dict(config)):
            reason = ""
            if any(change.startswith("steps:") for change in changed):
                reason = (
                    " (steps shape the learning rate of every step; to be extended, a run needs schedule=constant and "
                    "warmup_steps given from the start)"
                )
            raise ConfigError(
                f"{self.path} holds a run with another configuration, which cannot go on as this one: "
                f"{'; '.join(changed)}{reason}. Use the old values, or another run_dir"
            )

    def check_identity(self, stored: dict[str, Any], identity: Identity) -> None:
        """Raises ConfigError if data, tokenizer or computation are no longer those of the run that began here."""
        if stored["corpus"] != identity.corpus:
            raise ConfigError(
                f"{self.path}: the texts of data={identity.train.data} are no longer those that this run began with "
                f"(hash {stored['corpus']}, now {identity.corpus}); restore them, or use another run_dir"
            )
        if stored["dtype"] != identity.dtype:
            raise ConfigError(
                f"{self.path}: this run computes in {stored['dtype']}, and dtype={identity.train.dtype} is "
                f"{identity.dtype} here; go on with dtype={stored['dtype']}, or use another run_dir"
            )
