"""Runs the HTTP application: in the foreground for `meshloom serve`, or in a thread for tests, notebooks and the
quickstart.

Guarantees that the port is taken before anything is announced, that an interrupt lets running answers finish for
`drain_seconds` before they are aborted, and that leaving the thread's `with` block leaves nothing behind.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from rich.console import Console

from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.models.language_model import LanguageModel
from meshloom.serve.api.app import make_app
from meshloom.serve.config import ServeConfig
from meshloom.serve.engine import Engine


class _Server(uvicorn.Server):
    """Announces that it listens, with the port it got."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _listen(config: ServeConfig) -> tuple[socket.socket, str]:
    """A bound socket and its URL."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port, or 0"
        ) from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    return listener, f"http://{host}:{listener.getsockname()[1]}"


def _server(engine: Engine, config: ServeConfig, on_ready: Callable[[], None]) -> _Server:
    app = make_app(engine, config.model_name or "meshloom", config.api_key)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=config.drain_seconds
    )
    return _Server(settings, on_ready)


def serve(
    lm: LanguageModel, config: ServeConfig | None = None, on_ready: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Serve until interrupted; then finish what is running, for at most `drain_seconds`, and return.

    Args:
        on_ready: called once requests are answered, with "url", "model" and "start_up_seconds".
    Raises:
        ConfigError: the port is taken.
    """
    config = config or ServeConfig()
    name = config.model_name or "meshloom"
    console = Console(stderr=True, highlight=False)
    listener, url = _listen(config)
    with listener, Engine(lm, config.engine, name=name) as engine:
        size = engine.cache
        console.print(f"compiled {len(config.engine.buckets)} step programs in {engine.start_up_seconds:.1f} s")
        console.print(
            f"cache: {size.num_pages} pages of {config.engine.page_size} tokens, "
            f"{size.num_pages * size.bytes_per_page / 2**20:.0f} MiB; longest request {size.max_model_len} tokens"
        )

        def announce() -> None:
            console.print(f"[bold]{name}[/bold] is ready at [bold]{url}/v1[/bold] (Ctrl-C stops it)")
            if on_ready is not None:
                on_ready({"url": url, "model": name, "start_up_seconds": engine.start_up_seconds})

        with contextlib.suppress(KeyboardInterrupt):  # uvicorn drains, then raises the interrupt again
            _server(engine, config, announce).run([listener])


class ServerThread:
    """`with ServerThread(engine) as server:` serves at `server.url` inside the block.

    The engine stays the caller's: it is not closed. Without a `config`: a free port, five seconds to drain.
    """

    def __init__(self, engine: Engine, config: ServeConfig | None = None):
        config = config or ServeConfig(port=0, drain_seconds=5)
        self._listener, self.url = _listen(config)
        self._ready = threading.Event()
        self._server = _server(engine, config, self._ready.set)
        self._thread = threading.Thread(target=self._run, name="meshloom-server", daemon=True)

    def _run(self) -> None:
        try:
            self._server.run([self._listener])
        finally:
            self._ready.set()

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        self._ready.wait()
        if not self._server.started:
            raise MeshloomError(f"the server at {self.url} did not start; its log says why")
        return self

    def __exit__(self, *error) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
