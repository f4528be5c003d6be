"""Finding evaluation pictures and texts in records: what is equal, near, shared by chance, or wording alone."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.evaluation_lookup import EvaluationLookup, Found, Limits, Target, surest
from data_pipelines.evaluation_sets import EvaluationItem
from unihetero_jax.data.records import ImageSegment, Record, TextSegment

LONG = "The tall man in a green coat walks his two small dogs along the frozen river"


def photo(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC)


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def item(number, question="", image=None, **changes):
    fields = EvaluationItem(str(number), question, ("yes", "no"), "yes", "all", image, f"set.tsv, row {number}")
    return dataclasses.replace(fields, **changes)


def lookup_of(*items, **limits):
    lookup = EvaluationLookup(Limits(**limits))
    lookup.add("set", items)
    return lookup


def with_image(data):
    return Record("s", "vqa", (ImageSegment(data, 96, 128),))


def with_texts(*texts, branches=None):
    branches = branches or [0] * len(texts)
    segments = tuple(TextSegment(text, True, branch) for text, branch in zip(texts, branches, strict=True))
    return Record("s", "text", segments)


def test_pictures_are_found_by_bytes_by_pixels_and_nearly():
    lookup = lookup_of(item(1, image=saved(photo(1))), item(2, image=saved(photo(2))))
    assert lookup.targets[:2] == [Target("set", "set.tsv, row 1"), Target("set", "set.tsv, row 2")]
    assert lookup.find(with_image(saved(photo(2)))) == (Found("image", 1),)
    assert lookup.find(with_image(saved(photo(2), "BMP"))) == (Found("pixels", 1),)
    (near,) = lookup.find(with_image(saved(photo(1), "JPEG", quality=40)))
    assert (near.reason, near.target) == ("near_image", 0) and 0 <= near.measure <= 4
    assert lookup.find(with_image(saved(photo(3)))) == ()
    both = Record("s", "vqa", tuple(ImageSegment(saved(photo(n), "BMP"), 96, 128) for n in (1, 2, 1)))
    assert lookup.find(both) == (Found("pixels", 0), Found("pixels", 1))


def scene(*colours):
    """Three boxes with a block in each, as NLVR draws them."""
    drawn = Image.new("RGB", (400, 100), (211, 211, 211))
    for left in (100, 250):
        drawn.paste((128, 128, 128), (left, 0, left + 50, 100))
    for box, colour in enumerate(colours):
        drawn.paste(colour, (40 + 150 * box, 80, 60 + 150 * box, 100))
    return drawn


def test_drawings_of_one_layout_are_near_in_hash_alone():
    drawn, other = scene("blue", "black", "yellow"), scene("red", "black", "yellow")
    lookup = lookup_of(item(1, image=saved(drawn)))
    assert [f.reason for f in lookup.find(with_image(saved(drawn, "JPEG", quality=60)))] == ["near_image"]
    assert [f.reason for f in lookup.find(with_image(saved(other)))] == ["near_hash"]
    generous = lookup_of(item(1, image=saved(drawn)), max_difference=255)
    assert [f.reason for f in generous.find(with_image(saved(other)))] == ["near_image"]


def test_near_pictures_are_not_looked_for_below_zero_bits():
    jpeg = with_image(saved(photo(1), "JPEG", quality=40))
    assert lookup_of(item(1, image=saved(photo(1))), max_distance=-1).find(jpeg) == ()


def test_a_picture_of_several_items_counts_once_in_a_set_and_in_each_set():
    picture = saved(photo(1))
    lookup = lookup_of(item(1, "a?", picture), item(2, "b?", picture))
    lookup.add("other", [item(9, image=picture)])
    assert (lookup.sets["set"].num_items, lookup.sets["set"].num_pictures) == (2, 1)
    found = lookup.find(with_image(picture))
    assert [(f.reason, lookup.targets[f.target]) for f in found] == [
        ("image", Target("set", "set.tsv, row 1")), ("image", Target("other", "set.tsv, row 9")),
    ]  # fmt: skip


def test_a_picture_that_does_not_decode_is_counted_or_passed_over():
    damaged = saved(photo(1))[:200]
    lookup = lookup_of(item(1, image=damaged), item(2, image=saved(photo(2))))
    assert (lookup.sets["set"].num_pictures, lookup.sets["set"].unread.counts) == (1, {"truncated_image": 1})
    assert lookup.find(with_image(damaged)) == ()


def test_a_long_text_is_found_by_its_ngrams():
    """16 words have nine 8-grams; a text that leaves out the last word has eight of them."""
    lookup = lookup_of(item(1, LONG))
    assert lookup.find(with_texts(f"Once: {LONG.upper()}!")) == (Found("text", 0, 1.0),)
    words = LONG.split()
    assert lookup.find(with_texts(" ".join(words[:-1]))) == (Found("text", 0, 8 / 9),)
    assert lookup.find(with_texts(" ".join(words[:-2]))) == ()
    assert lookup_of(item(1, LONG), min_share=0.7).find(with_texts(" ".join(words[:-2]))) == (Found("text", 0, 7 / 9),)
    assert lookup.find(with_texts(" ".join(words[::-1]))) == ()
    assert lookup_of(item(1, LONG), min_share=8 / 9).find(with_texts(" ".join(words[:-1]))) == (
        Found("text", 0, 8 / 9),
    )
    assert lookup_of(item(1, LONG), ngram=15).find(with_texts(" ".join(words[:-1]))) == ()


def test_a_text_may_run_through_segments_of_a_branch_but_not_of_two():
    lookup, cut = lookup_of(item(1, LONG)), LONG.index(" his")
    assert lookup.find(with_texts("See:", LONG[:cut], LONG[cut:])) == (Found("text", 0, 1.0),)
    assert lookup.find(with_texts(LONG[:cut], LONG[cut:], branches=[1, 2])) == ()


def test_a_short_text_is_found_where_it_is_all_of_a_text():
    lookup = lookup_of(item(1, "Is the dog asleep?", hint=""))
    assert lookup.find(with_texts("Look.", "is the dog  ASLEEP", branches=[0, 1])) == (Found("short_text", 0, 1.0),)
    assert lookup.find(with_texts("Is the dog asleep or not?")) == ()
    assert lookup_of(item(1, "dog asleep?", hint="Is the")).find(with_texts("Is the dog asleep")) != ()


def test_wording_that_many_items_share_is_not_looked_for():
    question = "Is the following statement about the image that you see true?"
    asked = [item(n, "Is there a dog?") for n in range(4)]
    stated = [item(10 + n, f"{question} There are {n} yellow blocks touching the wall") for n in range(4)]
    lookup = lookup_of(*asked, *stated, max_repeats=3)
    assert (lookup.sets["set"].num_templates, lookup.sets["set"].num_texts) == (1, 4)
    assert lookup.find(with_texts("Is there a dog?")) == ()
    assert lookup.find(with_texts(question)) == ()
    found = lookup.find(with_texts(f"{question} There are 2 yellow blocks touching the wall"))
    assert [(f.reason, lookup.targets[f.target].where) for f in found] == [("text", "set.tsv, row 12")]
    generous = lookup_of(*asked, *stated, max_repeats=4)
    assert [f.reason for f in generous.find(with_texts("Is there a dog?"))] == ["short_text"]


def test_shared_wording_is_no_part_of_the_share():
    """Of the eight 8-grams of such a text five are the wording's; another statement has only these."""
    stated = [item(n, f"{'Is this true of the picture that you see below here:'} {n} blue blocks") for n in range(4)]
    other = with_texts("Is this true of the picture that you see below here: nine red balls")
    assert lookup_of(*stated, max_repeats=3, min_share=0.3).find(other) == ()
    assert len(lookup_of(*stated, max_repeats=4, min_share=0.3).find(other)) == 4


