"""Chat messages to prompt text, by the model's own Jinja template.

Templates come with the model, from strangers: they run in Jinja's immutable sandbox. The environment has what Hugging
Face templates expect (`raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, loop controls, the
`generation` tag) and nothing more. It knows no tokenizer and no model.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from meshloom.core.errors import ModelError, RequestError


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; rendered as its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message: str):
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ModelError(
            f"the model's chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """The prompt text of a conversation.

    Args:
        template: Jinja source.
        messages: `{"role": ..., "content": ...}` in order.
        add_generation_prompt: end with the words that begin the assistant's turn.
        variables: further template variables (`bos_token`, `tools`, ...).

    Raises:
        RequestError: the template refuses these messages (for example roles that do not alternate).
        ModelError: the template itself is broken.
    """
    compiled = _compile(template)
    try:
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.exceptions.TemplateError as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RequestError(
            f"the model's chat template failed on these messages: {type(error).__name__}: {error}"
        ) from error
