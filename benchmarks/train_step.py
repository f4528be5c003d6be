"""Our train step against PyTorch: same shapes, parameter count, batch and optimizer, interleaved in one run.

    python -m benchmarks.train_step [--configs=tiny1,100m1] [--rounds=9] [--arms=...] [--out=FILE]

Objective `understanding`: the reference has no visual loss. One row of T=512 holds two images (64 visual tokens each,
from 16 x 16 patches) and text; AdamW, clipping at norm 1. Speed is row positions per second, padding none. Beside it
runs a 1024^3 matrix product of both libraries; `share` is the step's model FLOPs per second over that rate, same
library and dtype. Needs an otherwise idle machine; CPU only.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.interleave import REJECT_ABOVE, Timing, Worker, interleaved, serve
from benchmarks.results_file import describe_run, write_results
from experiments import base
from unihetero_jax import flops
from unihetero_jax.config import Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.packing import ImagePiece, PackedSample, TokenPiece, assemble_row, stack_rows

ROW_TOKENS, IMAGE_SIDE, PATCH, NUM_IMAGES = 512, 256, 16, 2
PATCHES = (IMAGE_SIDE // PATCH) ** 2
PAD, BOI, EOI, FIRST_TOKEN = 0, 1, 2, 3

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny1": {
        "encoder": {"num_layers": 6, "dim": 192, "num_heads": 3, "mlp_dim": 768},
        "projector": {"hidden_dim": 192},
        "decoder": {
            "num_layers": 8, "dim": 256, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 688,
            "vocab_size": 8192,
        },
    },
    "100m1": {
        "encoder": {"num_layers": 12, "dim": 384, "num_heads": 6, "mlp_dim": 1536},
        "projector": {"hidden_dim": 448},
        "decoder": {
            "num_layers": 12, "dim": 640, "num_heads": 10, "num_kv_heads": 5, "head_dim": 64, "mlp_dim": 1728,
            "vocab_size": 32768,
        },
    },
}  # fmt: skip
STEPS_PER_ROUND = {"tiny1": 12, "100m1": 4}
GEMMS_PER_ROUND = 60

STEP_ARMS = {
    "jax f32": ("jax", "float32", False),
    "jax bf16": ("jax", "bfloat16", False),
    "torch eager f32": ("torch", "float32", False),
    "torch compile f32": ("torch", "float32", True),
    "torch eager bf16": ("torch", "bfloat16", False),
    "torch compile bf16": ("torch", "bfloat16", True),
}
"""Arm -> library, dtype of compute (parameters are float32), through torch.compile."""

MIN_ROUNDS = 9
"""Fewer give no verdict."""

BARS = {"tiny1": 1.0, "100m1": 1.2}
"""Least ratio of `jax f32` to the fastest float32 arm of PyTorch."""


def make_config(name: str, dtype: str) -> Config:
    """The experiment of a size; everything that is not a shape is the project's default."""
    config: Any = base.get_config()
    config.objective = "understanding"
    for component, fields in MODELS[name].items():
        config.model[component].update(fields)
    config.model.encoder.update({"patch_size": PATCH, "position_grid": IMAGE_SIDE // PATCH})
    config.model.decoder.update({"qk_norm": False, "max_grid": PATCHES // 4})
    config.model.compute_dtype = dtype
    row_patches = NUM_IMAGES * PATCHES
    config.data.update({"row_tokens": ROW_TOKENS, "row_patches": row_patches, "num_data_shards": 1})
    config.data.update({"image_min_patches": PATCHES, "image_max_patches": PATCHES})
    config.data.sources = {"row": {"path": "generated", "weight": 1.0, "augment": "none"}}
    config.train.global_batch_rows = 1
    config.eval.batch_rows = 1
    valid = from_config_dict(config)
    # Only square images come, and PyTorch's model has no embedding of their grid: no longer ones than they need.
    decoder = dataclasses.replace(valid.model.decoder, max_grid=IMAGE_SIDE // PATCH // 2)
    return dataclasses.replace(valid, model=dataclasses.replace(valid.model, decoder=decoder))


def make_row(vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A full row, the same for every arm.

    Returns:
        Tokens int[T] (the last id at visual positions), supervised bool[T], images uint8[n, side, side, 3].
    """
    rng = np.random.default_rng(0)
    visual_tokens = PATCHES // 4
    image = [BOI, *[vocab_size - 1] * visual_tokens, EOI]
    num_text = ROW_TOKENS - NUM_IMAGES * len(image)
    tokens = np.array([*image * NUM_IMAGES, *rng.integers(FIRST_TOKEN, vocab_size - 1, num_text)], np.int32)
    supervised = np.arange(ROW_TOKENS) >= ROW_TOKENS - num_text
    images = rng.integers(0, 256, (NUM_IMAGES, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    return tokens, supervised, images


def make_arrays(vocab_size: int) -> dict[str, np.ndarray]:
    """The row as this project packs it: the fields of `Batch`, one row."""
    tokens, supervised, images = make_row(vocab_size)
    pieces: list[TokenPiece | ImagePiece] = []
    for image in images:
        pieces += [TokenPiece([BOI]), ImagePiece(image), TokenPiece([EOI])]
    pieces.append(TokenPiece(tokens[supervised].tolist(), True))
    row_patches = NUM_IMAGES * PATCHES
    row = assemble_row([PackedSample(pieces, 0, 1)], ROW_TOKENS, row_patches, PATCH, PAD)
    assert (row["segment_ids"] > 0).all() and (row["text_loss_mask"] == supervised).all()
    return stack_rows([row])


def make_jax_run(config: Config, arrays: dict[str, np.ndarray]) -> tuple[Callable[[int], float], dict[str, Any]]:
    """The project's own compiled train step on one device, on rows that stay the same."""
    import jax

    from unihetero_jax import sharding, step

    mesh = sharding.make_mesh(config.mesh)
    state = step.init_state(config, mesh)
    train_step = step.compile_train_step(config, mesh)
    batch = sharding.to_global(arrays, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    state, metrics = train_step(state, batch)
    first_loss = float(metrics.loss)

    def run(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, _ = train_step(state, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    return run, {"parameters": parameters, "first_loss": first_loss, "jax": jax.__version__}


def serve_arm(name: str, arm: str) -> None:
    """A worker process: builds, warms up, answers."""
    library, dtype, compiled = STEP_ARMS[arm]
    started = time.perf_counter()
    if library == "jax":
        config = make_config(name, dtype)
        run, facts = make_jax_run(config, make_arrays(config.model.decoder.vocab_size))
    else:
        from benchmarks import torch_reference

        model = make_config(name, dtype).model
        run, facts = torch_reference.make_run(model, *make_row(model.decoder.vocab_size), compiled, dtype)
    run(2)
    serve(run, facts | {"start_s": time.perf_counter() - started})


def measure(name: str, arms: Sequence[str], rounds: int) -> dict[str, Any]:
    """All arms of one size and the GEMM calibration, interleaved."""
    libraries = sorted({STEP_ARMS[arm][:2] for arm in arms})
    workers: list[Worker] = []
    try:
        for arm in arms:
            say(f"{name}: starting {arm}")
            command = ["benchmarks.train_step", f"--worker={arm}", f"--configs={name}"]
            workers.append(Worker(arm, command, STEPS_PER_ROUND[name]))
        for library, dtype in libraries:
            workers.append(Worker(gemm_name(library, dtype), ["benchmarks.gemm", library, dtype], GEMMS_PER_ROUND))
        facts = {worker.name: worker.facts for worker in workers}
        check_parameters({arm: facts[arm]["parameters"] for arm in arms})
        load_before = os.getloadavg()
        timings = interleaved(workers, rounds, lambda text: say(f"{name}: {text}"))
    finally:
        for worker in workers:
            worker.close()
    results = summarise(name, arms, timings, facts)
    return (
        results
        | _ratio(name, results["arms"], rounds)
        | {
            "rounds": rounds,
            "steps_per_round": STEPS_PER_ROUND[name],
            "load_average": {"before": load_before, "after": os.getloadavg()},
        }
    )


def gemm_name(library: str, dtype: str) -> str:
    """Name of a calibration worker."""
    return f"gemm {library} {dtype}"


def check_parameters(counts: Mapping[str, int]) -> None:
    """Refuses to compare models that differ by 0.1% or more."""
    spread = max(counts.values()) / min(counts.values()) - 1
    say("parameters: " + ", ".join(f"{arm} {count:,}" for arm, count in counts.items()) + f" (spread {spread:.3%})")
    assert spread < 1e-3, f"the arms are different models: {dict(counts)}"


def summarise(
    name: str, arms: Sequence[str], timings: Mapping[str, Timing], facts: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Figures of every arm and of the calibration."""
    config = make_config(name, "float32")
    work = flops.count_work(config, make_arrays(config.model.decoder.vocab_size))
    gflop = flops.model_flops(config, work)["total"] / 1e9
    rates = {
        worker: facts[worker]["gflop_per_call"] / timing.median
        for worker, timing in timings.items()
        if worker.startswith("gemm ")
    }
    results = {}
    for arm in arms:
        timing = timings[arm]
        rate = rates[gemm_name(*STEP_ARMS[arm][:2])]
        results[arm] = timing.to_json() | facts[arm] | {
            "tokens_per_s": ROW_TOKENS / timing.median,
            "best_tokens_per_s": ROW_TOKENS / timing.best,
            "gflop_per_s": gflop / timing.median,
            "share_of_gemm": gflop / timing.median / rate,
        }  # fmt: skip
    calibration = {
        worker: timings[worker].to_json()
        | {"gflop_per_s": rate, "best_gflop_per_s": facts[worker]["gflop_per_call"] / timings[worker].best}
        for worker, rate in rates.items()
    }
    return {"config": name, "gflop_per_step": gflop, "arms": results, "gemm": calibration}


def _ratio(name: str, results: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, Any]:
    """Our float32 step against PyTorch's fastest float32 arm; None where that would be no fair comparison."""
    rivals = [arm for arm in results if arm.startswith("torch") and arm.endswith("f32")]
    ratio, rival = None, None
    if rivals and "jax f32" in results:
        rival = max(rivals, key=lambda arm: results[arm]["tokens_per_s"])
        if rounds >= MIN_ROUNDS and not any(results[arm]["rejected"] for arm in ("jax f32", *rivals)):
            ratio = results["jax f32"]["tokens_per_s"] / results[rival]["tokens_per_s"]
    return {
        "bar": BARS[name],
        "rival": rival,
        "ratio": ratio,
        "bar_reached": None if ratio is None else ratio >= BARS[name],
    }


def print_table(result: Mapping[str, Any]) -> None:
    """The table that goes into a report."""
    print(f"\n{result['config']}: {result['gflop_per_step']:.1f} GFLOP/step, {result['rounds']} rounds")
    print(f"{'arm':<20}{'tokens/s':>10}{'best':>10}{'vs eager f32':>14}{'GFLOP/s':>10}{'share':>8}  median/best")
    eager = result["arms"].get("torch eager f32")
    for arm, figures in result["arms"].items():
        against = f"{figures['tokens_per_s'] / eager['tokens_per_s']:.2f}" if eager else "-"
        disturbed = "  REJECTED: the machine was not quiet" if figures["rejected"] else ""
        print(
            f"{arm:<20}{figures['tokens_per_s']:>10.0f}{figures['best_tokens_per_s']:>10.0f}{against:>14}"
            f"{figures['gflop_per_s']:>10.1f}{figures['share_of_gemm']:>8.0%}"
            f"  {figures['median_s'] / figures['best_s']:.2f}{disturbed}"
        )
    for worker, figures in result["gemm"].items():
        disturbed = "  REJECTED" if figures["rejected"] else ""
        print(
            f"{worker:<20}{'':>34}{figures['gflop_per_s']:>10.1f}  (best {figures['best_gflop_per_s']:.1f}){disturbed}"
        )
    before, after = (load[0] for load in result["load_average"].values())
    print(f"load average {before:.2f} before, {after:.2f} after")
    if result["ratio"] is None:
        print(
            f"no verdict on the bar of {result['bar']}x: a float32 arm is missing, its median/best "
            f"exceeds {REJECT_ABOVE}, or there were fewer than {MIN_ROUNDS} rounds"
        )
    else:
        verdict = "reached" if result["bar_reached"] else "missed"
        print(f"jax f32 / {result['rival']} = {result['ratio']:.2f}x; bar {result['bar']}x {verdict}")


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=",".join(MODELS), help="sizes, separated by commas")
    parser.add_argument("--arms", default=",".join(STEP_ARMS), help="arms, separated by commas")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--out", default="benchmarks/results/train_step.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve_arm(flags.configs, flags.worker)
        return
    names, arms = flags.configs.split(","), flags.arms.split(",")
    for kind, chosen, known in (("--configs", names, MODELS), ("--arms", arms, STEP_ARMS)):
        unknown = [item for item in chosen if item not in known]
        if unknown:
            parser.error(f"{kind}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    run = describe_run(("jax", "jaxlib", "flax", "optax", "torch", "transformers"))
    results = [measure(name, arms, flags.rounds) for name in names]
    for result in results:
        print_table(result)
    write_results(flags.out, run, {"results": results})


if __name__ == "__main__":
    main()
