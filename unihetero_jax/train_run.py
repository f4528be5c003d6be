"""`train`: what a whole run is: its scene world, its training, and its evaluation along the way and at the end."""

import functools
import sys
from collections.abc import Callable, Sequence

from data_pipelines.scene_world import ensure_index, ensure_scene_world
from unihetero_jax import distributed
from unihetero_jax.config import Config
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.evaluate_run import check_evaluation, evaluate_state
from unihetero_jax.state import TrainState
from unihetero_jax.train import Hook, Interrupted, agree_on_run, train
from unihetero_jax.workdir import prepare_workdir


def run_training(
    config: Config,
    workdir: str,
    hooks: Sequence[Hook] = (),
    change_mixture: bool = False,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Makes the scene world if it is missing, trains, and evaluates the end state on the configured benchmarks."""
    agree_on_run(config, workdir, change_mixture)
    prepare_workdir(workdir)  # before minutes go into a scene world
    world = config.scene_world
    if world.level != "none":
        make = functools.partial(make_scene_world, config)
        distributed.lead_first("scene-world", make, make)
    check_evaluation(config)
    evaluate_now = functools.partial(evaluate_state, config, workdir)
    if every := config.eval.every_steps:

        def evaluate_sometimes(step: int, state: TrainState) -> None:
            if step % every == 0 and step < config.train.num_steps:
                evaluate_now(state, step)

        hooks = [*hooks, evaluate_sometimes]
    return train(config, workdir, hooks, evaluate_now, change_mixture, profile)


def make_scene_world(config: Config) -> None:
    """Generates the configured scene world, and the index for its layout of turns, unless they are there."""
    world, spec = config.scene_world, image_spec(config)
    assert world.level != "none"
    ensure_scene_world(
        world.path, world.level, world.num_scenes, spec, config.model.decoder.vocab_size, world.seed,
        world.items_per_kind, world.with_objects,
    )  # fmt: skip
    if config.data.turns != "branches":  # of branches it comes with one
        ensure_index(world.path, spec, config.data.turns, world.with_objects)


def exit_code(work: Callable[[], object]) -> int:
    """Does the work of a program beside the command line, and says with what it ends.

    Returns:
        0; 2 after the message of what the user has to change; 128 + the signal's number of a run that was stopped and
        has saved.
    """
    try:
        work()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
