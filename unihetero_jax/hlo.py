"""Collectives of a compiled program, read from its HLO text: what a step sends over the network, and which line asks.

`compiled.cost_analysis()` counts the body of a loop once, and a model scans its layers; so the text itself is read:
computations, who calls whom, and the trip counts of loops. The forms of the CPU, GPU and TPU compilers of the pinned
jax are understood: plain and `-start` instructions, collectives inside fusions (TPU: `async_collective_fusion`, whose
parts all name the one collective, and `all-reduce-scatter`, an all-reduce whose result is sliced at once).

Bytes are those that one device sends by the bandwidth-optimal (ring) algorithm in a group of n (Chan et al. 2007;
Thakur et al. 2005): all-gather and reduce-scatter (n-1)/n of the whole array, all-reduce twice that, all-to-all (n-1)/n
of the device's array, collective-permute the array.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program.

    Attributes:
        kind: one of `KINDS`.
        array_bytes: of the whole array: an all-gather's result, a reduce-scatter's operand, else the device's array.
        sent_bytes: that one device sends each time.
        group_size: devices that take part together.
        groups: partition ids by group, as far as the text tells; empty: all in one.
        count: times it runs in a step: the product of the trip counts around it.
        bounded: the count is an upper bound: a loop around it stops by its data.
        op_name: what the model's code calls the operation.
        shapes: result type, as in the text, without layout.
    """

    kind: str
    array_bytes: float
    sent_bytes: float
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    count: int
    bounded: bool
    op_name: str
    shapes: str

    @property
    def total_sent(self) -> float:
        return self.sent_bytes * self.count


class UnknownTripCount(ValueError):
    """A loop with collectives in it runs as often as its data say, and no bound was given."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes: the text after the opening parenthesis."""


_Computations = Mapping[str, Sequence[_Instruction]]

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_WRAPPERS = {"async-start", "call", "fusion", "conditional", "custom-call"}


def read_collectives(text: str, bounds: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of a compiled program, each with the number of times it runs.

    Args:
        text: `compiled.as_text()`.
        bounds: of loops that stop by their data: a part of the loop's `op_name`, and the most trips it can make. A loop
            that is not named may hold no collective.

    Raises:
        UnknownTripCount: naming the loop.
        ValueError: if the text is no HLO module.
    """
    computations, entry = _parse(text)
    devices = re.search(r"^HloModule .*num_partitions=(\d+)", text)
    found: list[Collective] = []
    _visit(computations, entry, 1, False, bounds or {}, found, set())
    if any(item.group_size == 0 for item in found):  # all devices together
        everyone = int(devices[1]) if devices else 1
        found = [item if item.group_size else _among(item, everyone) for item in found]
    return found


def totals_by_kind(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"sent_bytes", "runs", "instructions"}} for every kind that occurs."""
    totals: dict[str, dict[str, float]] = {}
    for item in collectives:
        entry = totals.setdefault(item.kind, {"sent_bytes": 0.0, "runs": 0, "instructions": 0})
        entry["sent_bytes"] += item.total_sent
        entry["runs"] += item.count
        entry["instructions"] += 1
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _parse(text: str) -> tuple[_Computations, str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
        elif current:  # a kernel's metadata may hold line breaks
            last = current[-1]
            current[-1] = dataclasses.replace(last, rest=f"{last.rest} {line}")
    if not entry:
        raise ValueError("no HLO module: there is no ENTRY computation")
    return computations, entry


def _visit(
    computations: _Computations,
    name: str,
    count: int,
    bounded: bool,
    bounds: Mapping[str, int],
    found: list[Collective],
    seen: set[tuple[str, str]],
) -> None:
    """Adds what a computation and those that it calls send, in a run that happens `count` times.

    `seen` holds the collectives of this and the enclosing computations: the parts of an asynchronous fusion all name
    their one collective, and parts may stand inside a loop that runs while it is under way.
    """
    seen = set(seen)
    for instruction, inside in _flat(computations, name, ""):
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # Outside of asynchronous fusions a channel tells nothing: combined collectives all have number 1.
            is_part = inside and "all-reduce-scatter" not in inside
            channel = re.search(r"channel_id=(\d+)", instruction.rest) if is_part else None
            key = (kind, channel[1] if channel else f"{inside} {instruction.name}")
            if key not in seen:
                seen.add(key)
                found.append(_collective(instruction, kind, inside, count, bounded))
        elif instruction.opcode == "while":
            called = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", instruction.rest))
            trips = _trip_count(computations, name, instruction, called)
            bound = next((most for part, most in bounds.items() if part in _op_name(instruction)), None)
            times, loose = count * ((bound or 1) if trips is None else trips), bounded or trips is None
            inner: list[Collective] = []
            for part in (called["body"], called["condition"]):
                _visit(computations, part, times, loose, bounds, inner, seen)
            if inner and trips is None and bound is None:
                raise UnknownTripCount(
                    f"loop {instruction.name} ({_op_name(instruction)}) stops by its data and holds {len(inner)} "
                    f"collectives ({inner[0].op_name}): give an upper bound on its trips"
                )
            found.extend(inner)


def _flat(computations: _Computations, name: str, inside: str) -> Iterator[tuple[_Instruction, str]]:
    """Instructions of a computation, with those of fusions, calls and branches in place; loops are left closed."""
    for instruction in computations[name]:
        yield instruction, inside
        if instruction.opcode in _WRAPPERS:
            called = _CALLED.findall(instruction.rest)
            for branches in _BRANCHES.findall(instruction.rest):
                called += re.findall(r"[\w.\-]+", branches)
            for other in dict.fromkeys(called):
                if other in computations:
                    yield from _flat(computations, other, other)


def _collective(instruction: _Instruction, kind: str, inside: str, count: int, bounded: bool) -> Collective:
    rest = instruction.rest
    arrays = [_array_bytes(*array) for array in _ARRAY.findall(instruction.shape) if array[0] in _BYTES]
    if instruction.opcode.endswith("-start"):
        arrays = _results_of_start(kind, instruction.shape, arrays)
    size = sum(arrays)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
        ids = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1])] if pairs else []
        groups = tuple(pair for pair in ids if pair[0] != pair[1])
        group_size, sent = 2, size
    else:
        groups = _replica_groups(rest)
        group_size = len(groups[0]) if groups else 0
        share = (group_size - 1) / group_size if group_size else 1.0  # without groups: see `_among`
        if kind == "all-reduce" and "all-reduce-scatter" in inside:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= max(group_size, 1)
        sent = size * share * (2 if kind == "all-reduce" else 1)
    shapes = re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", instruction.shape)
    return Collective(kind, size, sent, group_size, groups, count, bounded, _op_name(instruction), shapes)


