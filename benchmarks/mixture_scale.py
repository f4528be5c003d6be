"""A mixture of 200,000,000 records in 12 sources, by lengths alone: opening, memory, planning, padding, restoring.

    python -m benchmarks.mixture_scale [--records=200000000] [--seconds=20] [--out=FILE]

Text, captioned images, samples of four images and interleaved documents are mixed, in rows of 4,096 token positions;
`data.row_patches` is what `data-stats` proposes. The indices take 8 bytes a record on disk, in a temporary folder.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.loader import LIBRARIES
from benchmarks.results_file import describe_run, write_results
from unihetero_jax.data import records
from unihetero_jax.data.mixture import WindowPlanner
from unihetero_jax.data.schedule import Member, MixtureSchedule
from unihetero_jax.data_stats import row_sizes

ROW_TOKENS, SHARDS, WINDOW = 4096, 64, 6144
KINDS = ("text", "one image", "four images", "interleaved")
WEIGHTS = {"text": 0.2, "one image": 0.5, "four images": 0.1, "interleaved": 0.2}
SOURCES_PER_KIND = 3
RESTORED_WINDOWS = (1, 1_000, 1_000_000)
CHUNK = 1 << 20
"""Lengths drawn for each source; a longer source repeats them, as only their number matters beyond that."""


def draw_lengths(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """An index of `count` records of a kind: log-normal text, images of 64 to 256 visual tokens."""
    mean, images = {
        "text": (5.8, np.zeros(count, int)),
        "one image": (3.4, np.ones(count, int)),
        "four images": (5.0, np.full(count, 4)),
        "interleaved": (6.0, np.minimum(1 + rng.poisson(2, count), 6)),
    }[kind]
    text = np.clip(rng.lognormal(mean, 0.8, count), 8, ROW_TOKENS // 2).astype(np.int64)
    visual = (rng.integers(64, 257, (count, 6)) * (np.arange(6) < images[:, None])).sum(axis=1)
    visual = np.minimum(visual, ROW_TOKENS - text - 2 * images - 1)
    index = np.zeros(count, records.INDEX_DTYPE)
    index["num_tokens"], index["num_patches"], index["num_images"] = text + visual + 2 * images + 1, 4 * visual, images
    return index


def write_indices(folder: Path, num_records: int) -> dict[str, Path]:
    """One index file for each of the 12 sources, of unequal sizes that sum to `num_records`."""
    names = [f"{kind} {number}" for kind in KINDS for number in range(SOURCES_PER_KIND)]
    shares = np.arange(1, len(names) + 1) / np.arange(1, len(names) + 1).sum()
    sizes = np.floor(shares * num_records).astype(int)
    sizes[-1] += num_records - sizes.sum()
    paths = {}
    for number, (name, size) in enumerate(zip(names, sizes.tolist(), strict=True)):
        paths[name] = folder / f"{number}.npy"
        lengths = draw_lengths(name.rpartition(" ")[0], min(CHUNK, size), np.random.default_rng(number))
        index = np.lib.format.open_memmap(paths[name], "w+", records.INDEX_DTYPE, (size,))
        for start in range(0, size, len(lengths)):
            index[start : start + len(lengths)] = lengths[: size - start]
        index.flush()
    return paths


def open_mixture(paths: Mapping[str, Path]) -> tuple[MixtureSchedule, dict[str, np.ndarray]]:
    """The schedule and the memory-mapped indices."""
    indices = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    members = {
        name: Member(len(index), WEIGHTS[name.rpartition(" ")[0]] / SOURCES_PER_KIND) for name, index in indices.items()
    }
    return MixtureSchedule(members, 0, WINDOW), indices


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this needs Linux")


def draw_costs(schedule: MixtureSchedule, indices: Mapping[str, np.ndarray], windows: range) -> np.ndarray:
    """(tokens, patches) of every draw of some windows."""
    costs = []
    for window in windows:
        sources, numbers, _ = schedule.window(window)
        for number, name in enumerate(schedule.names):
            entries = indices[name][numbers[sources == number]]
            costs.append(np.stack([entries["num_tokens"], entries["num_patches"]], axis=-1).astype(np.int64))
    return np.concatenate(costs)


def measure(paths: Mapping[str, Path], seconds: float) -> dict[str, float]:
    """Every figure; times are of this process alone."""
    memory, start = anonymous_bytes(), time.perf_counter()
    schedule, indices = open_mixture(paths)
    result = {"open_s": time.perf_counter() - start}
    sizes, row_patches = row_sizes(draw_costs(schedule, indices, range(4)), ROW_TOKENS)
    result |= {"row_patches": row_patches, "least_patches": sizes[0].row_patches}
    planner = WindowPlanner(indices, schedule, 0, ROW_TOKENS, row_patches, SHARDS)
    planner.plan(0, 0)
    rows = samples = windows = 0
    used = np.zeros(2)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        plan = planner.plan(windows % SHARDS, windows // SHARDS)
        rows, samples, windows = rows + len(plan.rows), samples + len(plan.records), windows + 1
    result["samples_per_s"] = samples / (time.perf_counter() - start)
    used = draw_costs(schedule, indices, range(windows)).sum(axis=0)
    result["token_padding"] = 1 - used[0] / (rows * ROW_TOKENS)
    result["patch_padding"] = 1 - used[1] / (rows * row_patches)
    for window in RESTORED_WINDOWS:
        fresh_schedule, fresh_indices = open_mixture(paths)
        fresh = WindowPlanner(fresh_indices, fresh_schedule, 0, ROW_TOKENS, row_patches, SHARDS)
        start = time.perf_counter()
        fresh.plan(0, window)
        result[f"restore_window_{window}_s"] = time.perf_counter() - start
    result["anonymous_gib"] = (anonymous_bytes() - memory) / 2**30
    return result


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of planning")
    parser.add_argument("--out", default="benchmarks/results/mixture_scale.json")
    flags = parser.parse_args()
    run = describe_run(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(write_indices(Path(folder), flags.records), flags.seconds)
    for name, value in result.items():
        print(f"{name:28}{value:>16,.4f}")
    write_results(flags.out, run, {
        "num_records": flags.records, "row_tokens": ROW_TOKENS, "num_data_shards": SHARDS, "window_size": WINDOW,
        "results": result,
    })  # fmt: skip


if __name__ == "__main__":
    main()
