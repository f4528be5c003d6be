"""What a step must cost: bytes over the network by theory, and the time that compute, memory and network take at least.

Network theory is that of FSDP (ZeRO-3, arXiv 1910.02054) and of tensor parallelism (Megatron-LM, arXiv 1909.08053)
for this model's layout: parameters split over `fsdp` are gathered for the forward and again for the backward pass,
gradients are summed to their owners, rows of heads and hidden units end in a sum over `tensor`. Bytes are those that
one device sends by ring algorithms, as in `hlo.py`, so the two can be compared.

The roofline (Williams et al. 2009) takes three times, each as if the other two cost nothing:

    compute  executed FLOPs / peak: model FLOPs, what rematerialisation repeats, and what attention computes
    memory   bytes that no cache can save / HBM bandwidth: optimizer state read and written once; every gathered weight
             written by the network and read by its product; inputs and outputs of each matrix product once a pass
             (what stands between two products is fused into them); logits of the text loss
    network  bytes that the compiled program sends / one-way link bandwidth of the torus dimensions that a group spans

A step that overlaps all three perfectly takes the largest. The MFU bound is model FLOPs / peak / that time: no schedule
reaches more; real ones lose overlap, small kernels and padding besides.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from unihetero_jax.config import MERGED_PATCHES, Config, MeshConfig, target_dim, visual_target
from unihetero_jax.flops import executed_flops, full_work, model_flops
from unihetero_jax.hlo import Collective
from unihetero_jax.sharding import partition_spec
from unihetero_jax.topology import Chip

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device, and the bounds that follow."""

    compute_s: float
    memory_s: float
    network_s: float
    model_flops: float
    executed_flops: float
    memory_bytes: float
    mfu_bound: float

    @property
    def bound_by(self) -> str:
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=lambda name: times[name])


def make_roofline(
    config: Config, chip: Chip, num_devices: int, backend: str, state_bytes: float, network_s: float
) -> Roofline:
    """The three times and the MFU bound.

    Args:
        config: the experiment; rows are taken as full.
        chip: its figures.
        num_devices: over which the step is spread evenly.
        backend: of attention, as `flops.executed_flops` names them.
        state_bytes: of the train state on one device.
        network_s: from `network_seconds`.
    """
    rows = config.train.global_batch_rows
    needed = model_flops(config, full_work(config, rows))["total"] / num_devices
    executed = executed_flops(config, rows, backend) / num_devices
    moved = memory_bytes(config, num_devices, state_bytes)
    times = executed / chip.peak_flops, moved / chip.hbm_bandwidth, network_s
    return Roofline(*times, needed, executed, moved, needed / chip.peak_flops / max(times))


def network_seconds(
    collectives: Sequence[Collective], chip: Chip, coordinates: Sequence[Sequence[int]] | None = None
) -> float:
    """Time of all collectives, one after another, each with the links of the torus dimensions that its groups span.

    Args:
        collectives: of the compiled step.
        chip: its links.
        coordinates: of every device of the mesh, in the mesh's order; None: every group has all links.
    """
    total = 0.0
    for item in collectives:
        share = 1.0
        if coordinates is not None and item.groups:
            group = [coordinates[i] for i in item.groups[0]]
            spanned = sum(len(set(values)) > 1 for values in zip(*group, strict=True))
            share = max(1, spanned) / chip.torus_dims
        total += item.total_sent / (chip.link_bandwidth * min(1.0, share))
    return total


def memory_bytes(config: Config, num_devices: int, state_bytes: float) -> float:
    """Bytes between HBM and the compute units in one step of one device, as the module's first lines define them."""
    model, mesh = config.model, config.mesh
    width = width_of(config)
    decoder, encoder = model.decoder, model.encoder
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    tensor = mesh.tensor
    # Elements per position and layer: each product's input read and output written.
    by_token = 4 * decoder.dim + (4 * queries + 4 * keys + 5 * decoder.mlp_dim) / tensor
    by_patch = 4 * encoder.dim + (8 * encoder.dim + 4 * encoder.mlp_dim) / tensor
    work = full_work(config, config.train.global_batch_rows)
    devices_of_rows = mesh.data * mesh.fsdp
    tokens, patches = work.tokens / devices_of_rows / mesh.context, work.patches / devices_of_rows
    passes = {name: _passes(config, name) for name in ("encoder", "decoder")}
    activations = width * (
        passes["decoder"] * tokens * decoder.num_layers * by_token
        + passes["encoder"] * patches * encoder.num_layers * by_patch
    )
    decoder_weights = decoder.num_layers * decoder.dim * (2 * queries + 2 * keys + 3 * decoder.mlp_dim)
    encoder_weights = encoder.num_layers * encoder.dim * (4 * encoder.dim + 2 * encoder.mlp_dim)
    weights = 2 * width * config.train.accumulation_steps / tensor * (
        passes["decoder"] * decoder_weights + passes["encoder"] * encoder_weights
    )  # fmt: skip
    logits = 4 * FLOAT32 * tokens * decoder.vocab_size / tensor  # written, read for the softmax, twice for gradients
    return 2 * state_bytes + weights + activations + logits


