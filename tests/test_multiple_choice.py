"""Packed likelihood ranking against plain sequences, with stand-ins for the model that see what a token may see."""

import dataclasses
import hashlib
import io
import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from experiments import base
from unihetero_jax.config import Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.mixture import image_spec
from unihetero_jax.data.packing import assemble_row, sample_from_record, stack_rows
from unihetero_jax.data.question_files import StoredImage
from unihetero_jax.data.records import (
    ImageSegment,
    Record,
    TextSegment,
    format_answer,
    format_prompt,
    probe_image,
)
from unihetero_jax.data.tokenizer import Tokenizer, train_tokenizer
from unihetero_jax.evaluation.benchmarks import Item
from unihetero_jax.evaluation.multiple_choice import score_items
from unihetero_jax.evaluation.runner import Model, evaluate, format_table, select_benchmarks
from unihetero_jax.evaluation.scoring import hits

COLORS = ("red", "blue", "dark green", "a rather light shade of yellow")
BATCH_ROWS = 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [f"What is the color of shape {i}? {color}" for i in range(20) for color in COLORS]
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer"))


def make_config(**data) -> Config:
    config: ConfigDict = base.get_config()
    config.data.sources = {"any": {"path": "any", "weight": 1.0, "augment": "none"}}
    config.data.update({"image_min_patches": 4, "image_max_patches": 36, "row_tokens": 96, "row_patches": 72} | data)
    config.eval.batch_rows = BATCH_ROWS
    return from_config_dict(config)


