"""What tests of the command line share: a way to run it, a small model, a machine that was measured."""

import pathlib

from flax import nnx

from meshloom import cli
from meshloom.core.measure import Measured
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.tokenizer import train_byte_bpe

MEASURED = Measured(
    memory_bytes=32 * 2**30,
    bandwidth={"copy": 16e9, "scale": 12e9, "add": 10e9, "triad": 10e9},
    flops={"float32": 80e9, "bfloat16": 160e9, "int8": 320e9},
)


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command line run in this process."""
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def write_model(folder: pathlib.Path) -> str:
    """Saves a model that compiles in a second or two; returns the folder."""
    config = DecoderConfig(
        vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, context=64
    )
    LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), config, train_byte_bpe(["def f(x):"], 300)).save(folder)
    return str(folder)
