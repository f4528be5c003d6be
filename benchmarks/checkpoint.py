"""What checkpoints cost: how long a save blocks the loop, which share of a run that is, and how fast digests are.

    python -m benchmarks.checkpoint [--saves=9] [--rounds=9] [--steps=760] [--out=FILE]

Blocking: the time until `Checkpointer.save` returns, for a state of about 100 MB (the model `tiny1` of
`benchmarks/train_step.py` with its moments) that a donating step renews between the saves; the first save of a run and
the median of the others. Share: `save_s` of `goodput` in a run of `experiments/quickstart.py` at its own interval,
start-up and compilation left out of the whole. Digests: one thread reads and hashes the files of such a step, from the
page cache; beside it the hash of older checkpoints. Needs an otherwise idle machine; a busy one makes all figures
worse, so what reaches its bar there does.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks.interleave import Timing
from benchmarks.results_file import describe_run, write_results
from benchmarks.train_step import make_config
from unihetero_jax import step
from unihetero_jax.checkpoint import Checkpointer, checkpoint_root, list_steps
from unihetero_jax.integrity import FILE_HASH, MANIFEST, digest_files, verify
from unihetero_jax.metrics import read_metrics
from unihetero_jax.sharding import make_mesh

BLOCKING_BAR_S, SHARE_BAR, DIGEST_BAR = 0.1, 0.01, 1e9
"""Longest median, largest share, least bytes per second of one core."""
MIN_SAVES = 5


def measure_saves(workdir: epath.Path, num_saves: int) -> dict[str, Any]:
    """Seconds that each of some saves blocks; none is under way when the next begins, as at any usual interval."""
    config = make_config("tiny1", "float32")
    abstract = step.abstract_state(config, make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape).astype(x.dtype), x.sharding), abstract
    )  # fmt: skip
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    renew = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0, out_shardings=shardings)
    position = {"position": np.zeros((config.data.num_data_shards, 2), np.int64)}
    checkpointer = Checkpointer(workdir, config)
    checkpointer.restore(abstract)  # as a run does, which then compiles and steps for longer than this
    time.sleep(2)
    seconds, whole = [], []
    for number in range(1, num_saves + 1):
        state = jax.block_until_ready(renew(state))
        start = time.perf_counter()
        checkpointer.save(number, state, position)
        seconds.append(time.perf_counter() - start)
        checkpointer.wait()
        whole.append(time.perf_counter() - start)
    checkpointer.close()
    later = Timing(tuple(seconds[1:]))
    return {
        "state_mb": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)) / 1e6,
        "arrays": len(jax.tree.leaves(abstract)), "first_s": seconds[0], "later": later.to_json(),
        "until_complete_s": float(np.median(whole[1:])), "bar_s": BLOCKING_BAR_S,
        "bar_reached": later.median <= BLOCKING_BAR_S if num_saves >= MIN_SAVES else None,
    }  # fmt: skip


def measure_digests(folder: epath.Path, rounds: int) -> dict[str, Any]:
    """Bytes per second of one core, by hash; and of `verify`, which uses them all."""
    names = [
        os.fspath(path.relative_to(folder))
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != MANIFEST
    ]
    num_bytes = sum((folder / name).stat().length for name in names)
    seconds: dict[str, list[float]] = {FILE_HASH: [], "blake2b": [], "verify": []}
    for _ in range(rounds):
        for name, times in seconds.items():
            start = time.perf_counter()
            if name == "verify":
                assert verify(folder) is None
            else:
                digest_files(folder, 1, names, hash_name=name)
            times.append(time.perf_counter() - start)
    timings = {name: Timing(tuple(times)) for name, times in seconds.items()}
    rates = {name: timing.to_json() | {"gb_per_s": num_bytes / timing.median / 1e9} for name, timing in timings.items()}
    all_cores = rates.pop("verify")
    return {
        "hash": FILE_HASH, "mb": num_bytes / 1e6, "files": len(names), "one_core": rates, "verify_all_cores": all_cores,
        "bar_gb_per_s": DIGEST_BAR / 1e9, "bar_reached": num_bytes / timings[FILE_HASH].median >= DIGEST_BAR,
    }  # fmt: skip


def measure_share(folder: Path, num_steps: int) -> dict[str, Any]:
    """A run of the quickstart as a user starts it, on a smaller world; its own account of where the time went."""
    world, workdir = folder / "world", folder / "run"
    fields = {
        "scene_world.path": world, "scene_world.num_scenes": 2000, "data.tokenizer": world / "tokenizer",
        "data.sources.qa.path": world / "qa", "data.sources.generation.path": world / "generation",
        "eval.benchmarks": {}, "eval.rollout_source": "", "train.num_steps": num_steps,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = ["train", "--config=experiments/quickstart.py", f"--workdir={workdir}", *overrides]
    subprocess.run([sys.executable, "-m", "unihetero_jax", *command], check=True, stdout=sys.stderr)
    goodput = read_metrics(workdir)[-1]["goodput"]
    share = goodput["save_s"] / (goodput["wall_s"] - goodput["start_up_s"] - goodput["compile_s"])
    return {
        "steps": num_steps, "checkpoints_left": list_steps(workdir), "goodput": goodput, "share": share,
        "bar": SHARE_BAR, "bar_reached": share <= SHARE_BAR,
    }  # fmt: skip


def print_results(results: dict[str, Any]) -> None:
    """Three lines: one for each bar."""
    saves, digests, share = results["saves"], results["digests"], results["share"]
    mark = {True: "reached", False: "missed", None: "no verdict"}
    later = saves["later"]
    print(
        f"save of {saves['state_mb']:.0f} MB blocks {1e3 * later['median_s']:.0f} ms (best "
        f"{1e3 * later['best_s']:.0f}, the first {1e3 * saves['first_s']:.0f}), complete after "
        f"{saves['until_complete_s']:.1f} s; bar {1e3 * saves['bar_s']:.0f} ms {mark[saves['bar_reached']]}"
    )
    print(
        f"digests on one core: {digests['hash']} {digests['one_core'][digests['hash']]['gb_per_s']:.2f} GB/s, blake2b "
        f"{digests['one_core']['blake2b']['gb_per_s']:.2f}; bar {digests['bar_gb_per_s']:.0f} GB/s "
        f"{mark[digests['bar_reached']]}"
    )
    if share:
        print(
            f"saving takes {share['share']:.2%} of a run of {share['steps']} steps; bar {share['bar']:.0%} "
            f"{mark[share['bar_reached']]}"
        )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=760, help="of the run; 0: none")
    parser.add_argument("--out", default="benchmarks/results/checkpoint.json")
    flags = parser.parse_args()
    run = describe_run(("jax", "orbax-checkpoint", "xxhash"))
    with tempfile.TemporaryDirectory(prefix="unihetero-") as name:
        folder = epath.Path(name)
        results: dict[str, Any] = {"saves": measure_saves(folder / "saves", flags.saves)}
        newest = checkpoint_root(folder / "saves") / str(flags.saves)
        results["digests"] = measure_digests(newest, flags.rounds)
        results["share"] = measure_share(Path(name), flags.steps) if flags.steps else None
    print_results(results)
    write_results(flags.out, run, {"results": results})


if __name__ == "__main__":
    main()
