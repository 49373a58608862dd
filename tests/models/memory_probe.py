"""Loads a checkpoint while a thread watches this process's memory; prints the peak and what the weights take.

Run by test_weights in a process of its own: `memory_probe.py FOLDER {unrolled,scanned,sharded}`.
"""

import gc
import json
import pathlib
import sys
import threading
import time

import jax
from jax.sharding import NamedSharding, PartitionSpec

import meshloom.models as models


def anonymous_bytes() -> int:
    """RssAnon: memory of this process that is no file's (mapped checkpoint pages are the kernel's to take back)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Watch:
    """Largest anonymous memory seen, sampled every half millisecond."""

    def __enter__(self):
        self.peak, self._stop = 0, False
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while not self._stop:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.0005)

    def __exit__(self, *exception):
        self._stop = True
        self._thread.join()


def spread(module, inputs):
    """Every weight of more than one axis split over eight devices along its last axis."""
    mesh = jax.make_mesh((8,), ("fsdp",))

    def place(leaf):
        last = ("fsdp",) if len(leaf.shape) > 1 else ()
        return NamedSharding(mesh, PartitionSpec(*(None,) * (len(leaf.shape) - 1), *last))

    from flax import nnx

    return jax.tree.map(place, nnx.state(module, nnx.Param))


def main(folder: str, kind: str) -> None:
    options = {"scan_layers": kind == "scanned", "placement": spread if kind == "sharded" else None}
    models.load(folder, **options)  # compiles
    gc.collect()
    before = anonymous_bytes()
    with Watch() as watch:
        lm = models.load(folder, **options)
    gc.collect()
    after = anonymous_bytes()
    del lm
    print(json.dumps({"peak": watch.peak - before, "weights": after - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
