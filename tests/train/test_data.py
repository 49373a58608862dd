"""Data: the same rows in the same order always, every token predicted once an epoch, and bad input told by line."""

import collections

import numpy as np
import pytest
from rich.console import Console

from meshloom.core.errors import ConfigError
from meshloom.models.tokenizer import train_byte_bpe
from meshloom.train.corpus import Corpus, tokenize
from meshloom.train.data import Batches, PackedRows, Share
from meshloom.train.documents import find_documents
from tests.train.runs import write_texts


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents of the given lengths whose tokens are 1, 2, 3, ..."""
    ends = np.cumsum(lengths)
    return Corpus(np.arange(1, ends[-1] + 1, dtype=np.uint16), ends, "")


def test_rows_number_documents_and_restart_positions():
    rows = PackedRows(corpus_of([3, 4, 5]), 6)
    first, last = rows[0], rows[len(rows) - 1]
    assert first["tokens"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert last["tokens"].tolist() == [7, 8, 9, 10, 11, 12, 0]
    assert last["segment_ids"].tolist() == [1, 2, 2, 2, 2, 2, 0]
    assert last["positions"].tolist() == [0, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("length", [1, 4, 7, 64])
@pytest.mark.parametrize("lengths", [[2, 3], [50], [1, 1, 1, 7, 30, 12]])
def test_every_token_but_firsts_is_predicted_exactly_once(lengths, length):
    corpus = corpus_of(lengths)
    predicted = collections.Counter()
    rows = PackedRows(corpus, length)
    for index in range(len(rows)):
        row = rows[index]
        counted = (row["segment_ids"][1:] == row["segment_ids"][:-1]) & (row["segment_ids"][1:] > 0)
        predicted.update(row["tokens"][1:][counted].tolist())
    firsts = {1, *(corpus.ends[:-1] + 1).tolist()}
    assert predicted == collections.Counter(set(corpus.tokens.tolist()) - firsts)


def take(batches: Batches, count: int) -> list[list[list[int]]]:
    return [next(batches).tokens.tolist() for _ in range(count)]


def test_order_depends_on_the_seed_alone_and_changes_every_epoch():
    corpus = corpus_of([10] * 20)
    options = {"length": 10, "batch_size": 4}
    per_epoch = 5
    once, again, other = (take(Batches(corpus, **options, seed=s), 2 * per_epoch) for s in (1, 1, 2))
    assert once == again
    assert once != other
    first, second = (sorted(row[0] for batch in part for row in batch) for part in (once[:per_epoch], once[per_epoch:]))
    assert first == second == list(range(1, 201, 10))  # all rows in each epoch
    assert once[:per_epoch] != once[per_epoch:]  # in another order


def test_iterator_goes_on_from_its_state():
    corpus = corpus_of([10] * 20)
    options = {"length": 10, "batch_size": 4, "seed": 3}
    batches = Batches(corpus, **options)
    take(batches, 7)
    state = batches.state()
    expected = take(batches, 6)
    resumed = Batches(corpus, **options)
    resumed.restore(state)
    assert take(resumed, 6) == expected


def test_slices_that_are_no_neighbours_are_the_rows_of_the_whole_batch():
    corpus, sizes = corpus_of([40, 90, 70, 200]), {"length": 8, "batch_size": 16, "seed": 3, "parts": 2}
    of_part = np.asarray(take(Batches(corpus, **sizes), 3)).reshape(3, 2, 4, 2, -1)
    mine = take(Batches(corpus, **sizes, share=Share((1, 3), 4)), 3)
    np.testing.assert_array_equal(np.asarray(mine).reshape(3, 2, 2, 2, -1), of_part[:, :, [1, 3]])


@pytest.mark.parametrize(
    ("slices", "count", "share"),
    [
        ((0, 1, 2, 3), 4, Share((0,), 1)),
        ((2, 3), 8, Share((1,), 4)),
        ((1, 2), 8, Share((1, 2), 8)),  # no slice of two begins at one
        ((0, 1, 4, 5), 8, Share((0, 2), 4)),
        ((0, 4, 16, 20), 64, Share((0, 4, 16, 20), 64)),
    ],
)
def test_neighbouring_slices_are_one(slices, count, share):
    assert Share.of(slices, count) == share


def test_too_small_a_corpus_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"21 tokens make 2 rows of sequence_length=10, too few .* batch_size=4"):
        Batches(corpus_of([21]), length=10, batch_size=4, seed=0)


def test_documents_end_with_the_end_of_text_and_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    documents = find_documents(str(write_texts(tmp_path / "texts", 30)))
    tokenizer = train_byte_bpe(documents.read(), 300)
    corpus = tokenize(documents, tokenizer, console=Console(stderr=True))
    starts = [0, *corpus.ends[:-1]]
    decoded = [tokenizer.decode(corpus.tokens[a:b].tolist()) for a, b in zip(starts, corpus.ends, strict=True)]
    assert decoded == list(documents.read())
    assert {int(corpus.tokens[end - 1]) for end in corpus.ends} == set(tokenizer.eos_ids)
    assert len([*(tmp_path / "cache" / "meshloom" / "corpora").iterdir()]) == 1

    def must_not_read():
        raise AssertionError("read again")

    cached = tokenize(type(documents)("", documents.fingerprint, must_not_read), tokenizer, console=Console())
    np.testing.assert_array_equal(cached.tokens, corpus.tokens)


def test_text_that_spells_a_special_token_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("before <|endoftext|> after")
    documents = find_documents(str(tmp_path))
    tokenizer = train_byte_bpe(documents.read(), 257)
    corpus = tokenize(documents, tokenizer, console=Console(stderr=True))
    assert sum(int(token) in tokenizer.eos_ids for token in corpus.tokens) == 1


def test_content_decides_what_is_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = find_documents(str(tmp_path)).fingerprint
    assert find_documents(str(tmp_path)).fingerprint == before
    (tmp_path / "a.txt").write_text("two")
    assert find_documents(str(tmp_path)).fingerprint != before


def test_the_standard_library_is_found_without_its_tests():
    documents = find_documents("stdlib")
    texts = list(documents.read())
    assert len(texts) > 200
    assert any("class JSONDecoder" in text for text in texts)
    assert not any("class RegressionTests(unittest.TestCase)" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', r"a\.jsonl, line 3: expected .* \"text\"; got keys body"),
        ("a.jsonl", b'{"text": "fine"}\n{"text"\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1"),
        ("a.jsonl", b"[1]\n", r"line 1: expected .* got list"),
        ("a.txt", b"fine\nfine\n\xff\n", r"a\.txt, line 3: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_bad_files_are_told_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(find_documents(str(tmp_path)).read())


def test_places_without_documents_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \.txt, \.md, \.py, \.jsonl file"):
        find_documents(str(tmp_path))
    with pytest.raises(ConfigError, match="there is no file or folder"):
        find_documents(str(tmp_path / "none"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.csv is no text"):
        find_documents(str(tmp_path / "a.csv"))


def test_a_dataset_without_the_library_names_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        find_documents("roneneldan/TinyStories")