def picture(seed: int, height: int = 40, width: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_items(count: int) -> list[Item]:
    sizes = [(40, 40), (24, 60), (70, 20), (16, 16)]
    return [
        Item(
            str(i),
            f"What is the color of shape {i}?",
            COLORS[: 2 + i % 3],
            i % 2,
            (StoredImage.of(picture(i, *sizes[i % 4])),) if i % 5 else (),
            f"type {i % 2}",
            hint="Look closely." if i % 7 == 3 else "",
        )
        for i in range(count)
    ]


def sequences(batch: dict[str, np.ndarray]):
    """Every (row, positions of prefix followed by one branch) of a batch."""
    for row in range(len(batch["tokens"])):
        segments, branches = batch["segment_ids"][row], batch["branch_ids"][row]
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            prefix = np.flatnonzero(inside & (branches == 0))
            for branch in sorted({*branches[inside].tolist()} - {0}) or [1]:
                yield row, np.concatenate([prefix, np.flatnonzero(inside & (branches == branch))])


def hashed_log_probs(batch: dict[str, np.ndarray]) -> np.ndarray:
    """log p of a token as a hash of all that its context holds before it, pixels and positions included."""
    result = np.full(batch["tokens"].shape, np.nan, np.float32)
    for row, places in sequences(batch):
        state = hashlib.blake2b(digest_size=8)
        for t in places:
            token, position = int(batch["tokens"][row, t]), int(batch["positions"][row, t])
            state.update(f"{token}@{position}".encode())
            if batch["visual_mask"][row, t]:
                block = 4 * batch["visual_index"][row, t]
                state.update(batch["patches"][row, block : block + 4].tobytes())
                state.update(np.asarray(batch["patch_coords"][row, block : block + 4], np.int64).tobytes())
            result[row, t] = -5 * int.from_bytes(state.copy().digest(), "little") / 2**64
    return result


def plain_scores(item: Item, tokenizer: Tokenizer, config: Config) -> list[float]:
    """Each option alone in a row, laid out as training lays out `picture question answer`."""
    sums = []
    for option in item.options:
        text = f"{item.hint}\n{item.question}" if item.hint else item.question
        segments = [TextSegment(format_prompt(text)), TextSegment(format_answer(option), loss=True)]
        segments = [*(ImageSegment(image, *probe_image(image)) for image in item.images), *segments]
        sample = sample_from_record(Record("x", "vqa", tuple(segments)), tokenizer, image_spec(config), source_id=0)
        row = assemble_row([sample], 256, 72, config.model.encoder.patch_size, tokenizer.pad_id)
        batch = stack_rows([row])
        places = np.flatnonzero(batch["text_loss_mask"][0])
        assert batch["tokens"][0, places[-1]] == tokenizer.eos_id, (
            "training supervises the end; the score leaves it out"
        )
        sums.append(float(hashed_log_probs(batch)[0, places[:-1]].sum(dtype=np.float64)))
    return sums


@pytest.mark.parametrize("turns", ["branches", "repeated_prefix"])
def test_packed_scores_are_those_of_plain_sequences(tokenizer, turns):
    items, config = make_items(17), make_config(turns=turns)
    scores = score_items(items, tokenizer, config, hashed_log_probs)
    for item, score in zip(items, scores, strict=True):
        assert not score.unscored
        np.testing.assert_allclose(score.sum_log_probs, plain_scores(item, tokenizer, config), rtol=1e-6)
        assert score.num_tokens == tuple(len(tokenizer.encode(" " + option)) for option in item.options)


def test_two_pictures_before_a_question(tokenizer):
    item = Item(
        "0",
        "Are they alike?",
        ("yes", "no"),
        0,
        (StoredImage.of(picture(1, 24, 24)), StoredImage.of(picture(2, 40, 24))),
        "x",
    )
    (score,) = score_items([item], tokenizer, make_config(), hashed_log_probs)
    np.testing.assert_allclose(score.sum_log_probs, plain_scores(item, tokenizer, make_config()), rtol=1e-6)
    swapped = dataclasses.replace(item, pictures=item.pictures[::-1])
    assert score_items([swapped], tokenizer, make_config(), hashed_log_probs)[0].sum_log_probs != score.sum_log_probs


def test_packed_scores_are_those_of_one_item_per_row(tokenizer):
    items, config = make_items(12), make_config()
    packed = score_items(items, tokenizer, config, hashed_log_probs)
    assert packed == [score_items([item], tokenizer, config, hashed_log_probs)[0] for item in items]


def test_rows_are_shared_batches_are_full_and_progress_is_told(tokenizer):
    shapes, seen = [], []

    def log_probs(batch):
        shapes.append({name: array.shape[0] for name, array in batch.items()})
        return hashed_log_probs(batch)

    score_items(make_items(12), tokenizer, make_config(), log_probs, on_progress=lambda *x: seen.append(x))
    assert all(set(shape.values()) == {BATCH_ROWS} for shape in shapes), "the last batch is padded with empty rows"
    num_rows = seen[-1][1]
    assert num_rows < 12 and len(shapes) == math.ceil(num_rows / BATCH_ROWS) and seen[-1][0] == num_rows


@pytest.mark.parametrize("turns", ["branches", "repeated_prefix"])
def test_an_item_larger_than_a_row_is_spread_over_samples(tokenizer, turns):
    item = Item(
        "0", "What is the color of shape 1?", COLORS, 0, (StoredImage.of(picture(1, 48, 48)),), "x"
    )  # 3 x 3 visual tokens
    wide = make_config(row_tokens=256, turns=turns)
    counts = []

    def log_probs(batch):
        counts.append(sum(int(segments.max() > 0) for segments in batch["segment_ids"]))
        return hashed_log_probs(batch)

    expected = score_items([item], tokenizer, wide, log_probs)
    assert sum(counts) == 1
    counts.clear()
    longest = 9 + 2 + len(tokenizer.encode(item.question)) + max(len(tokenizer.encode(" " + o)) for o in COLORS)
    narrow = make_config(row_tokens=longest, turns=turns)
    assert score_items([item], tokenizer, narrow, log_probs) == expected
    assert sum(counts) > 1, "the smallest row that holds the longest option cannot hold all four"
    too_narrow = score_items(
        [item, make_items(1)[0]], tokenizer, make_config(row_tokens=longest - 1, turns=turns), log_probs
    )
    assert too_narrow[0].unscored == "too_long" and too_narrow[0].by_sum is None
    assert not too_narrow[1].unscored, "the others are scored"


def oracle(items: list[Item], tokenizer: Tokenizer):
    """Gives probability 1 to the tokens of right answers: it recognises the question in the prompt."""
    prompts = {tuple(tokenizer.encode(item.question)): tokenizer.encode(" " + item.answer_text) for item in items}

    def log_probs(batch):
        result = np.full(batch["tokens"].shape, -10.0, np.float32)
        for row, places in sequences(batch):
            places = places[batch["tokens"][row, places] != tokenizer.pad_id]
            ids = [int(i) for i in batch["tokens"][row, places]]
            for question, answer in prompts.items():
                text = [i for i in ids if i not in (tokenizer.boi_id, tokenizer.eoi_id)]
                if text == [*question, *answer]:
                    result[row, places[-len(answer) :]] = 0.0
        return result

    return log_probs


def test_an_oracle_is_always_right_with_and_without_pictures(tokenizer):
    items = [item for item in make_items(15) if not item.hint]
    for without_image in (False, True):
        scores = score_items(items, tokenizer, make_config(), oracle(items, tokenizer), without_image=without_image)
        assert hits(items, scores) == [1] * len(items)
        assert all(score.sum_log_probs[item.answer] == 0 for item, score in zip(items, scores, strict=True))


def test_a_uniform_model_prefers_short_options_by_sum_and_ties_by_mean(tokenizer):
    items = [
        Item(str(i), f"question {i}", ("red", "a rather light shade of yellow"), i % 2, (), "x") for i in range(10)
    ]
    scores = score_items(
        items, tokenizer, make_config(), lambda batch: np.full(batch["tokens"].shape, -6.0, np.float32)
    )
    assert [score.by_sum for score in scores] == [0] * 10, "fewer tokens, larger sum"
    assert [score.by_mean for score in scores] == [0] * 10, "a tie goes to the earlier option"
    assert scores[0].sum_log_probs == tuple(-6.0 * n for n in scores[0].num_tokens)
    assert sum(hits(items, scores)) == 5


def test_leaving_the_picture_out_removes_every_patch(tokenizer):
    items, seen = make_items(6), []

    def log_probs(batch):
        seen.append(
            (batch["visual_mask"].any(), batch["patch_segment_ids"].any(), (batch["tokens"] == tokenizer.boi_id).any())
        )
        return hashed_log_probs(batch)

    blind = score_items(items, tokenizer, make_config(), log_probs, without_image=True)
    assert not np.any(seen)
    twins = [Item(i.index, i.question, i.options, i.answer, (), i.category, i.hint) for i in items]
    assert blind == score_items(twins, tokenizer, make_config(), hashed_log_probs)


def test_what_cannot_be_scored_is_named_and_the_rest_is_scored(tokenizer):
    good = make_items(3)
    truncated = picture(9)[:-300]
    bad = [
        Item("t", "q?", ("a", "b"), 0, (StoredImage.of(truncated),), "x"),
        Item("z", "q?", ("a", "b"), 0, (StoredImage.of(b""),), "x"),
        Item("n", "q?", ("a", "b"), 0, (StoredImage.of(b"no"),), "x"),
    ]
    scores = score_items(
        [bad[0], good[0], bad[1], good[1], bad[2], good[2]], tokenizer, make_config(), hashed_log_probs
    )
    assert [score.unscored for score in scores] == ["truncated_image", "", "empty_image", "", "not_an_image", ""]
    assert scores[1::2] == score_items(good, tokenizer, make_config(), hashed_log_probs)
    nans = score_items(good, tokenizer, make_config(), lambda batch: np.full(batch["tokens"].shape, np.nan))
    assert [score.unscored for score in nans] == ["not_finite"] * 3
    with pytest.raises(ValueError, match=r"expected .rows, tokens. ="):
        score_items(good, tokenizer, make_config(), lambda batch: np.zeros((1, 1)))


def write_benchmark(path, items: list[Item]):
    """The items as a TSV, without pictures."""
    lines = ["index\tquestion\tA\tB\tanswer\tcategory"]
    lines += [f"{i.index}\t{i.question}\t{i.options[0]}\t{i.options[1]}\t{'AB'[i.answer]}\t{i.category}" for i in items]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_evaluate_writes_what_its_figures_depend_on(tokenizer, tmp_path):
    items = [Item(i.index, i.question, i.options[:2], i.answer, (), i.category) for i in make_items(8)]
    items.append(Item("8", "very long " * 60, ("a", "b"), 0, (), "type 0"))
    path = write_benchmark(tmp_path / "mine.tsv", items)
    config = make_config()
    results = evaluate(
        config,
        Model(oracle(items, tokenizer)),
        tokenizer,
        {"mine": path},
        step=7,
        config_hash="abc",
        output_dir=tmp_path / "eval",
        without_image=True,
    )
    written = json.loads((tmp_path / "eval" / "mine-7.json").read_text())
    files = {path.name for path in (tmp_path / "eval").iterdir()}
    assert files == {"mine-7.json", "mine-7.jsonl", "mine-7.predictions.tsv"}
    assert written == json.loads(json.dumps(results["mine"]))
    assert written["scorer"] == "likelihood, sum of log-probabilities of the option text"
    assert written["image_transform"] == {"patch_size": 8, "min_patches": 4, "max_patches": 36}
    assert {"benchmark", "file", "data_hash", "prompt_template", "config_hash", "step"} <= set(written)
    assert written["overall"]["accuracy"] == 8 / 9 and written["overall"]["num_unscored"] == 1
    assert written["overall"]["accuracy_without_image"] == 8 / 9
    assert written["by_category"]["type 1"]["accuracy"] == 1.0 and written["by_category"]["type 0"]["num_items"] == 5
    assert written["items"] == {str(i): int(i < 8) for i in range(9)}
    assert written["predictions"] == {**{str(i): "AB"[i % 2] for i in range(8)}, "8": None}
    assert written["items_not_scored"] == {"8": "too_long"}
    table = format_table(results)
    for words in (
        "type 0",
        "type 1",
        "overall",
        "accuracy",
        "chance",
        "blind floor",
        "s.e.",
        "0.889",
        "0.500",
        "1 too_long",
    ):
        assert words in table
    assert len({len(line) for line in table.splitlines()[1:7]}) == 1, "columns are aligned"


def test_evaluate_reads_every_file_before_scoring_any(tokenizer, tmp_path):
    path = write_benchmark(tmp_path / "a.tsv", make_items(2))

    def never(batch):
        raise AssertionError("scored although a later file is missing")

    with pytest.raises(ValueError, match=r"no such benchmark file"):
        evaluate(
            make_config(),
            Model(never),
            tokenizer,
            {"a": path, "b": str(tmp_path / "b.tsv")},
            step=0,
            config_hash="",
            output_dir=None,
        )
    with pytest.raises(ValueError, match=r"no benchmark to evaluate"):
        evaluate(make_config(), Model(never), tokenizer, {}, step=0, config_hash="", output_dir=None)
    with pytest.raises(ValueError, match=r"it names the result file"):
        evaluate(make_config(), Model(never), tokenizer, {"a/b": path}, step=0, config_hash="", output_dir=None)


def test_select_benchmarks():
    configured = {"evalmini_seed": "seed.json", "evalmini_pope": "pope.jsonl"}
    assert select_benchmarks(configured, []) == configured
    assert select_benchmarks(configured, ["evalmini_pope"]) == {"evalmini_pope": "pope.jsonl"}
    assert select_benchmarks(configured, ["dir/other.tsv"]) == {"other": "dir/other.tsv"}
    with pytest.raises(ValueError, match=r"unknown benchmark 'evalmini_sed'; did you mean 'evalmini_seed'"):
        select_benchmarks(configured, ["evalmini_sed"])
    with pytest.raises(ValueError, match=r"configured .eval.benchmarks.: evalmini_seed, evalmini_pope"):
        select_benchmarks(configured, ["zzz"])
    with pytest.raises(ValueError, match=r"asked for twice"):
        select_benchmarks(configured, ["evalmini_pope", "evalmini_pope"])