def _passes(config: Config, component: str) -> int:
    """Passes over a component's layers: forward, a repeated one if rematerialised, two of the backward; its average."""
    layers = config.model.encoder if component == "encoder" else config.model.decoder
    trains = component not in config.optimizer.frozen
    flows = trains or (component == "decoder" and not {"encoder", "projector"} <= set(config.optimizer.frozen))
    averaged = component == "encoder" and trains and _has_average(config)
    return 1 + (2 + (layers.remat == "full") if flows else 0) + averaged


def _has_average(config: Config) -> bool:
    return visual_target(config.objective) not in (None, "pixels") and config.loss.target == "ema"


def expected_traffic(
    config: Config, shapes: Mapping[str, Any], axes: Mapping[str, Any], width: int | None = None, scatters: bool = True
) -> dict[str, float]:
    """Bytes that a device sends in a step by the theory of FSDP and tensor parallelism.

    Args:
        config: the experiment; its mesh may not split positions (context).
        shapes: parameters by component: anything with a `shape`.
        axes: their logical axes.
        width: bytes of a value that travels; None: of the compute dtype. XLA widens bfloat16 to float32 on CPUs.
        scatters: gradients of split parameters are reduce-scattered; False: all-reduced and then cut, as XLA does on
            CPUs, which costs twice as much.

    Returns:
        {"gather", "gradients", "tensor", "total"}.
    """
    width = width or width_of(config)
    gather = gradients = 0.0
    for component, tree in shapes.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = jax.tree.leaves(axes[component], is_leaf=lambda x: isinstance(x, tuple))
        for (path, leaf), logical in zip(leaves, names, strict=True):
            label = f"{component}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
            gather += _gathered(config, component, label, leaf.shape, logical, width)
            if component not in config.optimizer.frozen:
                # A tied table is summed once by each of its uses: the text loss has its part at hand in the forward
                # pass, and to keep that for the lookup's would take a whole table in float32.
                uses = 2 if label == "decoder.embedding" and config.model.decoder.tied_embeddings else 1
                gradients += uses * _summed(config.mesh, label, leaf.shape, logical, width, scatters)
    steps = config.train.accumulation_steps
    tensor = _tensor_traffic(config, width)
    total = steps * (gather + gradients) + tensor
    return {"gather": steps * gather, "gradients": steps * gradients, "tensor": tensor, "total": total}


def width_of(config: Config) -> int:
    """Bytes of a value in the compute dtype."""
    return 2 if config.model.compute_dtype == "bfloat16" else FLOAT32


def _ring(size: float, devices: int) -> float:
    """Bytes sent per device by an all-gather or a reduce-scatter of `size` bytes."""
    return size * (devices - 1) / devices


def _is_table(label: str) -> bool:
    return label in ("decoder.embedding", "decoder.output")


def _gathered(
    config: Config, component: str, label: str, shape: tuple[int, ...], logical: tuple[str, ...], width: int
) -> float:
    """All-gathers of one parameter over fsdp in a forward and a backward pass."""
    spec, mesh = partition_spec(logical), config.mesh
    if "fsdp" not in spec:
        return 0.0
    size = math.prod(shape) * width / (mesh.tensor if "tensor" in spec else 1)
    frozen = set(config.optimizer.frozen)
    averaged = component in ("encoder", "projector") and component not in frozen and _has_average(config)
    passes = 1 + (averaged and (component == "encoder" or config.objective == "semantic_input"))
    # The backward pass needs a weight for the gradient of its product's input. A table looked up, or read by the text
    # loss, which takes its gradients at once, is needed once; the first product's input are pixels and coordinates.
    below = {"encoder": {"encoder"}, "projector": {"encoder", "projector"}}.get(
        component, {"encoder", "projector", "decoder"}
    )
    flows = bool(below - frozen) and not _is_table(label)
    flows = flows and not label.startswith(("encoder.patch", "encoder.position"))
    return (passes + flows) * _ring(size, mesh.fsdp)


