"""`make quickstart`: serve a real model, train one over eight simulated devices, serve that one. Under four minutes.

Every stage runs the command that it prints, in a process of its own, as you would type it; this file only starts them
and asks the questions. Servers listen on 127.0.0.1, on a free port, and stop with their stage.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from openai import OpenAI
from rich.console import Console

from meshloom.core.errors import MeshloomError

RUN = pathlib.Path("runs/quickstart")
QUESTION = "What is the capital of France?"
# Three programs compile in 17 s on two cores, the default five in 30: one stream decodes in the first, prompts use
# the others.
SMALL_ENGINE = ("--engine.buckets", "1", "32", "128", "--engine.max-num-seqs", "4")
TRAINING = (
    *("train", "--data", "stdlib", "--devices", "cpu:8", "--mesh", "fsdp=4,tensor=2", "--steps", "250"),
    *("--sequence-length", "128", "--batch-size", "16", "--vocab-size", "2048", "--learning-rate", "3e-3"),
    *("--architecture.d-model", "128", "--architecture.d-ff", "384", "--architecture.n-layers", "3"),
    *("--architecture.n-heads", "4", "--architecture.n-kv-heads", "2", "--checkpoint-every", "100"),
    *("--run-dir", str(RUN)),
)

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the three stages; 0 when all of them worked."""
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__.splitlines()[0])
    parser.parse_args()
    start = time.monotonic()
    try:
        _heading("1", "A real model behind an OpenAI-compatible server", "SmolLM2-135M-Instruct; fetched once, 93 MB.")
        with serving("smollm2") as client:
            ask(client)
        _heading(
            "2", "A model of your own, over 8 simulated devices", "Nobody wrote the sharding: the plan is derived."
        )
        run(TRAINING)
        console.print(f"The loss curve is in [bold]{RUN / 'loss.png'}[/bold]; the same command would go on from there.")
        _heading("3", "Your model behind the same server", "The folder of the run is served as it is.")
        with serving(str(RUN)) as client:
            complete(client, "def ")
    except (MeshloomError, subprocess.CalledProcessError) as error:
        console.print(f"\n[bold red]quickstart stopped:[/bold red] {error}")
        return 1
    console.print(
        f"\n[bold green]Done[/bold green] in {time.monotonic() - start:.0f} s. Next: README.md, or `meshloom chat`."
    )
    return 0


def _heading(number: str, title: str, remark: str) -> None:
    console.rule(f"[bold]{number}. {title}")
    console.print(remark)


def _say(arguments: tuple[str, ...]) -> list[str]:
    """Prints a command as you would type it; returns how this process runs it."""
    console.print(f"[cyan]$ meshloom {shlex.join(arguments)}[/cyan]")
    return [sys.executable, "-m", "meshloom.cli", *arguments]


def run(arguments: tuple[str, ...]) -> None:
    """Run one command to its end, its output going where ours goes."""
    subprocess.run(_say(arguments), check=True)


@contextlib.contextmanager
def serving(model: str) -> Iterator[OpenAI]:
    """A client of a server of `model`, which stops when the block ends.

    Raises:
        MeshloomError: the server ended before it was ready.
    """
    command = _say(("serve", model, "--port", "0", "--json", *SMALL_ENGINE))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("{") or "url" not in (ready := json.loads(line)):
                raise MeshloomError(f"`{shlex.join(command)}` did not get ready: {line.strip() or 'see above'}")
            console.print(f"ready after {ready['start_up_seconds']:.0f} s of compiling (next time from the cache)")
            yield OpenAI(base_url=f"{ready['url']}/v1", api_key="none")
        finally:
            process.terminate()


def ask(client: OpenAI) -> None:
    """Ask the chat endpoint and print the answer as it streams."""
    model = client.models.list().data[0].id
    console.print(
        f"[cyan]>>> client.chat.completions.create(model={model!r}, stream=True, "
        f'messages=[{{"role": "user", "content": {QUESTION!r}}}])[/cyan]'
    )
    messages = [{"role": "user", "content": QUESTION}]
    for chunk in client.chat.completions.create(
        model=model, messages=messages, stream=True, max_tokens=64, temperature=0
    ):
        console.print(chunk.choices[0].delta.content or "", end="", style="bold", markup=False)
    console.print()


def complete(client: OpenAI, prompt: str) -> None:
    """Complete a prompt and print it with its continuation."""
    model = client.models.list().data[0].id
    console.print(f"[cyan]>>> client.completions.create(model={model!r}, prompt={prompt!r}, max_tokens=48)[/cyan]")
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=48, temperature=0.7, seed=1)
    console.print(prompt + answer.choices[0].text, style="bold", markup=False)


if __name__ == "__main__":
    sys.exit(main())
