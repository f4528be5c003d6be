"""Pack plans lose nothing and waste little; a row is laid out as drawn in `arrays.Batch`."""

import io

import numpy as np
import pytest
from conftest import make_tiny_config
from PIL import Image

from unihetero_jax import arrays, flops
from unihetero_jax.data import packing, records
from unihetero_jax.data.packing import Hole, ImagePiece, PackedSample, TokenPiece
from unihetero_jax.data.records import ImageSegment, ImageSpec, Record, RecordError, TextSegment
from unihetero_jax.data.roles import Role
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
TURNS = ("branches", "repeated_prefix")
VALUES = {"the": THE, "cat": CAT, "boi": BOI, "eoi": EOI, "eos": EOS, "q1": Q1, "a1": A1, "q2": Q2, "a2": A2, "x": 1}


def drawn_row(length, drawing=DRAWN):
    lines = [line.split() for line in drawing.strip().splitlines()]
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


def test_bytes_of_rows_are_as_documented():
    """README, "In a bucket": what a batch under way takes of host memory."""
    rows = packing.empty_rows(3, 100, 60, 8, PAD)
    assert sum(array.nbytes for array in rows.values()) == 3 * (60 * (3 * 8**2 + 20) + 35 * 100 + 8)


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


REPEATED = """
tokens           boi   .    .    .    .   eoi  q1   a1  boi   .    .    .    .   eoi  q2   a2
segment_ids       2    2    2    2    2    2    2    2   3    3    3    3    3    3    3    3
branch_ids        0    0    0    0    0    0    1    1   0    0    0    0    0    0    2    2
positions         0    1    2    3    4    5    6    7   0    1    2    3    4    5    6    7
visual_mask       .    x    x    x    x    .    .    .   .    x    x    x    x    .    .    .
visual_index      .    4    5    6    7    .    .    .   .    4    5    6    7    .    .    .
visual_loss_mask  .    .    .    .    .    .    .    .   .    .    .    .    .    .    .    .
text_loss_mask    .    .    .    .    .    .    .    x   .    .    .    .    .    .    .    x
"""
"""The second sample of `DRAWN` with its prefix repeated, as drawn in `arrays.Batch`; it stands at 9."""


def test_repeated_prefix_is_laid_out_as_drawn():
    row = packing.assemble_row([*drawn_samples(), drawn_samples()[0]], 40, 60, 1, PAD, "repeated_prefix")
    branches = packing.assemble_row(drawn_samples(), 24, 40, 1, PAD)
    for name, expected in drawn_row(16, REPEATED).items():
        np.testing.assert_array_equal(row[name][9:25], expected, err_msg=name)
        np.testing.assert_array_equal(row[name][:9], branches[name][:9], err_msg=name)
    assert row["source_ids"].tolist() == [3] * 9 + [1] * 16 + [3] * 9 + [0] * 6
    assert row["segment_ids"][25:].tolist() == [4] * 9 + [0] * 6
    assert row["boi_grid"][[9, 17]].tolist() == [[1, 4], [1, 4]] and (row["boi_grid"] > 0).any(-1).sum() == 4
    for name in ("patches", "patch_segment_ids", "patch_coords", "patch_grid"):  # stored and encoded once
        np.testing.assert_array_equal(row[name][:32], branches[name][:32], err_msg=name)
    assert packing.sample_cost(drawn_samples()[1], 1, "repeated_prefix") == (16, 16)


def test_losses_of_a_prefix_count_on_its_first_copy_only():
    """An eager sample: supervised text and a drawn image in the prefix, every token of the turns a target."""
    pieces = [*drawn_samples()[0].pieces[:-1], *(TokenPiece([50 + k, 60 + k], True, k) for k in (1, 2, 3))]
    rows = [packing.assemble_row([PackedSample(pieces)], 40, 16, 1, PAD, turns) for turns in TURNS]
    for name in ("text_loss_mask", "visual_loss_mask"):
        assert rows[0][name].sum() == rows[1][name].sum() > 0
        np.testing.assert_array_equal(rows[0][name][:8], rows[1][name][:8], err_msg=name)
    targets = [row["tokens"][row["text_loss_mask"]].tolist() for row in rows]
    assert targets[0] == targets[1] == [CAT, BOI, EOI, 51, 61, 62, 63]


def test_samples_without_several_turns_are_laid_out_alike():
    one_turn = PackedSample([TokenPiece([THE]), TokenPiece([Q1, A1], True, 1)])
    rows = [packing.assemble_row([one_turn, drawn_samples()[0]], 24, 16, 1, PAD, turns) for turns in TURNS]
    for name, values in rows[0].items():
        np.testing.assert_array_equal(values, rows[1][name], err_msg=name)


