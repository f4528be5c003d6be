"""Decoding and resizing JPEGs: the loader against torch DataLoader + webdataset, on the same files, in turn.

    python -m benchmarks.decode [--rounds=9] [--images=2000] [--out=benchmarks/results/decode.json]

Images of 500 x 375 pixels, decoded by Pillow and resized bilinearly with antialias to 256 x 192 (12 x 16 patches of 16
pixels) in both arms, each with as many threads (ours) or worker processes (torch) as there are cores. Our arm makes
whole rows of it: reads the record, tokenizes the caption, cuts patches, packs, hashes. The other stops at a batch of
pixels. Needs torch and webdataset: `pip install torch webdataset`.
"""

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.interleave import Timing, Worker, interleaved, serve
from benchmarks.results_file import describe_run, write_results

HEIGHT, WIDTH, PATCH = 375, 500, 16
TARGET = (192, 256)
"""What `records.image_grid` makes of the size with 192 patches of 16 pixels."""
SAMPLES_PER_CALL = 256
ROWS = 8


def write_images(folder: Path, count: int) -> None:
    """The same pictures as a WebDataset tar and as a prepared folder with its tokenizer."""
    from data_pipelines.webdataset import WebdatasetOptions, read_webdataset
    from data_pipelines.writer import write_prepared
    from unihetero_jax.data.records import ImageSpec
    from unihetero_jax.data.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            picture = io.BytesIO()
            coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=90)
            for name, data in (("jpg", picture.getvalue()), ("txt", f"picture number {number}".encode())):
                member = tarfile.TarInfo(f"{number:09d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    tokenizer = train_tokenizer([f"picture number {n}" for n in range(500)], 300, folder / "tokenizer")
    samples = read_webdataset([folder / "00000.tar"], WebdatasetOptions("bench"))
    num_patches = TARGET[0] * TARGET[1] // PATCH**2
    write_prepared(samples, folder / "prepared", source="bench", tokenizer=tokenizer,
                   spec=ImageSpec(PATCH, num_patches, num_patches), licence="none")  # fmt: skip


def our_samples(folder: Path, threads: int) -> Callable[[int], float]:
    """Seconds for a number of calls, each of `SAMPLES_PER_CALL` samples from our loader."""
    from experiments import base
    from unihetero_jax.config_reading import from_config_dict
    from unihetero_jax.data.mixture import make_train_iterator
    from unihetero_jax.data.tokenizer import load_tokenizer

    num_patches = TARGET[0] * TARGET[1] // PATCH**2
    config = base.get_config()
    config.update_from_flattened_dict({
        "data.sources": {"bench": {"path": str(folder / "prepared"), "weight": 1.0, "augment": "none"}},
        "data.tokenizer": str(folder / "tokenizer"), "model.encoder.patch_size": PATCH, "data.row_tokens": 512,
        "data.row_patches": 8 * num_patches, "data.image_min_patches": num_patches,
        "data.image_max_patches": num_patches, "data.num_threads": threads, "train.global_batch_rows": ROWS,
    })  # fmt: skip
    stream = make_train_iterator(from_config_dict(config), load_tokenizer(folder / "tokenizer"))

    def run(calls: int) -> float:
        seen, start = 0, time.perf_counter()
        while seen < calls * SAMPLES_PER_CALL:
            seen += len(next(stream).sample_ids)
        return (time.perf_counter() - start) * calls * SAMPLES_PER_CALL / seen  # rows hold what they hold

    return run


def torch_samples(folder: Path, workers: int) -> Callable[[int], float]:
    """The same from webdataset in a torch DataLoader."""
    import torch
    from webdataset.compat import WebDataset

    def decode(sample: dict) -> tuple[np.ndarray, str]:
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            pixels = image.convert("RGB").resize((TARGET[1], TARGET[0]), Image.Resampling.BILINEAR)
        return np.asarray(pixels), sample["txt"].decode()

    shards = [str(folder / "00000.tar")] * workers
    dataset: Any = WebDataset(shards, shardshuffle=False, empty_check=False)
    dataset = dataset.repeat().map(decode).batched(32)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4)
    stream = iter(loader)

    def run(calls: int) -> float:
        seen, start = 0, time.perf_counter()
        while seen < calls * SAMPLES_PER_CALL:
            seen += len(next(stream)[1])
        return (time.perf_counter() - start) * calls * SAMPLES_PER_CALL / seen

    return run


ARMS = {"ours": our_samples, "torch": torch_samples}


def _work(arm: str, folder: Path, parallel: int) -> None:
    run = ARMS[arm](folder, parallel)
    run(1)
    serve(run, {"arm": arm})


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", default="benchmarks/results/decode.json")
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        _work(flags.worker[0], Path(flags.worker[1]), int(flags.worker[2]))
        return
    run, parallel = describe_run(("pillow", "torch", "webdataset", "grain")), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), flags.images)
        workers = [Worker(arm, ["benchmarks.decode", "--worker", arm, name, str(parallel)], 6) for arm in ARMS]
        timings = interleaved(workers, flags.rounds, lambda line: print(line, file=sys.stderr))
        for worker in workers:
            worker.close()
    ratio = timings["torch"].median / timings["ours"].median
    print_table(timings, ratio)
    arms = {arm: timing.to_json() for arm, timing in timings.items()}
    write_results(flags.out, run, {"parallel": parallel, "ratio": ratio, "arms": arms})


def print_table(timings: dict[str, Timing], ratio: float) -> None:
    """A line for each arm, and our gain."""
    for arm, timing in timings.items():
        note = "  REJECTED: the machine was not quiet" if timing.is_rejected else ""
        print(f"{arm:8}{SAMPLES_PER_CALL / timing.median:>10,.0f} samples/s{note}")
    print(f"ratio {ratio:.2f}x")


if __name__ == "__main__":
    main()
