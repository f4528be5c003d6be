"""Captions against those of people: CIDEr-D, BLEU and ROUGE-L by pycocoevalcap, and the tokenizer before them.

The scorers see words between blanks; what makes words of a caption decides the figures. COCO's own evaluation runs the
Penn Treebank tokenizer in Java and drops punctuation (`ptb`); `regex` is ours and needs no Java: lower case, words with
inner apostrophes and hyphens kept, `'s` and `n't` split off, punctuation dropped (our choice; on 4,970 pairs of COCO's
validation captions the two differ by .002 of CIDEr). Harnesses that skip this step (VLMEvalKit) get other figures.
"""

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Tokenization = Literal["regex", "ptb"]
_WORD = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|[^\W_]+(?:[-.][^\W_]+)*?(?=n't)|[^\W_]+(?:[-.][^\W_]+)*")


def tokenize(text: str) -> str:
    """`A man's dog, 2 cats.` becomes `a man 's dog 2 cats`."""
    return " ".join(_WORD.findall(text.lower().replace("\u2019", "'")))


def score_captions(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], tokenization: Tokenization = "regex"
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores captions of pictures.

    Args:
        references: what people wrote, by picture.
        captions: one for each of the same pictures.
        tokenization: see above.

    Returns:
        `cider` (CIDEr-D, 0 to 10), `bleu_1` to `bleu_4`, `rouge_l` over all pictures; and CIDEr-D by picture.

    Raises:
        ValueError: pycocoevalcap is not installed, or there is no Java for `ptb`.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        remedy = "pip install 'unihetero_jax[captions]'"
        raise ValueError(f"captions are scored by pycocoevalcap ({error}): {remedy}") from error
    indices = list(references)
    truth, found = _tokenized({index: list(references[index]) for index in indices}, captions, tokenization)
    with contextlib.redirect_stdout(sys.stderr):  # the library prints
        cider, by_picture = Cider().compute_score(truth, found)
        bleu, _ = Bleu(4).compute_score(truth, found)
        rouge, _ = Rouge().compute_score(truth, found)
    figures = {"cider": float(cider), "rouge_l": float(rouge)}
    figures |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return figures, {index: float(value) for index, value in zip(truth, by_picture, strict=True)}


def _tokenized(
    references: Mapping[str, list[str]], captions: Mapping[str, str], tokenization: Tokenization
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    if tokenization == "regex":
        truth = {index: [tokenize(text) for text in texts] for index, texts in references.items()}
        return truth, {index: [tokenize(captions[index])] for index in references}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def as_coco(texts: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
        return {index: [{"caption": text} for text in several] for index, several in texts.items()}

    try:
        tokenizer = PTBTokenizer()
        return (
            tokenizer.tokenize(as_coco(references)),
            tokenizer.tokenize(as_coco({index: [captions[index]] for index in references})),
        )
    except FileNotFoundError as error:
        raise ValueError(f"--rule ptb needs Java ({error}); install a Java runtime, or take the rule regex") from error
