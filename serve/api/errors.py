"""Refusals in the shape that OpenAI clients parse: `{"error": {"message", "type", "param", "code"}}`."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError
from starlette.responses import JSONResponse


class APIError(Exception):
    """A request that is answered with an error. `param` names the field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = {401: "authentication_error", 404: "not_found_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status)


def unknown_field(name: str, known: Iterable[str]) -> APIError:
    """400 that names the field and the nearest known one."""
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return APIError(400, f"unknown field {name!r}{hint}", param=name, code="unknown_parameter")


def from_validation(error: ValidationError, known: Iterable[str]) -> APIError:
    """400 for the first thing pydantic found, with the value seen."""
    first = error.errors(include_url=False)[0]
    # A union lists each of its branches in the location: only names and indices mean something to the caller.
    path = [part for part in first["loc"] if not (isinstance(part, str) and not part.isidentifier())]
    name = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return unknown_field(name, known)
    if first["type"] == "missing":
        return APIError(400, f"missing field {name!r}", param=name, code="missing_required_parameter")
    seen = repr(first["input"])
    seen = seen if len(seen) <= 100 else seen[:97] + "..."
    return APIError(400, f"{name}: {first['msg']}; got {seen}", param=name, code="invalid_value")
