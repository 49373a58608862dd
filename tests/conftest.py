"""Every test runs on eight simulated CPU devices, with all jaxtyping annotations executed."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

from jaxtyping import install_import_hook

install_import_hook("meshloom", "beartype.beartype")
