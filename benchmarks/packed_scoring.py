"""Likelihood scoring, packed against one by one: the same model, the same items, the same numbers.

    python -m benchmarks.packed_scoring [--questions=FILE] [--workdir=reference/demo] [--items=400] [--rounds=5]

packed          as `evaluate` does it: the options of a question share its picture and text, many questions a row
options alone   every option a row of its own with picture and question before it, as many rows at once as `packed` has
one by one      the same, one row at a time

Rows of the last two are as long as the longest of them. All three are compiled before they are timed, and their
log-probabilities have to agree.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.interleave import Timing
from benchmarks.results_file import describe_run, write_results
from unihetero_jax.config import Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import assemble_row, empty_rows, sample_from_record, stack_rows
from unihetero_jax.data.records import (
    ImageSegment,
    Record,
    TextSegment,
    format_answer,
    image_tokens,
    probe_image,
)
from unihetero_jax.evaluation.benchmarks import Item, read_benchmark
from unihetero_jax.evaluation.multiple_choice import prompt_text, score_items
from unihetero_jax.loaded_run import Run, load_run, make_log_probs

BAR = 5.0
"""Least gain over one by one."""
MAX_DIFFERENCE = 1e-3
"""Of a sum of log-probabilities, in nats: float32 in another order."""


def make_packed(run: Run, items: Sequence[Item]) -> Callable[[], np.ndarray]:
    """Every option's sum of log-probabilities, as a job computes them."""
    log_probs = make_log_probs(run.config, run.params)

    def score() -> np.ndarray:
        return np.array([x for s in score_items(items, run.tokenizer, run.config, log_probs) for x in s.sum_log_probs])

    return score


def make_plain(run: Run, items: Sequence[Item], batch_rows: int) -> Callable[[], np.ndarray]:
    """The same from rows that hold one option each."""
    config, tokenizer = run.config, run.tokenizer
    lengths, patches = zip(*(_cost(run, item) for item in items), strict=True)
    row_tokens, row_patches = max(lengths), max(patches)
    data = dataclasses.replace(config.data, row_tokens=row_tokens, row_patches=row_patches)
    evaluation = dataclasses.replace(config.eval, batch_rows=batch_rows)
    small = dataclasses.replace(config, data=data, eval=evaluation)
    log_probs = make_log_probs(small, run.params)
    pairs = [(item, option) for item in items for option in item.options]

    def row(item: Item, option: str) -> dict[str, np.ndarray]:
        pictures = [ImageSegment(image, *probe_image(image)) for image in item.images]
        segments = [*pictures, TextSegment(prompt_text(item)), TextSegment(format_answer(option), loss=True)]
        sample = sample_from_record(Record("x", "vqa", tuple(segments)), tokenizer, image_spec(config), source_id=0)
        return assemble_row(
            [sample], row_tokens, row_patches, config.model.encoder.patch_size, tokenizer.pad_id, config.data.turns
        )

    def score() -> np.ndarray:
        sums = []
        for start in range(0, len(pairs), batch_rows):
            rows = [row(*pair) for pair in pairs[start : start + batch_rows]]
            batch = empty_rows(batch_rows, row_tokens, row_patches, config.model.encoder.patch_size, tokenizer.pad_id)
            for name, values in stack_rows(rows).items():
                batch[name][: len(rows)] = values
            values = log_probs(batch)
            counted = batch["text_loss_mask"] & _of_option(batch, tokenizer.eos_id)
            sums += np.where(counted, values, 0).sum(axis=1, dtype=np.float64)[: len(rows)].tolist()
        return np.array(sums)

    return score


def _of_option(batch: dict[str, np.ndarray], eos_id: int) -> np.ndarray:
    """The option's own tokens: neither the end of the sample nor the markers of a picture count."""
    return batch["tokens"] != eos_id


def _cost(run: Run, item: Item) -> tuple[int, int]:
    """Positions and patches of the item's longest row."""
    config: Config = run.config
    texts = [run.tokenizer.encode(prompt_text(item) + format_answer(option)) for option in item.options]
    visual = [image_tokens(*probe_image(image), image_spec(config)) for image in item.images]
    return max(map(len, texts)) + 4 + sum(visual) + 2 * len(visual), 4 * sum(visual)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="reference/demo/questions.tsv")
    parser.add_argument("--workdir", default="reference/demo")
    parser.add_argument("--items", type=int, default=400, help="so many of the file's first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/packed_scoring.json")
    flags = parser.parse_args()
    about = describe_run(("jax", "jaxlib", "flax"))
    run = load_run(flags.workdir, -1, 0)
    items = read_benchmark(flags.questions).items[: flags.items]
    arms = {
        "packed": make_packed(run, items),
        "options alone": make_plain(run, items, run.config.eval.batch_rows),
        "one by one": make_plain(run, items, 1),
    }
    found = {name: score() for name, score in arms.items()}  # compiles, too
    difference = max(np.abs(found["packed"] - other).max() for other in found.values())
    assert difference < MAX_DIFFERENCE, f"the arms differ by {difference} nats"
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(flags.rounds):
        for name, score in arms.items():
            start = time.perf_counter()
            score()
            seconds[name].append(time.perf_counter() - start)
        print(f"round {number + 1}/{flags.rounds}, load average {os.getloadavg()[0]:.2f}", file=sys.stderr)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    gain = timings["one by one"].median / timings["packed"].median
    for name, timing in timings.items():
        note = "  REJECTED: the machine was not quiet" if timing.is_rejected else ""
        print(f"{name:14}{len(items) / timing.median:>9,.1f} items/s{note}")
    print(f"packed over one by one {gain:.1f}x (bar {BAR:.0f}x); largest difference {difference:.1e} nats")
    write_results(flags.out, about, {
        "questions": os.path.basename(flags.questions), "num_items": len(items), "num_options": len(found["packed"]),
        "rows": {"packed": [run.config.eval.batch_rows, run.config.data.row_tokens, run.config.data.row_patches]},
        "arms": {name: t.to_json() | {"items_per_s": len(items) / t.median} for name, t in timings.items()},
        "gain": gain, "bar": BAR, "bar_reached": gain >= BAR, "max_difference_nats": float(difference),
    })  # fmt: skip


if __name__ == "__main__":
    main()
