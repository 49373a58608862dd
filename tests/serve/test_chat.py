"""The terminal chat with input from a pipe, and its conversation."""

import io
import json

import pytest
from rich.console import Console

from meshloom.core.errors import ModelError
from meshloom.serve import chat as chat_module
from meshloom.serve.chat import Conversation, chat
from meshloom.serve.config import ChatConfig, EngineConfig

SHORT = ChatConfig(max_tokens=4, temperature=0, kv_cache_memory=0.001)


@pytest.fixture
def small(monkeypatch):
    """One small program instead of three."""
    monkeypatch.setattr(ChatConfig, "engine", EngineConfig(max_num_seqs=1, buckets=(8,), page_size=4))


def run(lm, lines, monkeypatch, config=SHORT):
    output = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat(lm, config, console=Console(file=output, force_terminal=False, highlight=False, width=200))
    return output.getvalue()


def test_a_piped_conversation_is_answered_line_by_line(chat_lm, engine, small, monkeypatch, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["/system be brief", "hello", f"/save {saved}", "/reset", "/nonsense", "/help", "/exit", "never read"]
    output = run(chat_lm, lines, monkeypatch)
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] in output
    assert "4 tokens" in output
    assert "tokens/s" in output
    assert "unknown command /nonsense; there are /help" in output
    assert "saved 3 messages" in output


def test_an_interrupt_ends_the_answer_and_not_the_chat(chat_lm, small, monkeypatch):
    pieces = chat_module._show
    shown = []

    def interrupted(answer, console):
        shown.append(next(iter(answer)))
        if len(shown) == 1:
            raise KeyboardInterrupt
        pieces(answer, console)

    monkeypatch.setattr(chat_module, "_show", interrupted)
    output = run(chat_lm, ["hello", "again"], monkeypatch)
    assert output.count("(interrupted)") == 1
    assert len(shown) == 2


def test_an_answer_that_is_cut_short_stays_in_the_conversation(engine):
    conversation = Conversation(engine, SHORT)
    answer = conversation.answer("hello")
    text, _ = next(answer)
    answer.close()
    assert conversation.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]


def test_a_conversation_that_outgrows_the_context_is_told_so(chat_lm, small, monkeypatch):
    output = run(chat_lm, ["word " * 100, "/reset", "hello"], monkeypatch)
    assert "maximum context length is 64" in output
    assert "tokens/s" in output


def test_a_model_without_chat_template_is_refused(lm, small, monkeypatch):
    with pytest.raises(ModelError, match="no chat template"):
        run(lm, ["hello"], monkeypatch)
