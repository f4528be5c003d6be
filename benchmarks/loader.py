"""How fast the loader plans and reads, how much of a row is padding, and what it costs to resume far into a run.

    python -m benchmarks.loader [--full] [--seconds=5] [--out=benchmarks/results/loader.json]

Records are generated into a temporary folder: PNG and JPEG images of mixed aspect ratios with captions, and plain text.
Planning and resuming are also measured on lengths alone, over indices of 1e3 and 1e6 records; `--full` adds 1e8 (an
800 MB file of lengths). Padding of tokens and of patches is reported apart: patches are a budget that images need not
fill.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from benchmarks.results_file import describe_run, write_results
from experiments import base
from unihetero_jax.config import Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data import mixture, records
from unihetero_jax.data.records import ImageSegment, Record, TextSegment
from unihetero_jax.data.schedule import Member, MixtureSchedule
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

ROW_TOKENS, ROW_PATCHES, MAX_PATCHES = 1024, 2048, 256
WORDS = [
    a + b
    for a in ("ba", "ko", "ri", "su", "te", "na", "lo", "mi")
    for b in ("n", "r", "l", "s", "mo", "ta", "ve", "di")
]
RESUME_WINDOWS = (1, 1_000, 1_000_000)
SHARDS, WINDOW = 8, 4096
LIBRARIES = ("numpy", "grain", "array-record", "pillow", "tokenizers", "transformers", "msgpack")


def generate_records(count: int, seed: int) -> list[Record]:
    """70% image-caption pairs (half PNG, half JPEG; 96 to 320 pixels a side), 30% text of log-normal length."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = int(np.clip(rng.lognormal(3.5, 0.9), 3, 300))
        text = TextSegment(" ".join(rng.choice(WORDS, words)), True)
        if rng.random() < 0.3:
            made.append(Record("bench", "text", (text,), {"id": i}))
            continue
        height, width = (int(side) for side in rng.integers(96, 321, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG" if i % 2 else "JPEG")
        made.append(Record("bench", "caption", (ImageSegment(buffer.getvalue(), height, width), text), {"id": i}))
    return made


def write_source(folder: Path, items: list[Record], tokenizer: Tokenizer, spec: records.ImageSpec) -> None:
    """A prepared folder with one shard."""
    (folder / "index").mkdir(parents=True)
    index = np.zeros(len(items), records.INDEX_DTYPE)
    path = folder / "train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, record in enumerate(items):
        tokens, patches = records.record_cost(record, tokenizer.encode, spec)
        index[i] = (tokens, patches, patches > 0, 0)
        writer.write(records.serialize(record))
    writer.close()
    np.save(folder / "index" / f"{records.index_key(tokenizer.hash, spec)}.train.npy", index)
    digest = hashlib.blake2b(path.read_bytes()).hexdigest()
    manifest = {
        "record_version": records.RECORD_VERSION,
        "source": "bench",
        "num_records": {"train": len(items), "val": 0},
        "files": {path.name: {"bytes": path.stat().st_size, "digest": digest}},
        "dropped": {},
        "dropped_examples": {},
        "licence": "",
        "settings": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def make_config(folder: Path) -> Config:
    """One source, rows as a pretraining run would have them."""
    config = base.get_config()
    fields = {
        "data.sources": {"bench": {"path": str(folder / "source"), "weight": 1.0, "augment": "none"}},
        "data.tokenizer": str(folder / "tokenizer"),
        "data.row_tokens": ROW_TOKENS,
        "data.row_patches": ROW_PATCHES,
        "data.image_min_patches": 4,
        "data.image_max_patches": MAX_PATCHES,
        "data.num_data_shards": SHARDS,
        "data.window_size": WINDOW,
        "train.global_batch_rows": 16,
    }
    config.update_from_flattened_dict(fields)
    return from_config_dict(config)


def generate_lengths(path: Path, count: int) -> np.ndarray:
    """An index of `count` records with the length mix of `generate_records`, memory-mapped from a file."""
    chunk_size = 10**6
    rng = np.random.default_rng(count)
    index = np.lib.format.open_memmap(path, "w+", records.INDEX_DTYPE, (count,))
    for start in range(0, count, chunk_size):
        size = min(chunk_size, count - start)
        with_image = rng.random(size) < 0.7
        visual = np.where(with_image, rng.integers(24, MAX_PATCHES // 4 + 1, size), 0)
        chunk = np.zeros(size, records.INDEX_DTYPE)
        text = np.clip(rng.lognormal(4.2, 0.9, size), 3, ROW_TOKENS // 2).astype(np.int64)
        chunk["num_tokens"], chunk["num_patches"] = text + visual + 2 * with_image + 1, visual * 4
        chunk["num_images"] = with_image
        index[start : start + size] = chunk
    index.flush()
    return np.load(path, mmap_mode="r")


def make_planner(index: np.ndarray) -> mixture.WindowPlanner:
    """The planner of one source of these lengths."""
    schedule = MixtureSchedule({"bench": Member(len(index), 1.0)}, 0, WINDOW)
    return mixture.WindowPlanner({"bench": index}, schedule, 0, ROW_TOKENS, ROW_PATCHES, SHARDS)


def measure_planning(index: np.ndarray, seconds: float) -> dict[str, float]:
    """Whole windows planned one after another (so padding is exact), and the time of one round at far positions."""
    planner = make_planner(index)
    tokens = patches = rows = windows = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or windows < SHARDS:
        plan = planner.plan(windows % SHARDS, windows // SHARDS)
        rows += len(plan.rows)
        tokens += int(index["num_tokens"][plan.records].sum())
        patches += int(index["num_patches"][plan.records].sum())
        windows += 1
    elapsed = time.perf_counter() - start
    result = {
        "samples_per_s": windows * WINDOW / elapsed,
        "token_padding": 1 - tokens / (rows * ROW_TOKENS),
        "patch_padding": 1 - patches / (rows * ROW_PATCHES),
    }
    for window in RESUME_WINDOWS:
        fresh = make_planner(index)
        start = time.perf_counter()
        for shard in range(SHARDS):
            fresh.plan(shard, window)
        result[f"resume_window_{window}_s"] = time.perf_counter() - start
    return result


def measure_reading(config: Config, tokenizer: Tokenizer, seconds: float) -> dict[str, float]:
    """Samples per second of the whole loader, padding of its stream, time from a saved position to a batch."""
    dataset = mixture.MixtureDataset(config, tokenizer)
    iterator = iter(dataset)
    for _ in range(config.data.prefetch_batches + 1):
        next(iterator)
    samples = tokens = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(iterator)
        samples += len(batch.sample_ids)
        tokens += batch.counters["tokens/bench"]
    elapsed = time.perf_counter() - start
    planned = measure_planning(dataset.sources["bench"].index, 0.0)  # of whole windows: a few seconds see but a part
    result = {"samples_per_s": samples / elapsed, "tokens_per_s": tokens / elapsed}
    result |= {key: planned[key] for key in ("token_padding", "patch_padding")}
    iterator.close()
    for window in RESUME_WINDOWS:
        fresh = mixture.make_train_iterator(config, tokenizer)
        start = time.perf_counter()
        fresh.set_state({"position": np.full((SHARDS, 2), (window, 5), np.int64), "batch": 0})
        next(fresh)
        result[f"resume_window_{window}_s"] = time.perf_counter() - start
        fresh.close()
    return result


def print_table(results: dict[str, dict[str, float]]) -> None:
    """The table that goes into a report."""
    resume = [f"resume w={window:g}" for window in RESUME_WINDOWS]
    print(f"{'':24}{'samples/s':>11}{'token pad':>11}{'patch pad':>11}" + "".join(f"{title:>15}" for title in resume))
    for name, row in results.items():
        times = "".join(f"{row[f'resume_window_{window}_s']:>13.3f} s" for window in RESUME_WINDOWS)
        print(
            f"{name:24}{row['samples_per_s']:>11,.0f}{row['token_padding']:>11.2%}{row['patch_padding']:>11.2%}{times}"
        )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also an index of 1e8 records (800 MB of disk)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--records", type=int, default=3000, help="generated records that are really read")
    parser.add_argument("--out", default="benchmarks/results/loader.json")
    arguments = parser.parse_args()
    results = {}
    run = describe_run(LIBRARIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (10**3, 10**6, *([10**8] if arguments.full else [])):
            index = generate_lengths(folder / f"{count}.npy", count)
            results[f"planning, {count:.0e} records"] = measure_planning(index, arguments.seconds)
            del index
            (folder / f"{count}.npy").unlink()
        items = generate_records(arguments.records, 0)
        texts = (s.text for record in items for s in record.segments if isinstance(s, TextSegment))
        train_tokenizer(texts, 512, folder / "tokenizer")
        tokenizer, config = load_tokenizer(folder / "tokenizer"), make_config(folder)
        write_source(folder / "source", items, tokenizer, mixture.image_spec(config))
        for threads in (1, 2):
            with_threads = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=threads))
            results[f"loader, {threads} threads"] = measure_reading(with_threads, tokenizer, arguments.seconds)
    print_table(results)
    content = {
        "row_tokens": ROW_TOKENS,
        "row_patches": ROW_PATCHES,
        "image_max_patches": MAX_PATCHES,
        "num_data_shards": SHARDS,
        "window_size": WINDOW,
        "results": results,
    }
    write_results(arguments.out, run, content)


if __name__ == "__main__":
    main()
