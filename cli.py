"""The command line: `meshloom COMMAND ...`, each command a frozen dataclass whose fields are its flags.

Values come from the defaults, then from `--config FILE.toml`, then from flags. A name that is no flag or key is refused
with the nearest valid one. Asking for help imports neither JAX nor Flax; `commands.py`, which does the work, does.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Annotated, Literal

import tyro

from meshloom.core.config import load_toml, nearest
from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.serve.config import BenchServeConfig, ChatConfig, EngineConfig, ServeConfig
from meshloom.serve.request import SamplingParams
from meshloom.train.config import TrainConfig

INTERRUPTED = 130  # what a shell reports for a program that an interrupt ended
ONE_SEQUENCE = EngineConfig(max_num_seqs=1, buckets=(1, 32, 256), kv_cache_memory=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes.

    Attributes:
        config: TOML file whose keys are the names of these flags, with _ for -; flags override it.
        json: print one JSON object on standard output, and nothing else there.
    """

    config: pathlib.Path | None = None
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Common):
    """What a command about one model takes.

    Attributes:
        model: smollm2 (the embedded default), a preset, a Hugging Face id or folder, a .gguf file, or a run's folder.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "smollm2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed(Common):
    """What a command that loads weights takes.

    Attributes:
        dtype: type of the weights and the computation; auto is float32 on the CPU and the files' own elsewhere.
        devices: "local" is what this machine has; "cpu:8" simulates 8 devices.
        mesh: axis sizes, as in "fsdp=4,tensor=2"; "auto" is what the planner predicts to serve fastest, which may leave
            devices out; None is one device, or auto if --devices is given.
        quantize: hold weights as int8, in a quarter of float32's memory; auto does so on a CPU for files that hold 8
            bits or less themselves.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Literal["auto", "int8", "none"] = "auto"
    devices: str = "local"
    mesh: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(SamplingParams, Placed, Model):
    """Complete a prompt and print the text as it comes.

    Attributes:
        prompt: text to go on from; None reads standard input.
        chat: put the prompt as a user's message through the model's chat template.
        engine: sizes of the engine.
    """

    prompt: str | None = None
    chat: bool = False
    engine: EngineConfig = ONE_SEQUENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ChatConfig, Placed, Model):
    """Talk with a model in the terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(ServeConfig, Placed, Model):
    """Serve a model over HTTP, compatible with OpenAI's API.

    Attributes:
        plan: file of `meshloom plan --requests ... --out`, which says model, devices, mesh, types and sizes of the
            engine; none of them may then be set to something else.
    """

    plan: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(TrainConfig, Common):
    """Train a model; the same command goes on where an interrupted run stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Model):
    """Show how a model's weights would be spread over devices, or find the best way to train or serve it on them.

    Neither weights nor devices are needed. With --batch-tokens, meshes, remat policies and micro-batches are searched
    and priced, and the best are compiled by the compiler of the devices, for its own figures of memory and collectives.
    With --requests it is meshes, batches and number formats for serving; with --cheapest, what to rent for them.

    Attributes:
        devices: "local", "cpu:8", or hardware that is elsewhere: "v5e:4x4", "2xv5e:16x16", "h100:8",
            or two clusters with 25 GB/s between them: "2xh100:16x8@25".
        mesh: axis sizes over data, fsdp, expert, context, tensor; one may be -1, the rest. None: from 4 devices on
            expert=2 for a mixture of experts, else tensor=2 if the key/value heads are even; fsdp takes the rest. With
            --batch-tokens, None searches all meshes.
        explain: name of a parameter, a line as in decoder.py:88, or named scopes as in layers/attention; prints why it
            lies as it does, what that moves between devices, and what the runner-up would.
        picture: PNG, SVG or PDF to write, with one layer's weights as the layout cuts them and what moves between them.
        strict: refuse a layout under which the forward pass moves arrays that no rule intends to move, or to which JAX
            cannot give explicit sharding types.
        batch_tokens: tokens of one training step over all devices; asks for a training plan.
        sequence_length: tokens per row of a training plan; None is 4096, or the model's context if that is shorter.
        remat: what the backward pass of a training plan recomputes; None searches all policies.
        parts: parts that a step's batch is computed in; None searches all.
        candidates: how many plans to show, best first; None is 5.
        compile: how many plans that fit to find by compiling, best first; 0 compiles none, None is 2 of training plans
            and none of serving plans.
        explain_cost: also print where the best training plan's time and memory go.
        kernels: also print which implementation every kernel of the best plan's programs takes, and why not another.
        chart: PNG to write, with the memory and the step time of every training plan shown.
        out: file for the plans, which `meshloom train --plan` and `meshloom serve --plan` follow.
        executable: file for the compiled step of the best training plan that fits, which `meshloom train --executable`
            runs without compiling it.
        train_config: TOML file of that `meshloom train --config`, whose steps, learning rate, schedule, decay, clipping
            and betas are constants of the compiled step; None is train's defaults.
        requests: tokens in:out, as in "1024:256"; asks for a serving plan. For --cheapest several kinds with requests
            per second, as in "1024:256:2.5,128:64:20".
        slo: most seconds to the first token and per further one, as in "ttft=1,tpot=0.05".
        cheapest: find the accelerators, types and counts, that serve the requests within --slo at least cost.
        offers: device strings to choose from, as in "v5e:2x2,h100:1"; None is up to a host of all with a list price.
        prices: US dollars per device and hour over the list prices, as in "v5e=0.8,h100=2.5".
    """

    devices: str = "local"
    mesh: str | None = None
    explain: str | None = None
    picture: pathlib.Path | None = None
    strict: bool = False
    batch_tokens: int | None = None
    sequence_length: int | None = None
    remat: Literal["none", "dots", "full"] | None = None
    parts: int | None = None
    candidates: int | None = None
    compile: int | None = None
    explain_cost: bool = False
    kernels: bool = False
    chart: pathlib.Path | None = None
    out: pathlib.Path | None = None
    executable: pathlib.Path | None = None
    train_config: pathlib.Path | None = None
    requests: str | None = None
    slo: str | None = None
    cheapest: bool = False
    offers: str | None = None
    prices: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Model):
    """Check that a training step on a mesh is the one of a single device: loss, gradients and the optimizer's update.

    Weights are random and computed in float32; a large model is verified small, with what the mesh splits kept. The
    first layer where the two part is named, and the exit status is 1 then.

    Attributes:
        devices: "local" is what this machine has; "cpu:8" simulates 8 devices.
        mesh: axis sizes, as in "fsdp=4,tensor=2"; None tries those that suit the model.
        seed: of the weights and the tokens.
    """

    devices: str = "cpu:8"
    mesh: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Common):
    """Convert a model: to a Hugging Face folder that transformers opens, or to Meshloom's own checkpoint.

    Attributes:
        source: what to convert: anything that `meshloom serve` takes, a run's folder included.
        out: folder to write; an existing model there is replaced once all is written.
        to: form to write; Meshloom's is an orbax checkpoint that any mesh restores.
        dtype: type of the written weights; auto keeps the source's.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = tyro.MISSING
    out: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    to: Literal["huggingface", "meshloom"] = "huggingface"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchServe(BenchServeConfig, Placed):
    """Measure the engine: tokens/s, time to the first token (s) and between tokens (s)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchKernels(Common):
    """Compare the kernels with those people use today: by the compiler's schedules for a TPU, which need none, or by
    time on this CPU.

    Attributes:
        target: v5e, v5p, v6e, tpu7x or cpu.
    """

    target: str = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Common):
    """Search the block sizes of kernels for a TPU, and keep those that are faster for all programs to come.

    By the compiler's schedules, which need no TPU; with --target local by time on this machine's, which no TPU has run
    yet.

    Attributes:
        target: v5e, v5p, v6e, tpu7x or local.
        op: attention, quantized_matmul or grouped_matmul; None is all of them.
        out: JSON file that entries are added to; None is the user's own, which programs read:
            ~/.cache/meshloom/tuned/CHIP.json.
    """

    target: str = "local"
    op: str | None = None
    out: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Common):
    """Print versions, devices and their memory, and what the first device does: STREAM bandwidth, matrix products.

    Attributes:
        measure: take about 3 seconds to measure; --no-measure only looks.
        chips: print the hardware table instead, with the source of every figure.
    """

    measure: bool = True
    chips: bool = False


