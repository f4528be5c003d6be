"""Open answers against those of ten people: VQA's accuracy (arXiv 1612.00837) and the normalisations before it.

The published accuracy takes each person out in turn: mean over i of min(1, matches among the other answers / 3). The
normalisation decides what matches, and three are in use: that of VQA's own evaluation code (which leaves answers alone
where all ten agree), EvalAI's (which TextVQA and most harnesses use) and VLMEvalKit's.
"""

import string
from collections.abc import Sequence
from typing import Literal

from unihetero_jax.evaluation.extraction import strip_punctuation

VqaRule = Literal["evalai", "vqa", "vlmevalkit"]

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
"""What the rule spells with its apostrophes when some of them are missing. Not on the list are those whose bare form is
another word (he'll, I'll, we'll, were, its)."""


def _apostrophes_restored() -> dict[str, str]:
    """Spellings in which one apostrophe is missing, with the word that is meant."""
    table = {}
    for word in _CONTRACTIONS:
        for place, character in enumerate(word):
            if character == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}  # as the originals have it


_SPELLINGS = _apostrophes_restored()


def normalize_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes restored."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_evalai(text: str) -> str:
    """EvalAI's answer processor: commas, question marks and the genitive first, then punctuation and words."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_words(strip_punctuation(_on_one_line(text), after_digits=True))


def normalize_vlmevalkit(text: str) -> str:
    """VLMEvalKit's `process_answer`: punctuation and words."""
    return normalize_words(strip_punctuation(_on_one_line(text)))


def vqa_accuracy(answer: str, people: Sequence[str], rule: VqaRule = "evalai") -> float:
    """Accuracy of an answer in [0, 1]; `people` are at least two answers."""
    match rule:
        case "evalai":
            return _leave_one_out(normalize_evalai(answer), [normalize_evalai(other) for other in people])
        case "vlmevalkit":
            return _leave_one_out(normalize_vlmevalkit(answer), [normalize_vlmevalkit(other) for other in people])
        case "vqa":
            answer, people = _on_one_line(answer), [_on_one_line(other) for other in people]
            if len(set(people)) > 1:  # where all agree, its code compares what was written
                answer, *people = (normalize_words(strip_punctuation(x, after_digits=True)) for x in (answer, *people))
            return _leave_one_out(answer, people)


def exact_match(answer: str, truth: str) -> float:
    """GQA's: 1 if the two agree but for case, punctuation and blanks."""
    return float(_plain(answer) == _plain(truth))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _leave_one_out(answer: str, people: Sequence[str]) -> float:
    """Mean over the people of min(1, how many of the others gave this answer / 3)."""
    matches = [answer == other for other in people]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(people)
