"""What a model that answers in words has chosen: the public scorers' rules, each under its own name.

None of them guesses. An answer from which nothing can be taken is `None`, a miss, and is counted as unparsed. The rules
differ by tens of points on the same answers, so a figure has to name the one that it was made with.

Sources, as facts: VLMEvalKit e8e78f05 (`utils/matching_util.py`, `dataset/utils/yorn.py`), lmms-eval 75571cfe
(`tasks/mmbench/mmbench_evals.py`, `tasks/_task_utils/mcq_extract.py`, `tasks/pope`, `tasks/seedbench`, `tasks/mme`),
POPE's `evaluate.py` (arXiv 2305.10355).
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence

OptionRule = Callable[[str, Sequence[str]], int | None]
"""From an answer in words and the option texts to the position of the option that is meant, or None."""
YesNoRule = Callable[[str], str | None]
"""From an answer in words to "yes", "no" or None."""

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_TOKENS = 4
"""VLMEvalKit: a letter counts only if it first stands among so many last words."""
_MAX_LENGTH_RATIO = 2
"""VLMEvalKit: an answer longer than so many times all option texts together is not searched for one of them."""
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def vlmevalkit_option(answer: str, options: Sequence[str]) -> int | None:
    """VLMEvalKit's exact matching (`can_infer` with no judge model): a letter, else the text of one option.

        "B", "(B)", "Answer: B."            B
        "It is B, not A"                    two letters, so the texts are looked for
        "The correct answer is **B**, ..."  B, however long the reason that follows
        "a frog"                            the option "frog", if no other option's text is in the answer
        "Cannot determine the answer"       none

    Letters are case-sensitive, texts are not.
    """
    letters = string.ascii_uppercase[: len(options)]
    letter = _vlmevalkit_letter(answer, letters)
    if letter == "Z":
        return None
    return letters.index(letter) if letter else _option_in_text(answer, options, _MAX_LENGTH_RATIO)


def _vlmevalkit_letter(answer: str, letters: str) -> str:
    """A letter; "Z" where the answer says that it is none of them; empty where it names no letter."""
    if _API_FAILURE in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_PUNCTUATION).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_TOKENS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    stated = _ANSWER_IS.search(answer)
    return stated[1].upper() if stated and stated[1].upper() in letters else ""


def _option_in_text(answer: str, options: Sequence[str], max_ratio: float = float("inf")) -> int | None:
    """The only option whose text the answer contains, in any case."""
    if len(answer) > max_ratio * sum(map(len, options)):
        return None
    found = [position for position, option in enumerate(options) if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


_AFFIXES = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","), (":", "."),
    (":", ")"), (":", ")."),
)  # fmt: skip
"""lmms-eval: what may stand around a letter, tried in this order."""
_LMMS_LETTERS = "ABCDE"
_ARTICLE_WORDS = 3
"""lmms-eval: an "A" among more words than these may be an article."""


def lmms_eval_option(answer: str, options: Sequence[str]) -> int | None:
    """lmms-eval's rule for MMBench with `eval_method: static`: a letter, else an option's text, else `last_letter`."""
    letter = _lmms_eval_letter(answer)
    if not letter:
        position = _option_in_text(answer, options)
        if position is not None:
            return position
        letter = last_letter(answer, string.ascii_uppercase[: len(options)])
    position = string.ascii_uppercase.find(letter) if letter else -1
    return position if 0 <= position < len(options) else None


def _lmms_eval_letter(answer: str) -> str:
    if _API_FAILURE in answer:
        return ""
    words = answer.split()
    bare = [letter for letter in _LMMS_LETTERS if letter in words]
    if len(bare) == 1 and not (bare == ["A"] and len(words) > _ARTICLE_WORDS):
        return bare[0]
    for before, after in _AFFIXES:
        dressed = [letter for letter in _LMMS_LETTERS if before + letter + after in words]
        if len(dressed) == 1:
            return dressed[0]
    return ""


_PHRASES = (
    "answer is", "best option is", "correct option is", "choice is", "i choose", "i select", "i pick",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
"""lmms-eval: what announces an answer; its longer forms ("the correct answer is") end in one of these."""
_FORMS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
"""lmms-eval: how a letter may be written, the more telling the higher."""


def last_letter(answer: str, letters: str) -> str:
    """lmms-eval's `extract_mcq_answer`: of all places that may name a letter the most telling, of these the last.

    From telling to vague: the answer starts with it, ends with it, a phrase announces it, `(A)`, `A.`, `A:`, `A)`,
    `A `; if there is none of these, any occurrence. Empty if no letter occurs.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        for form, priority in _FORMS.items():
            if (place := text.rfind(form.format(letter))) >= 0:
                found.append((priority, place, letter))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            if start >= 0 and (place := text.find(letter, start + len(phrase))) >= 0:
                found.append((7, place, letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    # Of equal candidates the first letter wins, as with the original's stable sort.
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


def first_character(answer: str, options: Sequence[str]) -> int | None:
    """lmms-eval's rule for SEED-Bench, and what its leaderboard's files hold: the first character, in any case."""
    position = "abcdefgh".find(answer.strip()[:1].lower() or "?")
    return position if 0 <= position < len(options) else None


OPTION_RULES: Mapping[str, OptionRule] = {"vlmevalkit": vlmevalkit_option, "lmms-eval": lmms_eval_option}


def pope_answer(answer: str) -> str | None:
    """POPE's own rule: in the first sentence, without commas, a word "No", "not" or "no" is no; all else is yes.

    So it never leaves an answer unparsed, and an empty one is a yes; ours counts empty answers as unparsed and a miss.
    """
    if not answer.strip():
        return None
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def vlmevalkit_yes_no(answer: str) -> str | None:
    """VLMEvalKit's rule: the word yes without the word no, or the other way round, in any case."""
    words = set(strip_punctuation(answer.lower()).split())
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def lmms_eval_yes_no(answer: str) -> str | None:
    """lmms-eval's rule for POPE: the whole answer, in any case, is yes or no."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def mme_answer(answer: str) -> str | None:
    """MME's rule (`parse_pred_ans` of its evaluation tool): yes or no within the first four characters."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_ANY_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = int(re.UNICODE)
"""The originals pass this flag where the number of replacements stands, so only so many periods go."""


def strip_punctuation(text: str, after_digits: bool = False) -> str:
    """The VQA evaluation's rule: marks beside a blank, and all in a text with `1,000`, go; others become blanks.

    Periods go unless a digit follows or, but for `after_digits` (EvalAI's version), comes before.
    """
    result = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _VQA_MARKS:
        goes = has_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if goes else " ")
    return (_ANY_PERIOD if after_digits else _PERIOD).sub("", result, count=_MAX_PERIODS)
