"""Questions about scenes with exact answers, made so that guessing without the picture does not pay.

For every type but count, answers are uniform given the question's words and the options: distractors are drawn
uniformly from what the answer itself could have been, and held-out pairs are never offered in an ordinary question
(who knows that they never occur could strike them out).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.scenes import COLORS, HELD_OUT, LOCATIONS, SHAPES, Scene, SceneObject

RELATIONS = ("left", "right", "above", "below")
MIN_OFFSET = 8.0
"""Pixels by which objects must differ along the axis of a relation."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its options; `answer` is one of them."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...]


def make_question(kind: str, scene: Scene, rng: np.random.Generator, heldout: bool = False) -> Question | None:
    """A question of a kind about a scene, or None if the scene has no unambiguous one.

    With `heldout` it is about an object of a held-out colour-shape pair.
    """
    return QUESTION_KINDS[kind](scene, rng, heldout)


def make_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Different questions about a scene, kinds in random order, as many as it allows up to `number`."""
    questions: dict[str, Question] = {}
    kinds = [*rng.permutation(list(QUESTION_KINDS)), *rng.permutation(list(QUESTION_KINDS))]
    for kind in kinds:
        question = make_question(str(kind), scene, rng)
        if question is not None and question.text not in questions:
            questions[question.text] = question
        if len(questions) == number:
            break
    return list(questions.values())


def _color(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    item = _pick(_with_unique(scene, "shape"), rng, heldout)
    if item is None:
        return None
    text = _one_of(rng, f"What color is the {item.shape}?", f"Which color does the {item.shape} have?")
    allowed = [color for color in COLORS if heldout or (color, item.shape) not in HELD_OUT]
    return Question("color", text, item.color, _options(item.color, allowed, rng))


def _shape(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    item = _pick(_with_unique(scene, "color"), rng, heldout)
    if item is None:
        return None
    text = _one_of(rng, f"What shape is the {item.color} object?", f"Which shape is {item.color}?")
    allowed = [shape for shape in SHAPES if heldout or (item.color, shape) not in HELD_OUT]
    return Question("shape", text, item.shape, _options(item.shape, allowed, rng))


def _location(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    item = _pick(_unique_pairs(scene), rng, heldout)
    if item is None or (scene.level == "hard" and rng.random() >= _evenness(scene, item)):
        return None
    text = _one_of(rng, f"Where is the {item.color} {item.shape}?", f"Where do you see the {item.color} {item.shape}?")
    answer = scene.location(item)
    return Question("location", text, answer, _options(answer, LOCATIONS, rng))


def _evenness(scene: Scene, item: SceneObject) -> float:
    """Share of location questions to keep so that all nine places are asked for equally often.

    An object placed freely keeps its distance to the border, so its centre lies in the middle third of a side of
    length s with probability m = (s / 3) / (s - 2 (radius + 1)) > 1/3; questions about the middle are thinned out.
    """
    middle = scene.image_size / 3 / (scene.image_size - 2 * (item.radius + 1))
    third = scene.image_size / 3
    return float(np.prod([(1 - middle) / 2 / middle if v // third == 1 else 1.0 for v in (item.x, item.y)]))


def _count(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    """How many objects in all, or of a colour or shape; the latter are skewed, so the blind floor of counts is high."""
    if heldout:
        return None
    if rng.random() < 0.5:
        total = len(scene.objects)
        return Question("count", "How many objects are there?", str(total), _number_options(total, rng))
    field = _one_of(rng, "color", "shape")
    present = Counter(getattr(item, field) for item in scene.objects)
    absent = [name for name in (COLORS if field == "color" else SHAPES) if name not in present]
    name = str(rng.choice(absent if absent and rng.random() < 0.25 else list(present)))
    noun = f"{name} objects" if field == "color" else ("crosses" if name == "cross" else f"{name}s")
    return Question("count", f"How many {noun} are there?", str(present[name]), _number_options(present[name], rng))


def _relation(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    """Which way from one object to another. Both orders of a pair are equally likely, so no answer is."""
    unique = _unique_pairs(scene)
    candidates = []
    for a in unique:
        for b in unique:
            if a is b or (heldout and (a.color, a.shape) not in HELD_OUT):
                continue
            dx, dy = a.x - b.x, a.y - b.y
            if max(abs(dx), abs(dy)) >= MIN_OFFSET and min(abs(dx), abs(dy)) < MIN_OFFSET:
                relation = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
                candidates.append((a, b, relation))
    if not candidates:
        return None
    a, b, relation = candidates[rng.integers(len(candidates))]
    text = f"Where is the {a.color} {a.shape} relative to the {b.color} {b.shape}?"
    return Question("relation", text, relation, _shuffled(RELATIONS, rng))


def _existence(scene: Scene, rng: np.random.Generator, heldout: bool) -> Question | None:
    """Yes and no are equally likely for every pair: the pair is drawn first, by what the scene allows."""
    present = {(item.color, item.shape) for item in scene.objects}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES if ((color, shape) in HELD_OUT) == heldout]
    answer = _one_of(rng, "yes", "no")
    choices = [pair for pair in pairs if (pair in present) == (answer == "yes")]
    if not choices:
        return None
    color, shape = choices[rng.integers(len(choices))]
    text = _one_of(rng, f"Is there a {color} {shape}?", f"Do you see a {color} {shape}?")
    return Question("existence", text.replace(" a orange", " an orange"), answer, _shuffled(("yes", "no"), rng))


QUESTION_KINDS: Mapping[str, Callable[[Scene, np.random.Generator, bool], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "location": _location,
    "count": _count,
    "relation": _relation,
    "existence": _existence,
}


def _with_unique(scene: Scene, field: str) -> list[SceneObject]:
    counts = Counter(getattr(item, field) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, field)] == 1]


def _unique_pairs(scene: Scene) -> list[SceneObject]:
    counts = Counter((item.color, item.shape) for item in scene.objects)
    return [item for item in scene.objects if counts[item.color, item.shape] == 1]


def _pick(items: Sequence[SceneObject], rng: np.random.Generator, heldout: bool) -> SceneObject | None:
    allowed = [item for item in items if not heldout or (item.color, item.shape) in HELD_OUT]
    return allowed[rng.integers(len(allowed))] if allowed else None


def _options(answer: str, universe: Sequence[str], rng: np.random.Generator, number: int = 4) -> tuple[str, ...]:
    others = [option for option in universe if option != answer]
    return _shuffled([answer, *(others[i] for i in rng.permutation(len(others))[: number - 1])], rng)


def _number_options(answer: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Four consecutive numbers that hold the answer at a random place, from 0 up."""
    first = max(0, answer - int(rng.integers(4)))
    return _shuffled([str(first + i) for i in range(4)], rng)


def _shuffled(options: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(options[int(i)] for i in rng.permutation(len(options)))


def _one_of(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]
