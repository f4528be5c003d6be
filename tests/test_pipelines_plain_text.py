"""Splitting plain text into documents: bounded, lossless, and linear in time whatever the text looks like."""

import pytest

from data_pipelines.plain_text import split_documents

TEXTS = {
    "plain": "one\ntwo\n\nthree\n \n\nfour",
    "blank_start": "\n\n\nfoo\n\nbar\n\n",
    "one_long_line": "word " * 50,
    "no_space": "x" * 97,
    "only_blank": "\n \n\n",
    "windows": "a\r\n\r\nb\r\n",
    "empty": "",
}


@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_documents_are_bounded_and_nothing_is_lost(text, limit):
    documents = list(split_documents(text, limit))
    assert "".join(documents) == text
    assert all(0 < len(document) <= limit for document in documents)


def test_a_million_characters_are_split_in_linear_time():
    for text in ("x" * 1_000_000, "ab c\n" * 200_000, "\n" * 1_000_000, "\n" + " " * 1_000_000):
        assert sum(map(len, split_documents(text, 600))) == len(text)
