"""Meshloom: a compiler-centric runtime for large language models on JAX/XLA.

One model, written once, is trained and served; its sharding is derived from the traced program. Importing this
package is cheap and starts
no JAX backend: names are loaded when they are first used.

    import meshloom

    lm = meshloom.load("smollm2")
    engine = meshloom.Engine(lm, meshloom.EngineConfig())
    [answer] = engine.generate(["The capital of France is"], meshloom.SamplingParams(max_tokens=8))
    print(answer.text)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that owns it.
_HOME = {
    "ArchitectureConfig": "meshloom.train.config",
    "Completion": "meshloom.serve.request",
    "DecoderConfig": "meshloom.models.config",
    "EncoderDecoderConfig": "meshloom.models.config",
    "Engine": "meshloom.serve.engine",
    "EngineConfig": "meshloom.serve.config",
    "LanguageModel": "meshloom.models.language_model",
    "Layout": "meshloom.sharding.layout",
    "MeshloomError": "meshloom.core.errors",
    "Run": "meshloom.train.loop",
    "SamplingParams": "meshloom.serve.request",
    "TrainConfig": "meshloom.train.config",
    "derive": "meshloom.sharding.derive",
    "load": "meshloom.loading",
    "make_mesh": "meshloom.core.topology",
    "simulate_cpu_devices": "meshloom.core.topology",
    "train": "meshloom.train",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from meshloom.core.errors import MeshloomError as MeshloomError
    from meshloom.core.topology import make_mesh as make_mesh
    from meshloom.core.topology import simulate_cpu_devices as simulate_cpu_devices
    from meshloom.loading import load as load
    from meshloom.models.config import DecoderConfig as DecoderConfig
    from meshloom.models.config import EncoderDecoderConfig as EncoderDecoderConfig
    from meshloom.models.language_model import LanguageModel as LanguageModel
    from meshloom.serve.config import EngineConfig as EngineConfig
    from meshloom.serve.engine import Engine as Engine
    from meshloom.serve.request import Completion as Completion
    from meshloom.serve.request import SamplingParams as SamplingParams
    from meshloom.sharding.derive import derive as derive
    from meshloom.sharding.layout import Layout as Layout
    from meshloom.train.config import ArchitectureConfig as ArchitectureConfig
    from meshloom.train.config import TrainConfig as TrainConfig
    from meshloom.train.loop import Run as Run
    from meshloom.train.loop import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'meshloom' has no attribute {name!r}; it offers {', '.join(__all__)}")
    home = importlib.import_module(_HOME[name])
    # `train` is a room and a verb: the package itself is callable.
    value = home if home.__name__ == f"meshloom.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
