"""The folder of a run: what it holds, who may write it, and whether a configuration may go on in it.

    meshloom.json   the model's and the run's configuration; written once the run is ready to begin
    tokenizer/      tokenizer.json and its companions
    checkpoints/    one folder per step
    metrics.jsonl   one line per logged step
    loss.png        the loss so far
"""

import fcntl
import json
import pathlib
from types import TracebackType
from typing import Any

from meshloom.core.checkpoint import check_writable
from meshloom.core.config import to_dict
from meshloom.core.errors import CheckpointError, ConfigError
from meshloom.core.metrics import replace_text
from meshloom.models.config import DecoderConfig
from meshloom.models.config_dict import config_to_dict
from meshloom.models.tokenizer import Tokenizer
from meshloom.train.config import TrainConfig

FORMAT = 1


class RunFolder:
    """The folder of one run, locked against a second process while it is open.

    Attributes:
        record: the content of meshloom.json, or None when the run has not begun.
    """

    def __init__(self, path: pathlib.Path):
        """
        Raises:
            CheckpointError: the folder cannot be written, or holds something else, or another process trains in it.
        """
        self.path = path.expanduser()
        check_writable(self.path, 0)
        self._lock: Any = None
        self.record = self._read()
        if self.record is not None:
            self._take_lock()

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> pathlib.Path:
        return self.path / "loss.png"

    def _read(self) -> dict[str, Any] | None:
        file = self.path / "meshloom.json"
        if file.is_file():
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                if record["format"] != FORMAT:
                    raise CheckpointError(f"{file} has format {record['format']}; this version reads {FORMAT}")
                return record | {"train": dict(record["train"])}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{file} is not a run's description: {type(error).__name__}: {error}") from error
        ours = {"tokenizer", "metrics.jsonl", "checkpoints", ".lock", ".meshloom.json.partial", ".metrics.jsonl.partial"}
        others = sorted(each.name for each in self.path.iterdir() if each.name not in ours) if self.path.is_dir() else []
        if others:
            raise CheckpointError(
                f"{self.path} is not the folder of a run and is not empty (it holds {', '.join(others[:3])}): "
                "give a new folder"
            )
        return None

    def check(self, config: TrainConfig) -> None:
        """Refuses a configuration under which this would be another run.

        Raises:
            ConfigError: names every key that differs, with both values.
        """
        if self.record is None:
            return
        changed = config.breaks_continuity_with(self.record["train"])
        if changed:
            differences = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
            raise ConfigError(
                f"{self.path} holds a run with other settings: {differences}. Give them as they were to go on, "
                "or another folder (run) to start anew"
            )

    def begin(self, config: TrainConfig, model: DecoderConfig, tokenizer: Tokenizer, fingerprint: str) -> None:
        """Writes what stays the same for the whole run; from here on the folder is a run.

        Raises:
            CheckpointError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take_lock()
        if self.record is None:
            tokenizer.save(self.path / "tokenizer")
        self.record = {
            "family": model.family,
            "model": config_to_dict(model),
            "train": to_dict(config),
            "data": fingerprint,
            "format": FORMAT,
        }
        replace_text(self.path / "meshloom.json", json.dumps(self.record, indent=2) + "\n")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer")

    def _take_lock(self) -> None:
        # The system lets go of it when the process ends, however it ends.
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CheckpointError(f"another process is training in {self.path}") from error

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
