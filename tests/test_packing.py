"""Pack plans lose nothing and waste little; a row is laid out as drawn in `arrays.Batch`."""

import io

import numpy as np
import pytest
from PIL import Image

from unihetero_jax.data import packing, records
from unihetero_jax.data.packing import Hole, ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment
from unihetero_jax.data.tokenizer import train_tokenizer

BOI, EOI, EOS, PAD = 101, 102, 103, 100
THE, CAT, Q1, A1, Q2, A2 = 1, 2, 3, 4, 5, 6
DRAWN = """
tokens           the  cat  boi   .    .    .    .   eoi  eos  boi   .    .    .    .   eoi  q1   a1   q2   a2
segment_ids       1    1    1    1    1    1    1    1    1    2    2    2    2    2    2    2    2    2    2
branch_ids        0    0    0    0    0    0    0    0    0    0    0    0    0    0    0    1    1    2    2
positions         0    1    2    3    4    5    6    7    8    0    1    2    3    4    5    6    7    6    7
visual_mask       .    .    .    x    x    x    x    .    .    .    x    x    x    x    .    .    .    .    .
visual_index      .    .    .    0    1    2    3    .    .    .    4    5    6    7    .    .    .    .    .
visual_loss_mask  .    .    .    x    x    x    x    .    .    .    .    .    .    .    .    .    .    .    .
text_loss_mask    .    x    x    .    .    .    .    x    x    .    .    .    .    .    .    .    x    .    x
"""
VALUES = {"the": THE, "cat": CAT, "boi": BOI, "eoi": EOI, "eos": EOS, "q1": Q1, "a1": A1, "q2": Q2, "a2": A2, "x": 1}


def drawn_row(length):
    lines = [line.split() for line in DRAWN.strip().splitlines()]
    row = {}
    for name, *cells in lines:
        fill = PAD if name == "tokens" else 0
        values = [fill if c == "." else int(c) if c.isdigit() else VALUES[c] for c in cells]
        row[name] = np.asarray(values + [fill] * (length - len(values)))
    return row


def picture(height, width, value=0):
    return np.full((height, width, 3), value, np.uint8)


def drawn_samples():
    first = PackedSample(
        [
            TokenPiece([THE, CAT], True),
            TokenPiece([BOI], True),
            ImagePiece(picture(4, 4, 7), True),
            TokenPiece([EOI], True),
            TokenPiece([EOS], True),
        ],
        source_id=3,
        identity=11,
    )
    second = PackedSample(
        [
            TokenPiece([BOI]),
            ImagePiece(picture(2, 8, 9)),
            TokenPiece([EOI]),
            TokenPiece([Q1], False, 1),
            TokenPiece([A1], True, 1),
            TokenPiece([Q2, A2], [True, True], 2),
        ],
        source_id=1,
        identity=12,
    )
    return [first, second]


def test_row_is_laid_out_as_drawn():
    row = packing.assemble_row(drawn_samples(), 24, 40, 1, PAD)
    for name, expected in drawn_row(24).items():
        np.testing.assert_array_equal(row[name], expected, err_msg=name)
    assert row["source_ids"].tolist() == [3] * 9 + [1] * 10 + [0] * 5
    boi_grid = np.zeros((24, 2))
    boi_grid[2], boi_grid[9] = (2, 2), (1, 4)
    np.testing.assert_array_equal(row["boi_grid"], boi_grid)
    assert row["patches"][:, 0].tolist() == [7] * 16 + [9] * 16 + [0] * 8
    assert row["patch_segment_ids"].tolist() == [1] * 16 + [2] * 16 + [0] * 8
    assert row["patch_grid"][[0, 15, 16, 31, 32]].tolist() == [[4, 4], [4, 4], [2, 8], [2, 8], [0, 0]]
    assert row["patch_coords"][16:22].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    kinds = {name: str(value.dtype) for name, value in row.items()}
    assert {kinds[n] for n in ("text_loss_mask", "visual_mask", "visual_loss_mask")} == {"bool"}
    assert kinds["patches"] == "uint8" and kinds["row_hash"] == "uint32" and kinds["tokens"] == "int32"


def test_fields_are_those_of_the_batch():
    arrays = pytest.importorskip("unihetero_jax.arrays")
    row = packing.assemble_row(drawn_samples(), 24, 40, 1, PAD)
    assert set(row) == set(arrays.Batch.__dataclass_fields__)
    stacked = packing.stack_rows([row, row, row])
    assert stacked["tokens"].shape == (3, 24) and stacked["patches"].shape == (3, 40, 3)


def test_visual_loss_on_all_images():
    row = packing.assemble_row(drawn_samples(), 24, 40, 1, PAD, "all")
    np.testing.assert_array_equal(row["visual_loss_mask"], row["visual_mask"])