def _among(item: Collective, devices: int) -> Collective:
    """A collective whose text names no groups: all devices take part."""
    size = item.array_bytes * (devices if item.kind == "reduce-scatter" else 1)
    sent = size * (devices - 1) / devices * (2 if item.kind == "all-reduce" else 1)
    return dataclasses.replace(item, group_size=devices, array_bytes=size, sent_bytes=sent)


def _op_name(instruction: _Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _results_of_start(kind: str, shape: str, arrays: list[float]) -> list[float]:
    """Of a `-start`'s type, (operands, results, contexts), the results."""
    if kind in ("all-reduce", "all-to-all") or not shape.startswith("("):
        return arrays  # its type is that of the results
    arrays = [size for array, size in zip(_ARRAY.findall(shape), arrays, strict=True) if array[1] or array[0] != "u32"]
    return arrays[len(arrays) // 2 :]


def _array_bytes(dtype: str, dims: str) -> float:
    return _BYTES[dtype] * math.prod(map(int, dims.split(","))) if dims else _BYTES[dtype]


def _replica_groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Groups of partition ids, from any of the three ways in which they are written.

    replica_groups={{0,1},{2,3}}
    replica_groups=[2,4]<=[4,2]T(1,0)        iota(4*2) as [4,2], transposed, as [2,4]
    replica_groups=mesh['a'=2,'b'=4] {'b'}   devices in a mesh; a group spans the named axes
    """
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = (tuple(map(int, text.split(","))) for text in match.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(tuple(map(int, match[3].split(",")))) if match[3] else ids
        return _as_groups(ids.reshape(shape))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", rest):
        return _mesh_groups(match[1], match[2], match[3])
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(f"replica groups of an unknown form: {rest[rest.index('replica_groups=') :][:120]}")
    return ()


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:  # [2,4]T(1,0): the order of an iota that was transposed
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        if order is None:
            raise ValueError(f"replica groups of an unknown form: device_ids=({device_ids})")
        dims = tuple(map(int, order[1].split(",")))
        ids = ids.reshape(dims).transpose(tuple(map(int, order[2].split(","))) if order[2] else None)
    parts: list[tuple[int, bool]] = []
    wanted = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes.items():
        if name not in wanted:
            parts.append((size, False))
        elif wanted[name][0]:  # a part of an axis: 'a':(before)size
            before, inner = int(wanted[name][0]), int(wanted[name][1])
            parts += [(before, False), (inner, True), (size // before // inner, False)]
        else:
            parts.append((size, True))
    ids = ids.reshape([size for size, _ in parts])
    outer = [i for i, (_, chosen) in enumerate(parts) if not chosen]
    inner_dims = [i for i, (_, chosen) in enumerate(parts) if chosen]
    group_size = math.prod(parts[i][0] for i in inner_dims)
    return _as_groups(ids.transpose(outer + inner_dims).reshape(-1, group_size))


def _as_groups(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in group) for group in ids)


def _trip_count(computations: _Computations, caller: str, loop: _Instruction, called: Mapping[str, str]) -> int | None:
    """How often a loop runs: as the compiler noted it, or from `i < n` with constant start, step and n; else None."""
    if match := re.search(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.rest):
        return int(match[1])
    compared = _comparison(computations, called["condition"])
    if compared is None:
        return None
    index, limit, direction = compared
    initial = _initial_values(computations[caller], loop)
    first = initial(index)
    last = initial(limit[1]) if isinstance(limit, tuple) else limit
    step = _step(computations, called["body"], index)
    if first is None or last is None or step is None or step <= 0 or direction not in ("LT", "LE", "NE"):
        return None
    return max(0, -(-(last + (direction == "LE") - first) // step))


def _comparison(computations: _Computations, condition: str) -> tuple[int, int | tuple[str, int], str] | None:
    """(element i, limit, direction) of a condition `element i < limit`; a limit ("element", k) is loop-carried."""
    for instruction, _ in _flat(computations, condition, ""):
        direction = re.search(r"direction=([A-Z]+)", instruction.rest)
        if instruction.opcode != "compare" or not direction:
            continue
        sides = [_resolve(computations, condition, name) for name in _operands(instruction)[:2]]
        match sides:
            case [("element", int(index)), ("constant", int(limit))]:
                return index, limit, direction[1]
            case [("element", int(index)), ("element", int(other))]:
                return index, ("element", other), direction[1]
    return None


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition("), ")[0])


def _resolve(computations: _Computations, scope: str, name: str) -> tuple[str, int] | None:
    """What a value in a condition or body is: ("constant", value) or ("element", i of the loop's tuple)."""
    by_name = {i.name: (i, scope) for i in computations[scope]}
    callers: dict[str, _Instruction] = {}
    for instruction in computations[scope]:  # a comparison may stand in a fusion: its parameters are our operands
        if instruction.opcode in _WRAPPERS:
            for other in _CALLED.findall(instruction.rest):
                for member in computations.get(other, ()):
                    by_name.setdefault(member.name, (member, other))
                callers[other] = instruction
    for _ in range(20):
        if name not in by_name:
            return None
        instruction, home = by_name[name]
        match instruction.opcode:
            case "constant":
                value = re.match(r"(-?\d+)\)", instruction.rest)
                return ("constant", int(value[1])) if value else None
            case "get-tuple-element":
                index = re.search(r"index=(\d+)", instruction.rest)
                return ("element", int(index[1])) if index else None
            case "parameter" if home in callers:
                name = _operands(callers[home])[int(instruction.rest.partition(")")[0])]
            case "copy" | "bitcast" | "convert":
                name = _operands(instruction)[0]
            case _:
                return None
    return None


def _initial_values(caller: Sequence[_Instruction], loop: _Instruction):
    """A function: element of the loop's tuple -> its constant value at the start, or None."""
    by_name = {instruction.name: instruction for instruction in caller}
    tuples = [by_name[name] for name in _operands(loop)[:1] if name in by_name]

    def value(index: int) -> int | None:
        names = _operands(tuples[0]) if tuples and tuples[0].opcode == "tuple" else []
        instruction = by_name.get(names[index]) if index < len(names) else None
        for _ in range(20):
            if instruction is None:
                return None
            if instruction.opcode == "constant":
                found = re.match(r"(-?\d+)\)", instruction.rest)
                return int(found[1]) if found else None
            if instruction.opcode not in ("copy", "bitcast", "convert"):
                return None
            instruction = by_name.get(_operands(instruction)[0])
        return None

    return value


def _step(computations: _Computations, body: str, index: int) -> int | None:
    """What a loop's body adds to element `index`, if that is a constant; 1 where the addition is inside a fusion."""
    by_name = {instruction.name: instruction for instruction in computations[body]}
    root = computations[body][-1]
    names = _operands(root) if root.opcode == "tuple" else []
    instruction = by_name.get(names[index]) if index < len(names) else None
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = by_name.get(_operands(instruction)[0])
    if instruction is None:
        return None
    if instruction.opcode == "fusion":
        called = _CALLED.findall(instruction.rest)
        inner = computations[called[0]] if called and called[0] in computations else []
        constants = [i for i in inner if i.opcode == "constant"]
        adds = [i for i in inner if i.opcode == "add"]
        values = [re.match(r"(-?\d+)\)", i.rest) for i in constants]
        return int(values[0][1]) if len(adds) == 1 and len(values) == 1 and values[0] else None
    if instruction.opcode != "add":
        return None
    sides = [_resolve(computations, body, name) for name in _operands(instruction)[:2]]
    if ("element", index) in sides:
        other = sides[1 - sides.index(("element", index))]
        return other[1] if other and other[0] == "constant" else None
    return None


def by_operation(collectives: Sequence[Collective], limit: int) -> list[tuple[str, str, str, float, int]]:
    """(kind, op_name, shapes, bytes sent in a step, runs), the largest `limit`: which line of the model asks."""
    groups: dict[tuple[str, str, str], list[Collective]] = collections.defaultdict(list)
    for item in collectives:
        groups[item.kind, item.op_name, item.shapes].append(item)
    rows = [(*key, sum(i.total_sent for i in items), sum(i.count for i in items)) for key, items in groups.items()]
    return list(itertools.islice(sorted(rows, key=lambda row: -row[3]), limit))