def test_a_hole_in_repeated_prefixes_moves_nothing_behind_it():
    samples = drawn_samples()
    whole = packing.assemble_row([samples[1], *samples], 48, 80, 1, PAD, "repeated_prefix")
    holed = packing.assemble_row([Hole(16, 16, 1), *samples], 48, 80, 1, PAD, "repeated_prefix")
    for name in set(whole) - {"row_hash", "segment_ids"}:  # segments are told apart, their numbers mean nothing
        np.testing.assert_array_equal(holed[name][16:], whole[name][16:], err_msg=name)
    assert holed["segment_ids"].tolist() == [0] * 16 + [2] * 9 + [3] * 8 + [4] * 8 + [0] * 7


def test_work_of_repeated_prefixes_is_counted_as_computed():
    """By hand: 7 + 1 + 1 positions in branches, two segments of 8 repeated; either way one image of 16 patches."""
    works = []
    for turns in TURNS:
        row = packing.assemble_row([drawn_samples()[1]], 24, 16, 1, PAD, turns)
        works.append(flops.count_work(make_tiny_config(), packing.stack_rows([row])))
    prefix = 6 * 7 // 2
    assert works[0] == flops.Work(10, 2, 16, prefix + 2 * (6 * 2 + 3), 256)
    assert works[1] == flops.Work(16, 2, 16, 2 * (8 * 9 // 2), 256)


def test_fields_are_those_of_the_batch():
    row = packing.assemble_row(drawn_samples(), 24, 40, 1, PAD)
    assert set(row) == set(arrays.Batch.__dataclass_fields__)
    stacked = packing.stack_rows([row, row, row])
    assert stacked["tokens"].shape == (3, 24) and stacked["patches"].shape == (3, 40, 3)


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


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", RECORDS)
def test_cost_of_planner_and_reader_agree(name, turns, tokenizer):
    record = Record("s", "vqa", RECORDS[name])
    sample = packing.sample_from_record(record, tokenizer, SPEC)
    cost = packing.sample_cost(sample, SPEC.patch_size, turns)
    assert cost == records.record_cost(record, tokenizer.encode, SPEC, turns)
    row = packing.assemble_row([sample], 64, 32, SPEC.patch_size, tokenizer.pad_id, turns)
    assert ((row["segment_ids"] > 0).sum(), (row["patch_segment_ids"] > 0).sum()) == cost
    assert sample.identity == records.content_hash(records.serialize(record))


def targets(segments, tokenizer, role=Role()):  # noqa: B008 - frozen
    sample = packing.sample_from_record(Record("s", "vqa", segments), tokenizer, SPEC, role=role)
    row = packing.assemble_row([sample], 64, 32, 4, tokenizer.pad_id)
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


def test_targets_follow_the_role(tokenizer):
    pair = (image(8, 8), TextSegment("q", True))
    shown, row = targets(pair, tokenizer, Role(order="text_first"))
    assert shown == "-q +boi -v +eoi +eos" and row["visual_loss_mask"].sum() == 1
    shown, row = targets(pair[::-1], tokenizer, Role(order="image_first"))
    assert shown == "-boi -v -eoi +q +eos" and not row["visual_loss_mask"].any()
    shown, row = targets(pair, tokenizer, Role(visual_loss="all"))
    assert shown == "-boi -v -eoi +q +eos" and row["visual_loss_mask"].sum() == 1
    shown, row = targets(pair, tokenizer, Role(order="text_first", text_loss="none"))
    assert shown == "-q -boi -v -eoi -eos" and row["visual_loss_mask"].sum() == 1
    shown, row = targets(pair, tokenizer, Role(order="text_first", visual_loss="none"))
    assert shown == "-q +boi -v +eoi +eos" and not row["visual_loss_mask"].any()
    silent = (TextSegment("q", False), image(8, 8))
    assert targets(silent, tokenizer, Role(order="captioned"))[0] == "-boi -v -eoi +q +eos"
    assert targets(RECORDS["turns"], tokenizer, Role(order="captioned"))[0] == targets(RECORDS["turns"], tokenizer)[0]
    shown, row = targets((image(8, 8),), tokenizer, Role(visual_loss="all"))  # an image alone has no text to train
    assert shown == "-boi -v -eoi -eos" and row["visual_loss_mask"].sum() == 1


def test_only_pairs_are_turned_around(tokenizer):
    for name in ("read", "dialogue", "turns", "two images", "text"):
        record = Record("s", "vqa", RECORDS[name])
        stored = packing.sample_from_record(record, tokenizer, SPEC)
        asked = packing.sample_from_record(record, tokenizer, SPEC, role=Role(order="text_first"))
        assert asked.left_out == ("order",) and stored.left_out == ()
        rows = [packing.assemble_row([sample], 64, 32, 4, tokenizer.pad_id) for sample in (stored, asked)]
        for field in rows[0]:
            np.testing.assert_array_equal(rows[0][field], rows[1][field])


def test_images_that_lie_about_their_size(tokenizer):
    lying = ImageSegment(image(8, 8).data, 8, 16)
    with pytest.raises(RecordError, match="size_mismatch"):
        packing.sample_from_record(Record("s", "caption", (lying,)), tokenizer, SPEC)