def test_a_hole_moves_nothing_behind_it():
    samples = drawn_samples()
    whole = packing.assemble_row([*samples, *samples], 48, 80, 1, PAD)
    holed = packing.assemble_row([samples[0], Hole(10, 16, 1), *samples], 48, 80, 1, PAD)
    for name in set(whole) - {"row_hash"}:
        lost = slice(16, 32) if "patch" in name else slice(9, 19)
        np.testing.assert_array_equal(
            np.delete(holed[name], np.r_[lost], 0), np.delete(whole[name], np.r_[lost], 0), err_msg=name
        )
        padding = PAD if name == "tokens" else 0
        assert (holed[name][lost] == padding).all(), name


def test_first_tokens_are_never_targets():
    eager = PackedSample(
        [TokenPiece([1, 2], True), TokenPiece([3, 4], True, 1), TokenPiece([], True, 2), TokenPiece([5, 6], True, 2)]
    )
    row = packing.assemble_row([eager, eager], 14, 4, 1, PAD)
    assert row["text_loss_mask"].tolist() == [False, True, True, True, False, True] * 2 + [False] * 2
    assert row["positions"][:6].tolist() == [0, 1, 2, 3, 2, 3]


def test_row_hash_follows_samples_and_contents():
    def hashed(samples):
        return packing.assemble_row(samples, 48, 80, 1, PAD)["row_hash"].tolist()

    first, second = drawn_samples()
    other_identity = PackedSample(first.pieces, first.source_id, 99)
    other_pixels = PackedSample([*first.pieces[:2], ImagePiece(picture(4, 4, 8), True), *first.pieces[3:]], 3, 11)
    other_token = PackedSample([TokenPiece([THE, A1], True), *first.pieces[1:]], 3, 11)
    hashes = [
        hashed(s)
        for s in (
            [first, second],
            [second, first],
            [first],
            [other_identity, second],
            [other_pixels, second],
            [other_token, second],
        )
    ]
    assert len({tuple(h) for h in hashes}) == len(hashes)
    assert hashed([first, second]) == hashes[0]


def test_a_row_never_overflows():
    with pytest.raises(ValueError, match="sample 2 of a row takes 10 tokens and 16 patches, 9 and 24 are free"):
        packing.assemble_row(drawn_samples(), 18, 40, 1, PAD)
    with pytest.raises(ValueError, match="an image must follow its <boi>"):
        packing.assemble_row([PackedSample([ImagePiece(picture(2, 2))])], 18, 40, 1, PAD)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["a red circle left of a blue square"] * 3, 280, tmp_path_factory.mktemp("tokenizer"))


def image(height, width):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return ImageSegment(buffer.getvalue(), height, width)


SPEC = ImageSpec(4, 4, 16)
RECORDS = {
    "caption": (TextSegment("a red", True), image(8, 8)),
    "read": (image(8, 16), TextSegment("what?"), TextSegment(" red", True)),
    "dialogue": (image(8, 8), TextSegment("q"), TextSegment(" a", True), TextSegment("q"), TextSegment(" b", True)),
    "turns": (
        image(8, 8),
        TextSegment("q", False, 1),
        TextSegment(" a", True, 1),
        TextSegment("p", False, 2),
        TextSegment(" b", True, 2),
    ),
    "unanswered": (image(8, 8), TextSegment("q", True, 1), TextSegment("z", False, 1), TextSegment("", True, 2)),
    "two images": (image(8, 8), TextSegment("then"), image(16, 4)),
    "text": (TextSegment("just text", True),),
    "empty": (),
}


@pytest.mark.parametrize("name", RECORDS)
def test_cost_of_planner_and_reader_agree(name, tokenizer):
    record = Record("s", "vqa", RECORDS[name])
    sample = packing.sample_from_record(record, tokenizer, SPEC)
    cost = packing.sample_cost(sample, SPEC.patch_size)
    assert cost == records.record_cost(record, tokenizer.encode, SPEC)
    row = packing.assemble_row([sample], 64, 32, SPEC.patch_size, tokenizer.pad_id)
    assert ((row["segment_ids"] > 0).sum(), (row["patch_segment_ids"] > 0).sum()) == cost
    assert sample.identity == records.content_hash(records.serialize(record))


def targets(segments, tokenizer):
    row = packing.assemble_row(
        [packing.sample_from_record(Record("s", "vqa", segments), tokenizer, SPEC)], 64, 32, 4, tokenizer.pad_id
    )
    names = {tokenizer.boi_id: "boi", tokenizer.eoi_id: "eoi", tokenizer.eos_id: "eos"}
    tokens = [names.get(int(t), tokenizer.decode([t])) for t in row["tokens"]]
    shown = [
        f"{'+' if loss else '-'}{'v' if visual else token}"
        for token, loss, visual, segment in zip(
            tokens, row["text_loss_mask"], row["visual_mask"], row["segment_ids"], strict=True
        )
        if segment
    ]
    return " ".join(shown), row


