"""Likelihood ranking of answer options, packed: many questions share a row, the options of one share its prefix.

An item becomes one packed sample. Its picture and question stand once, as the shared prefix; each option is a branch.
A token is predicted from the position before it, and the second branch has no such position in the row that belongs to
it, so every branch starts by repeating the question's last token and the prefix ends one token earlier:

    row        boi  v0  v1  v2  v3  eoi  What  color | ?   red | ?   dark  blue
    branch_ids  0   0   0   0   0   0    0     0     | 1   1   | 2   2     2
    positions   0   1   2   3   4   5    6     7     | 8   9   | 8   9     10
    counted     .   .   .   .   .   .    .     .     | .   x   | .   x     x

Positions and contexts are those of the plain sequence `picture question option`, so the numbers are too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from unihetero_jax import distributed
from unihetero_jax.config import Config, DataConfig
from unihetero_jax.data.mixture import chat_around, image_spec
from unihetero_jax.data.packing import (
    NUM_MARKERS,
    PackedSample,
    Piece,
    TokenPiece,
    empty_rows,
    fill_row,
    image_pieces,
    row_of,
)
from unihetero_jax.data.records import (
    MERGE_SIZE,
    ImageSpec,
    RecordError,
    Turns,
    decode_image,
    format_answer,
    format_prompt,
    image_tokens,
    probe_image,
)
from unihetero_jax.data.row_plan import plan_rows
from unihetero_jax.data.tokenizer import Tokenizer
from unihetero_jax.data.transforms import resize_to_grid
from unihetero_jax.evaluation.benchmarks import Item
from unihetero_jax.evaluation.scoring import OptionScores

TOO_LONG, EMPTY, NOT_FINITE = "too_long", "empty_text", "not_finite"


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """An item as token ids, with its pictures, which follow `before`, and the visual tokens that each takes."""

    before: list[int]
    question: list[int]
    options: list[list[int]]
    images: tuple[bytes, ...]
    num_visual: tuple[int, ...]

    @property
    def prefix_tokens(self) -> int:
        return len(self.before) + sum(self.num_visual) + NUM_MARKERS * len(self.images) + len(self.question) - 1


@dataclasses.dataclass(frozen=True)
class _Part:
    """The options of one item that share a sample, and the sample's cost in (token positions, patches)."""

    item: int
    options: tuple[int, ...]
    cost: tuple[int, int]


