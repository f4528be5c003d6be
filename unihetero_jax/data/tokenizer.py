"""The tokenizer: any `tokenizer.json`, read through transformers, or a byte-level BPE trained on the prepared text.

The program needs four special tokens: `<pad>`, `<boi>` and `<eoi>` around an image, and one that ends a sample. They
enter a row only where the packer puts them: the same characters in a *text* are encoded as ordinary characters, so no
caption can open an image or end a sample.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from unihetero_jax.storage import download, file_exists, is_local, make_folder, read_bytes, to_path, write_bytes

PAD, BOI, EOI, EOS = SPECIAL_TOKENS = ("<pad>", "<boi>", "<eoi>", "<eos>")
MIN_TRAINED_VOCAB = 256 + len(SPECIAL_TOKENS)
"""All bytes and the special tokens: below this some text could not be encoded."""
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""What transformers reads of a tokenizer's folder."""


class Tokenizer:
    """Text to ids and back. Safe to share between threads.

    Attributes:
        pad_id, boi_id, eoi_id, eos_id: ids of the special tokens.
        vocab_size: one more than the largest id.
        num_known: one more than the largest id that its files know; special tokens that they lack come after.
        hash: 12 hex digits over the content of `tokenizer.json`; names the index of lengths.
        chat: ids before and after what a user says, up to where the model answers, by the chat template of its folder;
            None where there is none.
    """

    def __init__(
        self,
        backend: BackendTokenizer,
        pad_token: str,
        eos_token: str,
        content_hash: str,
        chat: tuple[list[int], list[int]] | None = None,
    ):
        self.chat = chat
        self.num_known = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        backend.add_special_tokens([pad_token, BOI, EOI, eos_token])  # those already there keep their ids
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.pad_id, self.boi_id, self.eoi_id, self.eos_id = (vocabulary[t] for t in (pad_token, BOI, EOI, eos_token))
        self.vocab_size = max(vocabulary.values()) + 1
        self.hash = content_hash

    def extends(self, other: "Tokenizer") -> bool:
        """Whether all that another tokenizer's files know has the same ids here."""
        own = self._backend.get_vocab(with_added_tokens=True)
        theirs = other._backend.get_vocab(with_added_tokens=True)
        return all(own.get(token) == number for token, number in theirs.items() if number < other.num_known)

    def encode(self, text: str) -> list[int]:
        """Ids of a text: no special token is added, and none can come from the text.

        Raises:
            UnicodeEncodeError: the text holds half a surrogate pair, which no encoding can store.
        """
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            text.encode("utf-8")  # says which character and where
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out. Bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer folder, offline. The folder's own padding and end tokens are used where it declares them.

    Raises:
        ValueError: the folder has no `tokenizer.json`, or it cannot be read.
    """
    path = to_path(folder) / "tokenizer.json"
    if not file_exists(path):
        raise ValueError(
            f"data.tokenizer: {path} does not exist; give a folder with a tokenizer.json (a Hugging Face tokenizer, "
            "or one that a preparation with --train-tokenizer wrote)"
        )
    from transformers import PreTrainedTokenizerFast  # 1.6 s to import: only who needs a tokenizer pays

    try:
        with _local_files(to_path(folder)) as local:
            wrapped = PreTrainedTokenizerFast.from_pretrained(os.fspath(local), local_files_only=True)
    except Exception as error:  # the backend raises a bare Exception for a bad file
        raise ValueError(f"data.tokenizer: {path} is not a readable tokenizer: {error}") from error
    pad, eos = wrapped.pad_token or PAD, wrapped.eos_token or EOS
    if pad == eos:  # some models pad with their end token; padding must never be a target
        pad = PAD
    return Tokenizer(wrapped.backend_tokenizer, str(pad), str(eos), _digest(read_bytes(path)), _chat(wrapped, path))


def _chat(wrapped: Any, path: epath.Path) -> tuple[list[int], list[int]] | None:
    """What stands around a user's words, tokenised apart from them: no words can end the turn that they stand in."""
    if not wrapped.chat_template:
        return None
    words = "\ufdd0words\ufdd0"  # no character, so in no template
    try:
        text = wrapped.apply_chat_template(
            [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template raises
        raise ValueError(f"{path.parent}: its chat template cannot be used: {error}") from error
    before, found, after = text.partition(words)
    if not found:
        raise ValueError(f"{path.parent}: its chat template leaves out what the user says")
    encode = wrapped.backend_tokenizer.encode
    return encode(before, add_special_tokens=False).ids, encode(after, add_special_tokens=False).ids


@contextlib.contextmanager
def _local_files(folder: epath.Path) -> Iterator[Path]:
    if is_local(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="unihetero-") as copies:
        for name in FILES:
            with contextlib.suppress(FileNotFoundError):
                download(folder / name, Path(copies) / name)
        yield Path(copies)


def extend_tokenizer(source: Path, folder: epath.Path) -> tuple[Tokenizer, int]:
    """Writes a language model's tokenizer with this program's special tokens, which get the ids after its own.

    Returns:
        The tokenizer of `folder`, and the number of ids that the language model knows.

    Raises:
        ValueError: the source has no readable `tokenizer.json`.
    """
    num_known = load_tokenizer(source).num_known
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast.from_pretrained(os.fspath(source), local_files_only=True)
    backend = wrapped.backend_tokenizer
    pad = wrapped.pad_token or PAD
    eos = wrapped.eos_token or EOS
    backend.add_special_tokens([PAD if pad == eos else str(pad), BOI, EOI, str(eos)])
    make_folder(folder)
    for name in FILES[1:]:
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())
    write_bytes(folder / FILES[0], (backend.to_str(pretty=True) + "\n").encode())
    return load_tokenizer(folder), num_known


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike[str]) -> Tokenizer:
    """Trains a byte-level BPE and writes it to `folder`. The same texts in the same order give the same file.

    `tokenizer.json` is put in place last and at once: a folder without it is no tokenizer.

    Args:
        texts: training text.
        vocab_size: upper bound on ids, special tokens included; little text gives fewer.
        folder: where `tokenizer.json` and `tokenizer_config.json` go; made when missing.

    Raises:
        ValueError: `vocab_size` cannot hold all bytes and the special tokens.
    """
    if vocab_size < MIN_TRAINED_VOCAB:
        raise ValueError(
            f"vocab_size {vocab_size} is below {MIN_TRAINED_VOCAB} (256 bytes and {len(SPECIAL_TOKENS)} "
            "special tokens); choose a larger one, e.g. 512"
        )
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    declared = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(Path(folder) / "tokenizer_config.json", json.dumps(declared, indent=2) + "\n")
    _write(Path(folder) / "tokenizer.json", backend.to_str(pretty=True) + "\n")
    return load_tokenizer(folder)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
