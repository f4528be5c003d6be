"""How large a model is best for a budget, and does generation move that?

Command: `python -m unihetero_jax sweep --sweep=experiments/sweeps/model_scaling.py:scenes --workdir=runs/sizes`, after
`python -m experiments.scene_encoder`.
Expected: nothing is claimed beforehand; it was not run at the scenes scale yet.

IsoFLOP curves (arXiv 2203.15556, approach 2): for each budget of training, decoders of several widths, each with as
many steps as the budget allows and a complete schedule of its own, all with one learning rate. The page has the vertex
of each curve. Scales: `smoke`, `scenes`, `accelerator`.
"""

from collections.abc import Iterator
from typing import Any

from experiments.sweeps.scales import BASE, METRIC, SEEDS, check_scale, groups, large_world, schedule
from unihetero_jax.command_line import load_experiment, with_overrides
from unihetero_jax.sweep_plan import run_flops, text_of

__all__ = ["BASE", "PROTOCOL", "sweep"]
WIDTHS = (32, 64, 96, 128, 192)
BUDGETS = {"smoke": (60,), "scenes": (500, 1000, 2000), "accelerator": (4000, 16_000, 64_000)}
"""In GFLOP of one model's training; `scene_claims` takes some 1,500."""
OBJECTIVES = ("understanding_i2t", "semantic_input")
PROTOCOL: dict[str, Any] = {
    "metric": METRIC,
    "margin": 0.02,
    "num_seeds": 8,
    "matching": "flops",
    "contrasts": {},
}


def sweep(scale: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Widths at every budget, for each group of seeds in turn."""
    check_scale("model_scaling", scale, SEEDS)
    world = large_world() if scale == "accelerator" else {}
    for seeds in groups(SEEDS[scale]):
        for budget in BUDGETS[scale]:
            for width in WIDTHS:
                for objective in OBJECTIVES:
                    own = _decoder(width) | {"objective": objective}
                    yield f"{objective}@{budget}GFLOP-d{width}", world | schedule(_steps(own, budget)) | seeds | own


def _decoder(width: int) -> dict[str, Any]:
    sizes = {"dim": width, "num_heads": width // 32, "mlp_dim": 2 * width}
    return {f"model.decoder.{name}": size for name, size in sizes.items()}


def _steps(own: dict[str, Any], budget: int) -> int:
    one_step = [f"{path}={text_of(value)}" for path, value in (own | schedule(1)).items()]
    return max(1, round(budget * 1e9 / run_flops(with_overrides(load_experiment(BASE), one_step))))
