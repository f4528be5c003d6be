"""The reader of scenes: exact on true pictures, also disturbed ones; what is asked for and missing is wrong."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.scene_reader import SeenObject, fidelity, read_scene
from data_pipelines.scenes import (
    BACKGROUND,
    COLORS,
    LOCATION_PHRASES,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    make_scene,
    part_of,
    render,
)
from experiments.scene_drawings import unseen_scenes


def test_every_colour_shape_and_size_is_read_at_the_ends_of_its_jitter():
    """Also the pairs that no training scene holds: the reader has no prior."""
    for color in COLORS:
        for shape in SHAPES:
            for size, radius in RADII.items():
                shift = 16 / 2 - radius - 0.5
                for x, y in ((8 - shift, 8 + shift), (8 + shift, 8 - shift)):
                    scene = Scene("easy", 0, (SceneObject(color, shape, size, 16 + x, y, radius),))
                    assert read_scene(render(scene)) == {"top middle": SeenObject(color, shape, size)}


@pytest.mark.parametrize(("noise", "least"), [(0, 1.0), (30, 1.0), (60, 0.99)])
def test_true_scenes_are_read_exactly_and_noisy_ones_almost(noise, least):
    scenes = [make_scene(0, "val", "easy", index) for index in range(60)]
    rng = np.random.default_rng(0)
    pictures = [render(scene).astype(float) + noise * rng.standard_normal((48, 48, 3)) for scene in scenes]
    readings = [read_scene(np.clip(picture, 0, 255).astype(np.uint8)) for picture in pictures]
    found = fidelity(scenes, readings, [True] * 60)
    assert min(found.shares.values()) >= least and found.extra_per_scene == 0


def test_an_empty_picture_shows_nothing_and_another_level_is_refused():
    assert read_scene(np.full((48, 48, 3), BACKGROUND, np.uint8)) == {}
    with pytest.raises(ValueError, match="easy level, 48 x 48"):
        read_scene(np.zeros((64, 64, 3), np.uint8))


def test_fidelity_by_hand():
    """Two scenes of two objects. One is right but for a shape, with one too many; the other lacks an object."""
    circle = SceneObject("red", "ring", "small", 8, 8, 5)
    square = SceneObject("blue", "square", "large", 40, 40, 7.2)
    scenes = [Scene("easy", i, (circle, square)) for i in range(2)]
    readings = [
        {
            "top left": SeenObject("red", "ring", "large"),
            "bottom right": SeenObject("blue", "circle", "large"),
            "center": SeenObject("red", "ring", "small"),
        },
        {"top left": SeenObject("red", "ring", "small")},
    ]
    found = fidelity(scenes, readings, [True, False])
    assert found.shares == {
        "object": 3 / 4, "color": 3 / 4, "shape": 2 / 4, "size": 1 / 2, "scene": 0.0, "count": 0.0,
    }  # fmt: skip
    assert (found.num_objects, found.num_sized, found.num_scenes, found.extra_per_scene) == (4, 2, 2, 0.5)
    right = {"top left": SeenObject("red", "ring", "large"), "bottom right": SeenObject("blue", "square", "small")}
    assert fidelity(scenes[:1], [right], [False]).shares["scene"] == 1.0, "sizes do not count where none was asked for"


def test_injected_faults_lower_their_own_figure():
    """Pictures of scenes with one attribute turned: that attribute is never right, the others always are."""
    asked = unseen_scenes(30)
    turned = {"color": lambda item: "red" if item.color != "red" else "blue",
              "shape": lambda item: SHAPES[SHAPES.index(item.shape) - 1]}  # fmt: skip
    for name, turn in turned.items():
        pictures = []
        for scene in asked.scenes:
            objects = tuple(dataclasses.replace(item, **{name: turn(item)}) for item in scene.objects)
            pictures.append(render(dataclasses.replace(scene, objects=objects)))
        shares = asked.fidelity(pictures, all_sizes=True).shares
        for other in ("object", "color", "shape", "size"):
            assert shares[other] == float(other != name), (name, other)


def test_the_blind_floor_is_low_and_captions_say_whether_sizes_count():
    asked = unseen_scenes(60)
    floor = asked.of_other_scenes()
    assert floor.shares["color"] < 0.1 and floor.shares["scene"] == 0
    true = asked.fidelity(asked.pictures)
    named = [len(scene.objects) for scene, text in zip(asked.scenes, asked.captions, strict=True)
             if "small" in text or "large" in text]  # fmt: skip
    assert true.num_sized == sum(named) < true.num_objects and true.shares["scene"] == 1


def test_partial_captions_name_some_objects_and_say_which():
    """The cells that count as named are those whose objects the words name, each scene's own and the same again."""
    whole = unseen_scenes(40)
    asked = whole.partially()
    assert len(asked.scenes) == sum(len(scene.objects) > 1 for scene in whole.scenes)
    fewer = unseen_scenes(20).partially()
    assert fewer.captions == asked.captions[: len(fewer.captions)]
    for scene, text, named in zip(asked.scenes, asked.captions, asked.named, strict=True):
        assert 1 <= len(named) < len(scene.objects)
        assert sum(text.count(shape) for shape in SHAPES) == len(named)
        for item in scene.objects:
            phrases = LOCATION_PHRASES[scene.location(item)]
            words = [f"{item.color} {item.shape} {place}" for place in phrases]
            assert any(w in text for w in words) == (scene.location(item) in named)
    with pytest.raises(ValueError, match="of one object has no part"):
        part_of(next(scene for scene in whole.scenes if len(scene.objects) == 1), np.random.default_rng(0))


def test_named_and_unnamed_objects_are_scored_apart():
    """A true picture is right in both; one of the named objects alone in these; one of the others alone in those."""
    asked = unseen_scenes(40).partially()
    halves = {True: [], False: []}
    for scene, named in zip(asked.scenes, asked.named, strict=True):
        for is_named, pictures in halves.items():
            objects = tuple(item for item in scene.objects if (scene.location(item) in named) == is_named)
            pictures.append(render(dataclasses.replace(scene, objects=objects)))

    def shares(pictures):
        return {name: set(one.shares.values()) for name, one in asked.fidelity_by_name(pictures).items()}

    assert shares(asked.pictures) == {"named": {1.0}, "unnamed": {1.0}}
    assert shares(halves[True]) == {"named": {1.0}, "unnamed": {0.0}}
    assert shares(halves[False]) == {"named": {0.0}, "unnamed": {1.0}}
    others = asked.fidelity_by_name([*asked.pictures[1:], asked.pictures[0]])
    assert others["unnamed"].shares["object"] < 0.5 and others["unnamed"].shares["color"] < 0.2
    assert others["named"].extra_per_scene == others["unnamed"].extra_per_scene > 0, "in cells that are empty"
    found = asked.fidelity_by_name(asked.pictures)
    assert found["unnamed"].num_sized == found["unnamed"].num_objects and found["named"].extra_per_scene == 0
    sized = [len(named) for text, named in zip(asked.captions, asked.named, strict=True)
             if "small" in text or "large" in text]  # fmt: skip
    assert found["named"].num_sized == sum(sized) < found["named"].num_objects
