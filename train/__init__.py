"""The training loop. The package is callable: `meshloom.train(config)` is `meshloom.train.loop.train(config)`."""

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshloom.train.config import TrainConfig
    from meshloom.train.loop import Run


class _CallablePackage(types.ModuleType):
    """Importing any of its modules binds `meshloom.train` to this package, so the package must answer the call."""

    def __call__(self, config: "TrainConfig") -> "Run":
        from meshloom.train.loop import train

        return train(config)


sys.modules[__name__].__class__ = _CallablePackage
