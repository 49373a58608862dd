"""The OpenAI-compatible HTTP application over one engine.

Guarantees that nothing in a body is ignored (unknown or unsupported fields are 400s that name them), that errors have
OpenAI's shape, and that a client which goes away takes its requests with it. Past `engine.prepare` everything is
tokens.
"""

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from meshloom.core.errors import MeshloomError, RequestError
from meshloom.serve.api import fields
from meshloom.serve.api.connection import DisconnectedError, EventStream, unless_disconnected
from meshloom.serve.api.errors import APIError, from_validation
from meshloom.serve.api.protocol import MAX_CHOICES, ChatBody, CompletionBody, Sampling
from meshloom.serve.api.replies import ChatReply, TextReply
from meshloom.serve.engine import Engine, Prompt
from meshloom.serve.request import FinishReason, Request, Usage

CLIENT_CLOSED = 499  # nginx's status for a client that went away; nobody receives it


class API:
    """Endpoints of one engine that is known to clients as `model_name`."""

    def __init__(self, engine: Engine, model_name: str):
        self._engine = engine
        self._model_name = model_name
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

    async def health(self, http: HTTPRequest) -> Response:
        closed = self._engine.closed
        return JSONResponse({"status": closed or "ok"}, 503 if closed else 200)

    async def metrics(self, http: HTTPRequest) -> Response:
        return Response(generate_latest(self._engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, http: HTTPRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._card())

    async def completions(self, http: HTTPRequest) -> Response | EventStream:
        body = await _parse(http, CompletionBody, fields.COMPLETION)
        self._check_model(body.model)
        if not body.prompts:
            raise APIError(400, "prompt is an empty list: give at least one", param="prompt", code="invalid_value")
        return await self._answer(http, body, body.prompts, body.max_tokens, TextReply(self._model_name))

    async def chat_completions(self, http: HTTPRequest) -> Response | EventStream:
        body = await _parse(http, ChatBody, fields.CHAT)
        self._check_model(body.model)
        tokenizer = self._engine.lm.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise APIError(
                400,
                f"{self._model_name} has no chat template: it completes text; use /v1/completions with a prompt",
                param="messages",
                code="no_chat_template",
            )
        prompt = tokenizer.apply_chat_template([message.for_template() for message in body.messages])
        tokens = tokenizer.encode(prompt, add_special=False)
        return await self._answer(http, body, [tokens], body.limit, ChatReply(self._model_name))

    async def _answer(
        self, http: HTTPRequest, body: Sampling, prompts: list[Prompt], max_tokens: int | None, reply: TextReply
    ) -> Response | EventStream:
        n = body.n or 1
        if n * len(prompts) > MAX_CHOICES:
            raise APIError(400, f"n={n} times {len(prompts)} prompts exceeds {MAX_CHOICES} choices", param="n")
        if self._engine.closed:
            raise APIError(503, self._engine.closed)
        requests = [
            self._engine.prepare(prompt, body.sampling(max_tokens, choice)) for prompt in prompts for choice in range(n)
        ]
        prompt_tokens = sum(len(request.prompt) for request in requests[::n])
        if body.stream:
            return EventStream(self._events(requests, prompt_tokens, reply, include_usage=body.include_usage))
        try:
            return JSONResponse(await unless_disconnected(http.receive, self._whole(requests, prompt_tokens, reply)))
        except DisconnectedError:
            return Response(status_code=CLIENT_CLOSED)

    async def _whole(self, requests: list[Request], prompt_tokens: int, reply: TextReply) -> dict[str, Any]:
        texts, generated = [""] * len(requests), 0
        reasons: list[FinishReason | None] = [None] * len(requests)
        async for index, delta in self._engine.stream(*requests):
            texts[index] += delta.text
            generated += len(delta.token_ids)
            reasons[index] = delta.finish_reason
        choices = [reply.choice(i, text, reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return reply.whole(choices, Usage(prompt_tokens, generated))

    async def _events(
        self, requests: list[Request], prompt_tokens: int, reply: TextReply, *, include_usage: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        generated = 0
        for index in range(len(requests)):
            if (opening := reply.opening(index)) is not None:
                yield reply.chunk([opening])
        async for index, delta in self._engine.stream(*requests):
            generated += len(delta.token_ids)
            if delta.text or delta.finish_reason is not None:
                yield reply.chunk([reply.piece(index, delta.text, delta.finish_reason)])
        if include_usage:
            yield reply.chunk([], Usage(prompt_tokens, generated))

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model_name:
            raise APIError(
                404,
                f"model {name!r} is not served here; this server has {self._model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        length = self._engine.cache.max_model_len
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "meshloom",
            "max_model_len": length,
        }


async def _parse[Body: Sampling](
    http: HTTPRequest, form: type[Body], unsupported: dict[str, tuple[tuple, str]]
) -> Body:
    """The checked body. Raises APIError."""
    try:
        raw = json.loads(await http.body())
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise APIError(400, f"the body must be a JSON object; got {type(raw).__name__}")
    try:
        return form.model_validate(fields.drop_unsupported(raw, unsupported))
    except ValidationError as error:
        raise from_validation(error, [*form.model_fields, *unsupported, *fields.LABELS]) from error


def make_app(engine: Engine, model_name: str, api_key: str | None = None) -> Starlette:
    """The application; with an `api_key`, /v1 asks for it as a bearer token."""

    async def refused(http: HTTPRequest, error: Exception) -> Response:
        match error:
            case APIError():
                return error.response()
            case RequestError():
                return APIError(400, str(error)).response()
            case HTTPException():
                return APIError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()
        return APIError(500, str(error) if isinstance(error, MeshloomError) else "internal error").response()

    kinds = (APIError, RequestError, MeshloomError, HTTPException, Exception)
    app = Starlette(routes=API(engine, model_name).routes(), exception_handlers={kind: refused for kind in kinds})
    if api_key is not None:
        app.add_middleware(_with_key(api_key))
    return app


def _with_key(api_key: str) -> Callable[[ASGIApp], ASGIApp]:
    expected = f"Bearer {api_key}".encode()

    def guard(app: ASGIApp) -> ASGIApp:
        async def guarded(scope, receive, send) -> None:
            given = dict(scope.get("headers", ())).get(b"authorization", b"")
            if (
                scope["type"] == "http"
                and scope["path"].startswith("/v1")
                and not secrets.compare_digest(given, expected)
            ):
                refusal = APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                await refusal.response()(scope, receive, send)
            else:
                await app(scope, receive, send)

        return guarded

    return guard