def test_targets_of_a_generated_image(tokenizer):
    shown, row = targets((TextSegment("q", True), image(8, 8)), tokenizer)
    assert shown == "-q +boi -v +eoi +eos"
    assert row["visual_loss_mask"].sum() == 1
    shown, row = targets((image(8, 8), TextSegment("q"), image(8, 8)), tokenizer)
    assert shown == "-boi -v -eoi -q +boi -v +eoi +eos"
    assert row["visual_loss_mask"].tolist() == [False] * 5 + [True] + [False] * 58


def test_targets_of_turns(tokenizer):
    shown, row = targets(
        (
            image(8, 8),
            TextSegment("q", False, 1),
            TextSegment("a", True, 1),
            TextSegment("p", False, 2),
            TextSegment("b", True, 2),
        ),
        tokenizer,
    )
    assert shown == "-boi -v -eoi -q +a +eos -p +b +eos"
    assert row["positions"][:9].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert row["branch_ids"][:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not row["visual_loss_mask"].any()
    shown, _ = targets((image(8, 8), TextSegment("q", True, 1), TextSegment("z", False, 1)), tokenizer)
    assert shown == "-boi -v -eoi +q -z -eos"
    shown, _ = targets((TextSegment("q", True), TextSegment("z")), tokenizer)
    assert shown == "-q -z -eos"


def test_images_that_lie_about_their_size(tokenizer):
    lying = ImageSegment(image(8, 8).data, 8, 16)
    with pytest.raises(RecordError, match="size_mismatch"):
        packing.sample_from_record(Record("s", "caption", (lying,)), tokenizer, SPEC)


def check_plan(costs, row_tokens, row_patches, rows):
    assert sorted(i for row in rows for i in row) == list(range(len(costs)))
    for row in rows:
        assert row and row == sorted(row)
        assert (costs[row].sum(axis=0) <= (row_tokens, row_patches)).all()


@pytest.mark.parametrize("seed", range(25))
def test_plan_keeps_every_item_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    row_tokens, row_patches = int(rng.integers(8, 300)), int(rng.integers(0, 80)) * 4
    count = int(rng.integers(0, 400))
    costs = np.stack(
        [rng.integers(0, row_tokens + 1, count), rng.integers(0, row_patches // 4 + 1, count) * 4], axis=-1
    )
    costs[rng.random(count) < rng.random(), 1] = 0
    costs[rng.random(count) < 0.1] = (row_tokens, row_patches)
    check_plan(costs, row_tokens, row_patches, packing.plan_rows(costs, row_tokens, row_patches))
    check_plan(costs, row_tokens, row_patches, packing.plan_rows(costs, row_tokens, row_patches, spread_images=False))


def realistic_lengths(count, seed, row_tokens):
    """Log-normal text, and in 70% of the samples one to four images of 1 to 10 tiles of 64 tokens."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(4.5, 1.0, count).astype(int), 4, row_tokens // 2)
    num_images = rng.choice([0, 1, 1, 1, 1, 2, 4], count)
    tiles = np.asarray([rng.choice([1, 5, 10], n).sum() if n else 0 for n in num_images])
    visual = np.minimum(tiles * 64, row_tokens // 2 - 16)
    return np.stack([text + visual + 2 * num_images + 1, visual * 4], axis=-1)


@pytest.mark.parametrize("patches_per_token", [4, 3.6, 3.4])
def test_padding_is_small(patches_per_token):
    costs = realistic_lengths(3000, 0, 4096)
    row_patches = int(4096 * patches_per_token) // 4 * 4
    rows = packing.plan_rows(costs, 4096, row_patches)
    check_plan(costs, 4096, row_patches, rows)
    assert 1 - costs[:, 0].sum() / (len(rows) * 4096) < 0.005


def test_rows_stay_near_the_bound_when_patches_are_scarce():
    costs = realistic_lengths(3000, 0, 4096)
    rows = packing.plan_rows(costs, 4096, 3 * 4096)
    check_plan(costs, 4096, 3 * 4096, rows)
    assert len(rows) <= 1.03 * costs[:, 1].sum() / (3 * 4096)


def test_images_are_spread_over_the_rows():
    costs = np.asarray([[20, 16]] * 50 + [[5, 0]] * 300)
    rows = packing.plan_rows(costs, 100, 64)
    assert len(rows) == 25
    assert max(costs[row, 1].sum() for row in rows) == 32
    apart = packing.plan_rows(costs, 100, 64, spread_images=False)
    assert max(costs[row, 1].sum() for row in apart) == 64


def test_an_item_too_long_is_named():
    with pytest.raises(
        ValueError, match="1 items do not fit a row of 10 tokens and 8 patches; item 1 takes 11 tokens and 4 patches"
    ):
        packing.plan_rows(np.asarray([[4, 4], [11, 4]]), 10, 8)
