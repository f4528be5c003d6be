"""The tokenizer: special tokens cannot come from text, training is deterministic, any tokenizer.json is read."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, pre_tokenizers

from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [
    f"a {color} {shape} left of {i}" for i in range(20) for color in ("red", "blue") for shape in ("circle", "square")
]
TRICKY = [
    "",
    " ",
    "  two  spaces ",
    "tabs\tand\nlines\r\n",
    "größer ü 日本語 🙂",
    "<boi> a <eoi>",
    "<pad><eos>",
    "\x00\x01",
    "é",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("text", TRICKY)
def test_text_comes_back_and_holds_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_ids_are_left_out_of_text(tokenizer):
    ids = tokenizer.encode("a red")
    marked = [tokenizer.boi_id, *ids[:1], tokenizer.pad_id, *ids[1:], tokenizer.eoi_id, tokenizer.eos_id]
    assert tokenizer.decode(marked) == "a red"
    assert len({tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id}) == 4


def test_training_learns_words_and_bounds_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(" circle")) == 1
    assert len(tokenizer.encode("zqzqzq")) == 6


def test_training_is_the_same_in_another_process(tokenizer, tmp_path):
    code = (
        "import json, sys; from unihetero_jax.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.loads(sys.argv[1]), 300, sys.argv[2]).hash)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXTS), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer.hash


def test_hash_follows_the_content(tokenizer, tmp_path):
    assert train_tokenizer(TEXTS[::2], 280, tmp_path).hash != tokenizer.hash


def foreign_folder(folder, **declared):
    backend = BackendTokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2, "</s>": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **declared})
    )
    return folder


def test_missing_special_tokens_are_added(tmp_path):
    tokenizer = load_tokenizer(foreign_folder(tmp_path / "foreign"))
    assert tokenizer.encode("hello world") == [1, 2]
    assert sorted([tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id, tokenizer.eos_id]) == [4, 5, 6, 7]
    assert tokenizer.vocab_size == 8


def test_declared_end_token_is_kept_and_never_used_as_padding(tmp_path):
    tokenizer = load_tokenizer(foreign_folder(tmp_path / "foreign", eos_token="</s>", pad_token="</s>"))
    assert tokenizer.eos_id == 3
    assert tokenizer.pad_id != 3


def test_folder_with_only_the_json(tmp_path):
    folder = foreign_folder(tmp_path / "foreign")
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).encode("world") == [2]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ no json")
    with pytest.raises(ValueError, match="is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size 259 is below 260"):
        train_tokenizer(TEXTS, 259, tmp_path / "small")


def test_a_million_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("ab c" * 250_000)) == "ab c" * 250_000
