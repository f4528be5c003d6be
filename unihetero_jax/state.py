"""TrainState: everything that training changes, as one tree that is sharded, donated and checkpointed as a whole."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from unihetero_jax import optim
from unihetero_jax.arrays import pytree_dataclass
from unihetero_jax.config import Config, pixel_role, visual_target
from unihetero_jax.sharding import shardings_for

_PIXELS = "pixel_decoder"


@pytree_dataclass
class TrainState:
    """The state after `step` steps. With replicates every array has a leading replicate axis.

    Attributes:
        step: steps taken, skipped ones included.
        params: parameters by component.
        ema: averages of components, by `ema_components`: those that give the visual targets (unless the online ones
            do), and the pixel decoder that draws.
        opt_state: moments of the trainable components.
        skipped: steps whose gradient was not finite and that changed nothing.
        consecutive_skips: of those, how many in a row up to now.
    """

    step: Int[Array, "*r"]
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: Any
    skipped: Int[Array, "*r"]
    consecutive_skips: Int[Array, "*r"]


def ema_components(config: Config) -> tuple[str, ...]:
    """The components whose averages the state holds."""
    draws = pixel_role(config.objective) and config.loss.pixel_ema_decay and _PIXELS not in config.optimizer.frozen
    return (*target_components(config), *((_PIXELS,) if draws else ()))


def target_components(config: Config) -> tuple[str, ...]:
    """The components kept beside the trained ones for the targets: of the moving average, the projector, and the
    encoder if it trains; for random targets, an encoder that stays as it was drawn.

    An average of the projector alone over a trainable encoder collapses (see the design), so the encoder is always in
    it unless frozen; a frozen component equals its own average.
    """
    target = visual_target(config.objective)
    if target == "random":
        return ("encoder",)
    if target in (None, "pixels") or config.loss.target != "ema":
        return ()
    needed = ("encoder", "projector") if target == "input" else ("encoder",)
    return tuple(name for name in needed if name not in config.optimizer.frozen)


def fixed_targets(config: Config) -> tuple[str, ...]:
    """Of the components kept for targets, those that stay as they were drawn, whatever the run does or starts from."""
    return target_components(config) if visual_target(config.objective) == "random" else ()


def averages_of_targets(ema: dict[str, Any]) -> dict[str, Any]:
    """Those of the averages that the visual targets come from."""
    return {name: tree for name, tree in ema.items() if name != _PIXELS}


def params_in_use(params: dict[str, Any], ema: dict[str, Any]) -> dict[str, Any]:
    """Parameters as they are evaluated: the trained ones, but of a pixel decoder its average, if there is one."""
    return params | {name: tree for name, tree in ema.items() if name == _PIXELS}


def create_state(
    config: Config, params: dict[str, Any], optimizer: optax.GradientTransformation, random_encoder: Any = None
) -> TrainState:
    """A state at step 0 over these parameters; `random_encoder` gives random targets, for an objective with such."""
    zero = jnp.zeros((), jnp.int32)
    start = params if random_encoder is None else params | {"encoder": random_encoder}
    averaged = {name: jax.tree.map(jnp.copy, start[name]) for name in ema_components(config)}
    moments = optimizer.init(optim.trainable(params, config.optimizer.frozen))
    return TrainState(zero, params, averaged, moments, zero, zero)


def state_shardings(config: Config, abstract: TrainState, axes: dict[str, Any], mesh: Mesh) -> TrainState:
    """Shardings of a state: moments and averages lie like the parameters they belong to, counters on every device.

    Args:
        config: the experiment.
        abstract: shapes of the state.
        axes: logical axes of the parameters, in their structure.
        mesh: where it shall live.
    """
    replicates = config.train.num_replicates > 1
    params = shardings_for(axes, mesh, replicates)
    scalar = NamedSharding(mesh, PartitionSpec("data") if replicates else PartitionSpec())
    moments = optax.tree.map_params(
        optim.make_optimizer(config),
        lambda _, sharding: sharding,
        abstract.opt_state,
        optim.trainable(params, config.optimizer.frozen),
        transform_non_params=lambda _: scalar,
    )
    averaged = {name: params[name] for name in abstract.ema}
    shardings: Any = (scalar, params, averaged, moments, scalar, scalar)
    return TrainState(*shardings)


def update_ema(config: Config, ema: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """`ema <- decay * ema + (1 - decay) * params` for the averaged components; a random encoder stays as it is."""
    fixed, decays = fixed_targets(config), {_PIXELS: config.loss.pixel_ema_decay}
    return {
        name: tree if name in fixed else _moved(tree, params[name], decays.get(name, config.loss.ema_decay))
        for name, tree in ema.items()
    }


def _moved(average: Any, value: Any, decay: float) -> Any:
    return jax.tree.map(lambda a, v: a + (1 - decay) * (v - a), average, value)