def score_items(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    config: Config,
    log_probs: Callable[[dict[str, np.ndarray]], np.ndarray],
    *,
    without_image: bool = False,
    own_rows: Callable[[int], Sequence[int]] = range,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[OptionScores]:
    """Log-likelihood of every option of every item.

    In a run of several processes all call it with the same items. Each decodes and lays out the rows that its devices
    hold and no others, and what it found of them comes to process 0; the others get nothing.

    An item too large for a row is spread over several samples, each with the whole prefix and some of the options. One
    that cannot be scored at all keeps its place in the result, with the reason: `too_long` (one of its options
    does not fit a row even alone), `empty_text`, `not_finite` (the model gave NaN), or why its picture does not decode.

    Args:
        items: the questions.
        tokenizer: the one the model was trained with.
        config: `data.row_tokens`, `data.row_patches`, the image spec and `eval.batch_rows` are used.
        log_probs: from packed arrays (the fields of `arrays.Batch`, leading axis: this process's rows of the
            `eval.batch_rows`) to `float[B,T]`, log p(tokens[t] | what t may see before it) at the target's own
            position, where `text_loss_mask`.
        without_image: leave the pictures out of the prompts.
        own_rows: which of so many rows this process's devices hold.
        on_progress: called with (rows scored, rows in all) after every batch.

    Returns:
        One entry per item, in order.

    Raises:
        ValueError: `log_probs` returned another shape than `[B,T]`.
    """
    spec, data = image_spec(config), config.data
    unscored: dict[int, str] = {}
    prompts: dict[int, _Prompt] = {}
    parts: list[_Part] = []
    for position, item in enumerate(items):
        try:
            prompt = _make_prompt(item, tokenizer, config, without_image)
            parts.extend(_split(position, prompt, data))
            prompts[position] = prompt
        except RecordError as error:
            unscored[position] = error.reason
    sums: dict[int, dict[int, float]] = {}
    costs = np.array([part.cost for part in parts], np.int64).reshape(-1, 2)
    plan = plan_rows(costs, data.row_tokens, data.row_patches) if parts else []
    row_shape = (data.row_tokens, data.row_patches, spec.patch_size, tokenizer.pad_id)
    batch_rows = config.eval.batch_rows
    own = list(own_rows(batch_rows))
    for start in range(0, len(plan), batch_rows):
        batch, members = empty_rows(len(own), *row_shape), []
        for number, row in enumerate(own):
            chosen = [parts[i] for i in plan[start + row]] if start + row < len(plan) else []
            samples = _row_samples(chosen, prompts, items, tokenizer, spec, unscored)
            members.append([part for part, _ in samples])
            fill_row(row_of(batch, number), [sample for _, sample in samples], spec.patch_size, data.turns)
        _add_up(sums, prompts, members, data.turns, batch, _checked(log_probs(batch), batch["tokens"].shape))
        if on_progress:
            on_progress(min(start + batch_rows, len(plan)), len(plan))
    return _collect(len(items), prompts, sums, unscored)


def prompt_text(item: Item) -> str:
    """What the model reads before the answer: the hint, if there is one, on its own line, then the question."""
    return format_prompt(f"{item.hint}\n{item.question}" if item.hint else item.question)


def _make_prompt(item: Item, tokenizer: Tokenizer, config: Config, without_image: bool) -> _Prompt:
    spec, (before, after) = image_spec(config), chat_around(config, tokenizer)
    question = tokenizer.encode(prompt_text(item)) + after
    answers = [format_answer(option) for option in item.options]
    options = [tokenizer.encode(answer.lstrip() if after else answer) for answer in answers]
    if not question or not all(options):
        raise RecordError(EMPTY, f"item {item.index}")
    images = () if without_image else item.images
    return _Prompt(
        before, question, options, images, tuple(image_tokens(*probe_image(image), spec) for image in images)
    )


def _split(position: int, prompt: _Prompt, data: DataConfig) -> list[_Part]:
    """Groups an item's options, in order, into as few samples as fit a row each."""
    num_patches = sum(prompt.num_visual) * MERGE_SIZE**2
    shared, repeated = prompt.prefix_tokens, 0
    if data.turns == "repeated_prefix":
        shared, repeated = 0, prompt.prefix_tokens
    groups: list[list[int]] = []
    used: list[int] = []
    for number, option in enumerate(prompt.options):
        cost = repeated + 1 + len(option)
        if shared + cost > data.row_tokens or num_patches > data.row_patches:
            raise RecordError(TOO_LONG, f"{shared + cost} tokens, {num_patches} patches")
        if not used or used[-1] + cost > data.row_tokens:
            groups.append([])
            used.append(shared)
        groups[-1].append(number)
        used[-1] += cost
    return [_Part(position, tuple(group), (size, num_patches)) for group, size in zip(groups, used, strict=True)]


def _row_samples(
    parts: Sequence[_Part],
    prompts: dict[int, _Prompt],
    items: Sequence[Item],
    tokenizer: Tokenizer,
    spec: ImageSpec,
    unscored: dict[int, str],
) -> list[tuple[_Part, PackedSample]]:
    """The samples of a row; one whose picture turns out not to decode is left out and noted in `unscored`."""
    samples = []
    for part in parts:
        prompt = prompts[part.item]
        try:
            pieces: list[Piece] = [TokenPiece(prompt.before, loss=False, branch=0)] if prompt.before else []
            pieces += _pictures(prompt, tokenizer, spec)
        except RecordError as error:
            unscored[part.item] = error.reason
            continue
        if len(prompt.question) > 1:
            pieces.append(TokenPiece(prompt.question[:-1], loss=False, branch=0))
        for branch, number in enumerate(part.options, start=1):
            option = prompt.options[number]
            pieces.append(TokenPiece([prompt.question[-1], *option], [False, *[True] * len(option)], branch))
        name = f"{items[part.item].index}:{part.options}"
        identity = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        samples.append((part, PackedSample(pieces, source_id=0, identity=identity)))
    return samples


def _pictures(prompt: _Prompt, tokenizer: Tokenizer, spec: ImageSpec) -> list[Piece]:
    """The prompt's pictures, each between its markers, as training lays them out."""
    pieces: list[Piece] = []
    for image, promised in zip(prompt.images, prompt.num_visual, strict=True):
        pixels = resize_to_grid(decode_image(image), spec)
        num_visual = pixels.shape[0] * pixels.shape[1] // (MERGE_SIZE * spec.patch_size) ** 2
        if num_visual != promised:
            raise RecordError("size_mismatch", f"the header promises {promised} visual tokens, there are {num_visual}")
        pieces += image_pieces(pixels, tokenizer)
    return pieces


def _checked(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"log_probs returned shape {list(values.shape)}, expected [rows, tokens] = {list(shape)}")
    return values


def _add_up(
    sums: dict[int, dict[int, float]],
    prompts: dict[int, _Prompt],
    members: Sequence[Sequence[_Part]],
    turns: Turns,
    batch: dict[str, np.ndarray],
    values: np.ndarray,
) -> None:
    """Puts each option's log-probability into `sums`.

    Option j of a sample is its branch j + 1. A sample is one segment, or as many as it has options where these repeat
    the prefix; segments count from 1 along the row.
    """
    for row, row_parts in enumerate(members):
        end = 1
        for part in row_parts:
            first, end = end, end + (len(part.options) if turns == "repeated_prefix" else 1)
            segments = batch["segment_ids"][row]
            counted = batch["text_loss_mask"][row] & (first <= segments) & (segments < end)
            for branch, number in enumerate(part.options, start=1):
                mask = counted & (batch["branch_ids"][row] == branch)
                assert mask.sum() == len(prompts[part.item].options[number]), "every option token is counted once"
                sums.setdefault(part.item, {})[number] = float(values[row][mask].sum(dtype=np.float64))


def _collect(
    num_items: int, prompts: dict[int, _Prompt], sums: dict[int, dict[int, float]], unscored: dict[int, str]
) -> list[OptionScores]:
    """Brings what every process found of its rows together, on process 0."""
    texts = distributed.gather("option-scores", json.dumps({"sums": sums, "unscored": unscored}))
    all_sums: dict[int, dict[int, float]] = {}
    for text in texts:
        found = json.loads(text)
        unscored |= {int(position): reason for position, reason in found["unscored"].items()}
        for position, options in found["sums"].items():
            # An option is in one row; processes that hold the same row found the same.
            all_sums.setdefault(int(position), {}).update({int(number): x for number, x in options.items()})
    return (
        [_scores(prompts.get(i), all_sums.get(i, {}), unscored.get(i, "")) for i in range(num_items)] if texts else []
    )


def _scores(prompt: _Prompt | None, sums: dict[int, float], reason: str) -> OptionScores:
    if reason or prompt is None:
        return OptionScores((), (), reason)
    values = tuple(sums[number] for number in range(len(prompt.options)))
    if not np.isfinite(values).all():
        return OptionScores((), (), NOT_FINITE)
    return OptionScores(values, tuple(len(option) for option in prompt.options))
