"""Captions against those of people: CIDEr-D, BLEU and ROUGE-L by pycocoevalcap, and the tokenizer before them.

The scorers see words between blanks; what makes words of a caption decides the figures. COCO's own evaluation runs the
Penn Treebank tokenizer in Java and drops punctuation (`ptb`); `regex` is ours and needs no Java: lower case, words with
inner apostrophes and hyphens kept, `'s` and `n't` split off, punctuation dropped (our choice; on 4,970 pairs of COCO's
validation captions the two differ by .002 of CIDEr). Harnesses that skip this step (VLMEvalKit) get other figures.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from unihetero_jax.evaluation.scoring import influence_error, mean_influences

Tokenization = Literal["regex", "ptb"]
MAX_BLEU = 4
_WORD = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|[^\W_]+(?:[-.][^\W_]+)*?(?=n't)|[^\W_]+(?:[-.][^\W_]+)*")


def tokenize(text: str) -> str:
    """`A man's dog, 2 cats.` becomes `a man 's dog 2 cats`."""
    return " ".join(_WORD.findall(text.lower().replace("\u2019", "'")))


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Figures over all pictures, their standard errors, and CIDEr-D by picture.

    `figures` and `errors`: `cider` (CIDEr-D, 0 to 10), `bleu_1` to `bleu_4`, `rouge_l`. The error of a BLEU, a ratio of
    sums over pictures, is by the delta method.
    """

    figures: Mapping[str, float]
    errors: Mapping[str, float]
    cider_by_picture: Mapping[str, float]


def score_captions(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], tokenization: Tokenization = "regex"
) -> CaptionScores:
    """Scores captions of pictures.

    Args:
        references: what people wrote, by picture.
        captions: one for each of the same pictures.
        tokenization: see above.

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
        bleu, _ = Bleu(MAX_BLEU).compute_score(truth, found)
        rouge, rouge_by_picture = Rouge().compute_score(truth, found)
    figures = {"cider": float(cider), "rouge_l": float(rouge)}
    figures |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    by_picture, rouge_by_picture = (list(map(float, values)) for values in (by_picture, rouge_by_picture))
    influences = {"cider": mean_influences(by_picture), "rouge_l": mean_influences(rouge_by_picture)}
    influences |= _bleu_influences(truth, found, figures)
    errors = {name: influence_error(values, list(truth)) for name, values in influences.items()}
    return CaptionScores(figures, errors, dict(zip(truth, by_picture, strict=True)))


def _bleu_influences(
    truth: Mapping[str, list[str]], found: Mapping[str, list[str]], figures: Mapping[str, float]
) -> dict[str, list[float]]:
    """How much each picture pulls the corpus' BLEU-1 to BLEU-4, to first order.

    log BLEU-n is the mean over k <= n of log(sum of matches of k words / sum of guesses of k words), plus
    min(0, 1 - reference length / length).
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    counts = [cook_test(found[index][0], cook_refs(texts), eff="closest") for index, texts in truth.items()]
    orders = range(MAX_BLEU)
    matches, guesses = ([sum(c[key][k] for c in counts) for k in orders] for key in ("correct", "guess"))
    length, reference = (sum(c[key] for c in counts) for key in ("testlen", "reflen"))

    def pull(count: Mapping[str, Any], n: int) -> float:
        if not all(matches[:n]):
            return 0.0
        precision = sum(count["correct"][k] / matches[k] - count["guess"][k] / guesses[k] for k in range(n)) / n
        is_short = length < reference
        brevity = (count["testlen"] * reference / length - count["reflen"]) / length if is_short else 0.0
        return figures[f"bleu_{n}"] * (precision + brevity)

    return {f"bleu_{n}": [pull(count, n) for count in counts] for n in range(1, MAX_BLEU + 1)}


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