def _summed(
    mesh: MeshConfig, label: str, shape: tuple[int, ...], logical: tuple[str, ...], width: int, scatters: bool
) -> float:
    """Sums of one parameter's gradient over the devices that saw other rows."""
    spec = partition_spec(logical)
    size = math.prod(shape) * (FLOAT32 if _is_table(label) else width) / (mesh.tensor if "tensor" in spec else 1)
    if "fsdp" not in spec:
        return 2 * _ring(size, mesh.data * mesh.fsdp)
    once = 1 if scatters or _is_table(label) else 2
    return once * _ring(size, mesh.fsdp) + 2 * _ring(size / mesh.fsdp, mesh.data)


def _tensor_traffic(config: Config, width: int) -> float:
    """All-reduces over `tensor` of activations, [positions of a device, width]: two a layer forward, two backward."""
    mesh, model = config.mesh, config.model
    if mesh.tensor == 1:
        return 0.0
    frozen = set(config.optimizer.frozen)
    devices = mesh.data * mesh.fsdp
    work = full_work(config, config.train.global_batch_rows)
    tokens, patches = work.tokens / devices / mesh.context, work.patches / devices
    visual = patches / MERGED_PATCHES
    sums = 0.0

    def layers(trains: bool, remat: str, averaged: bool) -> int:
        # Repeating a layer repeats the sum after attention; the one at its end nobody reads again.
        return 2 + (2 + (remat != "none") if trains else 0) + 2 * averaged

    averaged = _has_average(config)
    flows = bool({"encoder", "projector", "decoder"} - frozen)
    sums += layers("encoder" not in frozen, model.encoder.remat, averaged and "encoder" not in frozen) * (
        patches * model.encoder.dim * model.encoder.num_layers
    )
    sums += layers(flows, model.decoder.remat, False) * tokens * model.decoder.dim * model.decoder.num_layers
    sums += visual * (model.decoder.dim * (1 + (averaged and "projector" not in frozen)))
    sums += visual * MERGED_PATCHES * model.encoder.dim * ("encoder" not in frozen)
    sums += 2 * tokens * model.decoder.dim  # the lookup, and the text loss's gradient of the hidden states
    if visual_target(config.objective):
        sums += tokens * (target_dim(model, config.objective) + model.decoder.dim * flows)
    return 2 * _ring(sums * width, mesh.tensor)


def memory_estimate(config: Config, state_bytes: float, parameters: int, backend: str) -> dict[str, float]:
    """Bytes on one device by arithmetic, for machines that nothing here can compile for.

    A guide: what a compiler needs differs by tens of per cent.

    Counted: the state; gradients of all parameters in float32, split like them; the token table whole in the compute
    dtype and its gradient in float32; what each layer keeps for the backward pass (`full`: its input, else what its
    products read); twice the values of the widest layer in flight; logits of a chunk, three times; the mask of
    attention with a dense mask.

    Args:
        config: the experiment.
        state_bytes: of the train state on one device.
        parameters: their number.
        backend: of attention.
    """
    model, mesh, width = config.model, config.mesh, width_of(config)
    decoder, encoder = model.decoder, model.encoder
    rows = config.train.global_batch_rows / config.train.accumulation_steps / (mesh.data * mesh.fsdp)
    tokens, patches = rows * config.data.row_tokens / mesh.context, rows * config.data.row_patches
    tables = 1 if decoder.tied_embeddings else 2
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    of_token = 2 * decoder.dim + (3 * queries + 2 * keys + 3 * decoder.mlp_dim) / mesh.tensor
    of_patch = 2 * encoder.dim + (4 * encoder.dim + 2 * encoder.mlp_dim) / mesh.tensor
    kept = {"full": (decoder.dim, encoder.dim), "dots": (of_token, of_patch), "none": (of_token, of_patch)}
    terms: dict[str, float] = {
        "state": state_bytes,
        "gradients": FLOAT32 * parameters / mesh.fsdp / mesh.tensor,
        "tables": tables * (width + FLOAT32) * decoder.vocab_size * decoder.dim / mesh.tensor,
        "kept for the backward pass": width
        * (
            tokens * decoder.num_layers * kept[decoder.remat][0] + patches * encoder.num_layers * kept[encoder.remat][1]
        ),
        "one layer": 2 * width * max(tokens * of_token, patches * of_patch),
        "logits": 3 * FLOAT32 * min(config.loss.text_chunk, tokens) * decoder.vocab_size / mesh.tensor,
        "masks": 0.0
        if backend == "splash"
        else rows * (config.data.row_tokens**2 / mesh.context + config.data.row_patches**2),
    }
    return terms | {"total": float(sum(terms.values()))}