# What is typed -> its flags. The function of `commands.py` that runs it has the same name.
COMMANDS: dict[str, type[Common]] = {
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "train": Train,
    "plan": Plan,
    "verify": Verify,
    "convert": Convert,
    "bench serve": BenchServe,
    "bench kernels": BenchKernels,
    "tune": Tune,
    "info": Info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit status.

    0 is success, 1 a check that failed, 2 a mistake of the user's with one line on standard error, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments
    try:
        if text := _answer(arguments):
            print(text)
            return 0
        words = 2 if arguments[0] == "bench" else 1
        name = " ".join(arguments[:words])
        if name not in COMMANDS:
            raise ConfigError(f"there is no command {name!r}; {nearest(name, COMMANDS)}")
        command = parse(COMMANDS[name], arguments[words:], prog=f"meshloom {name}")
        as_json = command.json
        from meshloom import commands
        from meshloom.core.ahead import compilers_only

        compilers_only()
        result = getattr(commands, name.replace(" ", "_"))(command)
        if as_json and result is not None:
            print(json.dumps(result))
        sys.stdout.flush()
        if result is not None and result.get("ok") is False:  # a check that ran, and failed
            return 1
        # Training that is told to stop keeps what it has, and returns.
        return INTERRUPTED if result is not None and result.get("interrupted") else 0
    except MeshloomError as error:
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": str(error)}))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; leave the interpreter nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _answer(arguments: list[str]) -> str | None:
    """What is answered without a command: the overview and the version."""
    if arguments == ["--version"]:
        from meshloom import __version__

        return f"meshloom {__version__}"
    asked = arguments[1:] if arguments[:1] == ["bench"] else arguments
    return _overview() if not asked or asked[0] in ("-h", "--help") else None


def parse(cls: type[Common], arguments: list[str], *, prog: str) -> Common:
    """The command that `arguments` describe.

    Raises:
        ConfigError: a flag, a key of the `--config` file or a value is not valid.
        SystemExit: help was asked for (0), or a flag's value cannot be read (2).
    """
    path = _value_of("--config", arguments)
    default = cls() if path is None else load_toml(cls, path, base=cls())
    if default.config is not None:
        raise ConfigError(f"{path}: config: a file given with --config cannot name another")
    command, unknown = tyro.cli(cls, prog=prog, args=arguments, default=default, return_unknown_args=True)
    if unknown:
        flag = next((each for each in unknown if each.startswith("-")), None)
        if flag is None:
            raise ConfigError(f"{prog} does not take {unknown[0]!r}; `{prog} --help` lists what it takes")
        raise ConfigError(f"{prog} has no option {flag}; {nearest(flag.split('=')[0].replace('_', '-'), flags(cls))}")
    return command


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def flags(cls: type, prefix: str = "--") -> Iterator[str]:
    """Every flag of a command, nested ones as --engine.page-size."""
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from flags(field.type, f"{name}.")  # type: ignore[arg-type]
        else:
            yield name


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(cls.__doc__ or '').splitlines()[0]}" for name, cls in COMMANDS.items()]
    return "\n".join(
        [
            "usage: meshloom COMMAND [OPTIONS]",
            "",
            "One model, trained and served; its sharding derived from the traced program.",
            "",
            *lines,
            "",
            "`meshloom COMMAND --help` lists its options with units and defaults; `meshloom --version` is the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
