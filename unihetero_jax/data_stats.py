"""What a mixture holds, what a run has drawn of it, and how large its rows should be: the command `data-stats`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unihetero_jax.config import Config
from unihetero_jax.data.mixture import make_schedule, open_split
from unihetero_jax.data.records import FLAG_TOO_LONG
from unihetero_jax.data.row_plan import plan_rows
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.storage import read_bytes, to_path
from unihetero_jax.text_table import align

SAMPLED_WINDOWS = 4
"""Windows of the mixture whose rows are planned to find a good `data.row_patches`."""
MARGINS = (1.0, 1.01, 1.02, 1.03, 1.04, 1.06, 1.08, 1.12, 1.16, 1.25, 1.5, 2.0)
"""Patch budgets tried, over what rows of full token positions hold on average."""
MAX_EXTRA_ROWS = 1.002
"""The smallest budget is proposed that needs at most so many times the rows of an unbounded one."""


@dataclasses.dataclass(frozen=True)
class RowSize:
    """What a patch budget costs: shares of a row's token positions and patches that stay empty, over whole windows."""

    row_patches: int
    token_padding: float
    patch_padding: float


@dataclasses.dataclass(frozen=True)
class SourceLengths:
    """Lengths of a source's training records: mean token positions and patches, and how many no row can hold."""

    num_records: int
    share: float
    mean_tokens: float
    mean_patches: float
    num_too_long: int


def mixture_lengths(config: Config) -> tuple[dict[str, SourceLengths], np.ndarray]:
    """Lengths by source, and the (tokens, patches) of every draw of the first windows that fits a row.

    Raises:
        ValueError: a source is missing, incomplete or without a fitting index.
    """
    data, tokenizer = config.data, load_tokenizer(config.data.tokenizer)
    sources = {name: open_split(config, tokenizer, name, "train") for name in data.sources}
    schedule = make_schedule(config, {name: len(source) for name, source in sources.items()})
    drawn: list[np.ndarray] = []
    lengths = {}
    spread = np.linspace(0, max(data.planned_draws / data.window_size - 1, SAMPLED_WINDOWS - 1), SAMPLED_WINDOWS)
    windows = [schedule.window(int(number)) for number in spread]  # a curriculum is more than its start
    draws = data.planned_draws or 1_000_000
    shares = dict(zip(schedule.names, schedule.integral(draws) / draws, strict=True))
    for number, (name, source) in enumerate(sources.items()):
        index = source.index
        costs = np.stack([index["num_tokens"], index["num_patches"]], axis=-1).astype(np.int64)
        fits = ((index["flags"] & FLAG_TOO_LONG) == 0) & (costs[:, 0] <= data.row_tokens)
        mean_tokens, mean_patches = costs.mean(axis=0).tolist()
        lengths[name] = SourceLengths(
            len(index),
            float(shares[name]),
            mean_tokens,
            mean_patches,
            num_too_long=int((~fits | (costs[:, 1] > data.row_patches)).sum()),
        )
        picked = np.concatenate([records[members == number] for members, records, _ in windows])
        drawn.append(costs[picked[fits[picked]]])
        source.close()
    return lengths, np.concatenate(drawn)


def row_sizes(costs: np.ndarray, row_tokens: int) -> tuple[list[RowSize], int]:
    """Padding for a range of `data.row_patches`, and the one proposed; 0 if no record has an image.

    Args:
        costs: `int[n, 2]`, (tokens, patches) of the samples of some windows.
        row_tokens: T.
    """
    tokens, patches = costs.sum(axis=0).tolist()
    if patches == 0:
        return [], 0
    even = row_tokens * patches / tokens
    found: list[RowSize] = []
    for margin in MARGINS:
        row_patches = max(int(np.ceil(even * margin / 4)) * 4, int(costs[:, 1].max()))
        rows = len(plan_rows(costs, row_tokens, row_patches))
        if not found or found[-1].row_patches != row_patches:
            found.append(RowSize(row_patches, 1 - tokens / (rows * row_tokens), 1 - patches / (rows * row_patches)))
    least_rows = (1 - found[-1].token_padding) / MAX_EXTRA_ROWS
    proposed = next(size for size in found if 1 - size.token_padding >= least_rows)
    return found, proposed.row_patches


def last_totals(workdir: str) -> tuple[int, dict[str, int]]:
    """The newest step of a run's metrics and its running totals.

    Raises:
        ValueError: the folder is no run, or has no metric line yet.
    """
    try:
        text = read_bytes(to_path(workdir) / "metrics.jsonl").decode()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"--workdir {workdir}: no metrics.jsonl; train first, or correct the path") from None
    for line in reversed(text.splitlines()):
        try:
            entry = json.loads(line)
            return int(entry["step"]), {name: int(value) for name, value in entry["totals"].items()}
        except (ValueError, KeyError, TypeError):
            continue  # a line torn by a kill
    raise ValueError(f"--workdir {workdir}: metrics.jsonl has no line with totals yet")


def format_lengths(lengths: Mapping[str, SourceLengths]) -> str:
    """The table of what the sources hold."""
    rows = [
        (name, f"{s.num_records:,}", f"{s.share:.2%}", f"{s.mean_tokens:,.1f}", f"{s.mean_patches:,.1f}",
         f"{s.num_too_long:,}")
        for name, s in lengths.items()
    ]  # fmt: skip
    return _table(("source", "records", "share", "mean tokens", "mean patches", "too long"), rows)


def format_totals(totals: Mapping[str, int], lengths: Mapping[str, SourceLengths]) -> str:
    """The table of what a run has drawn. Unique samples follow from the order: none comes twice within an epoch."""
    rows = []
    for name, source in lengths.items():
        count = {kind: totals.get(f"{kind}/{name}", 0) for kind in
                 ("samples", "failed", "dropped", "tokens", "text_targets", "visual_targets")}  # fmt: skip
        usable = source.num_records - source.num_too_long
        drawn = count["samples"] + count["failed"]
        rows.append(
            (name, f"{count['samples']:,}", f"{min(drawn, usable):,}", f"{drawn / max(usable, 1):.2f}",
             f"{count['tokens']:,}", f"{count['text_targets']:,}", f"{count['visual_targets']:,}",
             f"{count['failed']:,}", f"{count['dropped']:,}")
        )  # fmt: skip
    header = ("source", "samples", "unique", "epochs", "tokens", "text targets", "visual targets", "failed", "dropped")
    used = sum(totals.get(f"tokens/{name}", 0) for name in lengths)
    padding = totals.get("pad_tokens", 0)
    lines = [_table(header, rows), f"padding: {padding:,} token positions ({padding / max(used + padding, 1):.2%})"]
    reasons = {
        key: value
        for key, value in totals.items()
        if key.startswith(("failed_reason/", "left_out/", "storage_retries/"))
    }
    return "\n".join([*lines, *(f"{key}: {value:,}" for key, value in sorted(reasons.items()))])


def format_row_sizes(sizes: Sequence[RowSize], proposed: int, config: Config) -> str:
    """The table of patch budgets, and what is proposed beside what is set."""
    rows = [(f"{s.row_patches:,}", f"{s.token_padding:.2%}", f"{s.patch_padding:.2%}") for s in sizes]
    if not rows:
        return "no record has an image"
    words = f"data.row_patches {config.data.row_patches} is set; {proposed} is the smallest that costs no rows"
    return _table(("row_patches", "token padding", "patch padding"), rows) + "\n" + words


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = align([header, *([str(cell) for cell in row] for row in rows)], numbers=True)
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
