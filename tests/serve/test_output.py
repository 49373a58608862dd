import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.serve.output import OutputText


def run(tokenizer, text, stop):
    output = OutputText(tokenizer, tuple(stop))
    emitted = ""
    for token in tokenizer.encode(text):
        emitted += output.push(token)
        if output.stopped:
            return emitted, output
    return emitted + output.finish(), output


@pytest.mark.parametrize("stop", ["over", "wn fox", "f", "dog. "])
def test_text_ends_before_a_stop_string_that_straddles_tokens(tokenizer, stop):
    text = "the quick brown fox jumps over the lazy dog. the end"
    emitted, output = run(tokenizer, text, [stop])
    assert emitted == output.text == text[: text.index(stop)]
    assert output.stopped


def test_the_first_of_several_stop_strings_to_be_complete_wins(tokenizer):
    assert run(tokenizer, "one two three four", ["three", "two", "zzz"])[0] == "one "
    assert run(tokenizer, "one two three four", ["o three fo", "ee"])[0] == "one two thr"


def test_a_false_start_of_a_stop_string_is_given_back(tokenizer):
    assert run(tokenizer, "aaab aab", ["aaaa", "aabc"])[0] == "aaab aab"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_emitted_pieces_are_the_text_up_to_the_first_stop(tokenizer, text, stop):
    emitted, output = run(tokenizer, text, stop)
    _, start = min(((text.index(s) + len(s), text.index(s)) for s in stop if s in text), default=(0, len(text)))
    assert emitted == output.text == text[:start]
