"""A chat in the terminal, over an engine in this process.

Guarantees that Ctrl-C ends an answer and not the chat, and that it works the same with input from a pipe: one line,
one turn.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from meshloom.core.errors import MeshloomError, ModelError
from meshloom.models.language_model import LanguageModel
from meshloom.serve.config import ChatConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams

HELP = """\
/help           this list
/reset          forget the conversation
/system TEXT    set the system message (and forget the conversation); without TEXT, show it
/save FILE      write the conversation as JSON
/exit           leave (so does Ctrl-D); Ctrl-C ends an answer"""


class Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(self, engine: Engine, config: ChatConfig):
        if engine.lm.tokenizer is None or engine.lm.tokenizer.chat_template is None:
            raise ModelError("this model has no chat template: it completes text; use `meshloom generate`")
        self._engine, self._config = engine, config
        self.system = config.system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> Generator[tuple[str, int], None, None]:
        """Pieces of the answer, each with its token count; what was said is kept even if the caller stops early."""
        tokenizer, config = self._engine.lm.tokenizer, self._config
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special=False)
        room = self._engine.cache.max_model_len - len(prompt)
        params = SamplingParams(
            max_tokens=max(min(config.max_tokens, room), 1),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        )
        request = self._engine.prepare(prompt, params)
        said = ""
        try:
            with contextlib.closing(self._engine.iterate(request)) as deltas:
                for _, delta in deltas:
                    said += delta.text
                    yield delta.text, len(delta.token_ids)
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said}]


def chat(
    lm: LanguageModel, config: ChatConfig | None = None, *, console: Console | None = None
) -> list[dict[str, str]]:
    """Read turns from standard input until it ends; the conversation as it then stands, role and content."""
    config, console = config or ChatConfig(), console or Console(highlight=False)
    with Engine(lm, config.engine) as engine:
        conversation = Conversation(engine, config)
        console.print("[dim]Type a message, /help for commands, Ctrl-D to leave.[/dim]")
        for line in _lines(console):
            if line.startswith("/"):
                if _command(line, conversation, console) is False:
                    break
            elif line:
                _turn(line, conversation, console)
        return conversation.messages


def _lines(console: Console) -> Iterator[str]:
    """Lines of input until it ends; Ctrl-C at the prompt starts the line again."""
    if console.is_terminal:
        with contextlib.suppress(ImportError):  # not everywhere; it gives input() history and editing
            import readline  # noqa: F401
    # input() knows the prompt when it redraws a line, but writes it to standard output alone.
    read = console.input if console.stderr else input
    while True:
        try:
            yield read("\n> " if console.is_terminal else "").strip()
        except KeyboardInterrupt:
            console.print("\n[dim]/exit or Ctrl-D leaves[/dim]")
        except EOFError:
            return


def _turn(line: str, conversation: Conversation, console: Console) -> None:
    started = time.perf_counter()
    first, tokens = 0.0, 0

    def pieces() -> Iterator[str]:
        nonlocal first, tokens
        with contextlib.closing(conversation.answer(line)) as answer:
            for text, count in answer:
                first = first or time.perf_counter()
                tokens += count
                yield text

    try:
        _show(pieces(), console)
    except KeyboardInterrupt:
        console.print("[dim](interrupted)[/dim]")
    except MeshloomError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return
    if tokens > 1:
        rate = (tokens - 1) / (time.perf_counter() - first)
        console.print(f"[dim]{tokens} tokens, {rate:.1f} tokens/s, first after {first - started:.2f} s[/dim]")


def _show(pieces: Iterable[str], console: Console) -> None:
    """Markdown that grows in place on a terminal, plain text elsewhere."""
    if not console.is_terminal:
        for piece in pieces:
            console.file.write(piece)
            console.file.flush()
        console.print()
        return
    text = ""
    with Live(console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        for piece in pieces:
            text += piece
            live.update(Markdown(text))


def _command(line: str, conversation: Conversation, console: Console) -> bool | None:
    """Run a /command; False leaves the chat."""
    name, _, argument = line.partition(" ")
    commands: dict[str, Callable[[], bool | None]] = {
        "/help": lambda: console.print(HELP, markup=False),
        "/reset": conversation.reset,
        "/system": lambda: _system(argument.strip(), conversation, console),
        "/save": lambda: _save(argument.strip(), conversation, console),
        "/exit": lambda: False,
    }
    if name not in commands:
        console.print(f"unknown command {name}; there are {' '.join(commands)}", markup=False)
        return None
    return commands[name]()


def _system(text: str, conversation: Conversation, console: Console) -> None:
    if text:
        conversation.system = text
        conversation.reset()
    else:
        console.print(conversation.system or "(none)", markup=False)


def _save(name: str, conversation: Conversation, console: Console) -> None:
    if not name:
        console.print("/save needs a file name", markup=False)
        return
    try:
        pathlib.Path(name).write_text(
            json.dumps(conversation.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        console.print(f"cannot write {name}: {error.strerror}", markup=False)
    else:
        console.print(f"saved {len(conversation.messages)} messages to {name}", markup=False)