def test_pictures_of_one_question_are_one_item():
    several = [item(1, "Which of the two is older?", saved(photo(n)), where=f"picture {n}") for n in range(4)]
    lookup = lookup_of(*several, max_repeats=1)
    assert (lookup.sets["set"].num_texts, lookup.sets["set"].num_templates) == (1, 0)


def test_what_cannot_be_read_is_counted_and_a_set_without_items_is_refused():
    lookup = lookup_of(item(1, "a?"), Dropped("missing_image", "row 2"), Dropped("missing_image", "row 3"))
    assert lookup.sets["set"].unread.counts == {"missing_image": 2}
    with pytest.raises(ValueError, match="other: no item could be read, so none would be found; not read: 1 video"):
        lookup.add("other", [Dropped("video", "row 1")])


def test_the_surest_reason():
    found = [Found("text", 0, 1.0), Found("near_image", 1, 3), Found("near_image", 2, 1), Found("short_text", 3, 1.0)]
    assert surest(found) == found[2]
    assert surest([*found, Found("pixels", 4)]).reason == "pixels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_distance": 64}, "--distance: 64"),
        ({"max_difference": -1}, "--max-difference: -1"),
        ({"ngram": 0}, "--ngram 0"),
        ({"min_share": 0.0}, "--min-share: 0.0"),
    ],
)
def test_limits_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Limits(**changes)
