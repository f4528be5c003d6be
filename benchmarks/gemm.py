"""The matrix-product rate of both libraries: what share of it a train step reaches says how much is left to gain.

python -m benchmarks.gemm jax float32       # a worker of benchmarks/interleave.py
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.interleave import serve

SIDE = 1024
FLOPS_PER_CALL = 2 * SIDE**3


def make_jax(dtype: str) -> Callable[[int], float]:
    """Square products under `jax.jit`."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (SIDE, SIDE)).astype(jnp.dtype(dtype)) for key in keys)
    multiply = jax.jit(jnp.matmul)

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = multiply(left, right)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return run


def make_torch(dtype: str) -> Callable[[int], float]:
    """Square products by `torch.matmul` into a buffer."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    left, right = (torch.randn(SIDE, SIDE).to(getattr(torch, dtype)) for _ in range(2))
    result = torch.empty_like(left)

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.matmul(left, right, out=result)
        return time.perf_counter() - start

    return run


def main(library: str, dtype: str) -> None:
    """Warms up and serves."""
    run: Any = {"jax": make_jax, "torch": make_torch}[library](dtype)
    run(5)
    serve(run, {"gflop_per_call": FLOPS_PER_CALL / 1e9})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
