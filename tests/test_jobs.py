"""The whole job path with models that are known: what they must score, what a kill may not change, who writes."""

import base64
import json
import math
import random
import string
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from test_benchmarks import RED, mmbench_row, write_tsv
from test_multiple_choice import hashed_log_probs, make_config, make_items, sequences, tokenizer  # noqa: F401
from test_official import rotations

from unihetero_jax import distributed
from unihetero_jax.evaluation import jobs, official
from unihetero_jax.evaluation.benchmarks import read_benchmark
from unihetero_jax.evaluation.jobs import run_job
from unihetero_jax.evaluation.runner import Model, evaluate, format_table

COUNT = 37
"""Items; a number that shards, rows and batches do not divide."""


@pytest.fixture
def circular(tmp_path):
    """A file of questions with all rotations, two to four options each, the right one anywhere."""
    words = ("cat", "dog", "frog", "bird")
    rows = []
    for i in range(COUNT):
        options = words[: 2 + i % 3]
        rows += rotations(
            str(i), options, i % len(options), question=f"What is on picture {i}?", category=f"type {i % 4}"
        )
    return str(write_tsv(tmp_path / "circular.tsv", rows))


def run(path, model, tokenizer, mode, folder=None, **changes):  # noqa: F811
    config = make_config(**{"row_tokens": 256} | changes)
    return evaluate(
        config, model, tokenizer, {"set": path}, step=3, config_hash="abc", output_dir=folder, mode=mode
    )["set"]  # fmt: skip


def knowing(path, choose):
    """`generate` of a model that looks the question up: `choose(item)` is its answer."""
    by_prompt = {}
    for item in read_benchmark(path, rotations=True).items:
        by_prompt[item.question, item.options] = choose(item)

    def generate(prompts):
        answers = []
        for text, _ in prompts:
            question = text.split("Question: ")[1].split("\n")[0]
            options = tuple(line[3:] for line in text.split("\n") if line[1:3] == ". ")
            answers.append(by_prompt[question, options])
        return answers

    return Model(hashed_log_probs, generate=generate)


@pytest.mark.parametrize("answer", ["letter", "text", "sentence"])
def test_an_oracle_that_answers_is_always_right(circular, tokenizer, answer):  # noqa: F811
    forms = {
        "letter": lambda item: string.ascii_uppercase[item.answer],
        "text": lambda item: item.answer_text.upper(),
        "sentence": lambda item: (
            f"The correct answer is **{string.ascii_uppercase[item.answer]}**, as anyone can see here"
        ),
    }
    result = run(circular, knowing(circular, forms[answer]), tokenizer, "generation")
    assert result["overall"]["accuracy"] == 1.0 and result["overall"]["num_items"] == COUNT
    assert result["official"]["num_rows"] == len(read_benchmark(circular, rotations=True).items)
    assert result["overall"]["num_unparsed"] == 0 and "all rotations" in result["rule"]


def test_one_that_always_says_a_gets_nothing_in_circles(circular, tokenizer):  # noqa: F811
    result = run(
        circular, Model(hashed_log_probs, generate=lambda prompts: ["A"] * len(prompts)), tokenizer, "generation"
    )
    assert result["overall"]["accuracy"] == 0.0 and result["overall"]["num_unparsed"] == 0


def test_one_that_says_nothing_is_unparsed_not_guessed(circular, tokenizer):  # noqa: F811
    model = Model(hashed_log_probs, generate=lambda prompts: ["I would rather not"] * len(prompts))
    result = run(circular, model, tokenizer, "generation")
    assert result["overall"]["accuracy"] == 0.0 and result["overall"]["num_unparsed"] == COUNT
    assert f"the rule found none, counted as misses: {COUNT}" in format_table({"set": result})


def letter_log_probs(tokenizer, favour):  # noqa: F811
    """Favours one letter: log p 0 for its token, else -5."""
    ids = {tokenizer.encode(f" {letter}")[-1]: letter for letter in "ABCD"}

    def log_probs(batch):
        result = np.full(batch["tokens"].shape, -5.0, np.float32)
        for row, places in sequences(batch):
            counted = places[batch["text_loss_mask"][row, places]]
            if len(counted) and ids.get(int(batch["tokens"][row, counted[-1]])) == favour:
                result[row, counted] = 0.0
        return result

    return log_probs


def test_letters_that_are_all_a_are_right_as_often_as_a_is(circular, tokenizer):  # noqa: F811
    result = run(circular, Model(letter_log_probs(tokenizer, "A")), tokenizer, "letters")
    assert result["overall"]["accuracy_circular"] == result["overall"]["accuracy_circular_error"] == 0.0
    assert set(result["items"].values()) == {0}
    items = read_benchmark(circular, rotations=True).items
    assert result["overall"]["accuracy"] == sum(item.answer == 0 for item in items) / len(items)
    positions = result["positions"]
    assert positions["A"]["chosen"] == 1.0 and positions["B"]["chosen"] == 0.0
    assert positions["A"]["right"] == result["overall"]["accuracy"]
    assert positions["D"]["num_offered"] == sum(len(item.options) == 4 for item in items)


def test_a_model_that_knows_nothing_gets_chance(tmp_path, tokenizer):  # noqa: F811
    rows = [
        mmbench_row(index=str(i), question=f"question {i}", C="red", D="green", answer="ABCD"[i % 4], image="")
        for i in range(400)
    ]  # fmt: skip
    path = str(write_tsv(tmp_path / "many.tsv", rows))
    for mode in ("likelihood", "letters"):
        overall = run(path, Model(hashed_log_probs), tokenizer, mode)["overall"]
        assert overall["chance"] == 0.25 and 0 < overall["standard_error"] < 0.03
        # By the mean: the sum favours options of few tokens, which is another prior.
        accuracy = overall["accuracy_mean_normalized"]
        assert abs(accuracy - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 400), (mode, accuracy)


def test_the_files_for_other_harnesses_score_the_same(circular, tokenizer, tmp_path):  # noqa: F811
    model = knowing(circular, lambda item: string.ascii_uppercase[(item.answer + (int(item.index) % 5 == 0)) % 2])
    result = run(circular, model, tokenizer, "generation", tmp_path / "eval")
    written = tmp_path / "eval" / "set-generation-3.predictions.tsv"
    again = official.score_predictions("mmbench", circular, str(written))
    assert again["items"] == result["items"] and 0 < again["overall"] < 1
    assert again["by_category"] == {name: row["accuracy"] for name, row in result["by_category"].items()}
    columns = Path(circular).read_text().split("\n")[0].split("\t")
    assert written.read_text().split("\n")[0].split("\t") == [c for c in columns if c != "image"] + ["prediction"]


@pytest.mark.parametrize("options", [("Yes", "No"), ("yes", "no")])
def test_yes_no_tables_in_circles(tmp_path, tokenizer, options):  # noqa: F811
    """One that always says yes is right in every rotation of the options where yes is right."""
    rows = [row for i in range(6) for row in rotations(str(i), options, i % 2, category="existence")]
    path = str(write_tsv(tmp_path / "yesno.tsv", rows))
    result = run(
        path, Model(hashed_log_probs, generate=lambda prompts: ["Yes"] * len(prompts)), tokenizer, "generation"
    )
    assert result["items"] == {str(i): int(i % 2 == 0) for i in range(6)} and result["overall"]["chance"] == 0.25


def test_a_uniform_guesser_gets_chance_in_circles(circular, tokenizer):  # noqa: F811
    rng = random.Random(0)
    guess = Model(
        hashed_log_probs, generate=lambda prompts: [rng.choice("ABCD"[: t.count("\n") - 3]) for t, _ in prompts]
    )
    overall = run(circular, guess, tokenizer, "generation")["overall"]
    assert overall["chance"] == pytest.approx(np.mean([(2 + i % 3) ** -(2 + i % 3) for i in range(COUNT)]))
    spread = math.sqrt(overall["chance"] * (1 - overall["chance"]) / COUNT)
    assert abs(overall["accuracy"] - overall["chance"]) < 3 * spread and overall["num_unparsed"] == 0


def test_an_item_that_only_fails_with_its_picture(tmp_path, tokenizer):  # noqa: F811
    broken = base64.b64encode(RED[:-40]).decode()
    path = str(write_tsv(tmp_path / "x.tsv", [mmbench_row(image=broken), mmbench_row(index="1", image="")]))
    config = make_config(row_tokens=256)
    facts = {"step": 1, "config_hash": "x", "output_dir": None, "without_image": True}
    result = evaluate(config, Model(hashed_log_probs), tokenizer, {"set": path}, **facts)["set"]
    assert set(result["items_not_scored"]) == {"0"} and 0 <= result["overall"]["accuracy_prior_normalized"] <= 0.5


def test_answers_of_other_parameters_are_not_used(circular, tokenizer, tmp_path):  # noqa: F811
    say = lambda text: lambda prompts: [text] * len(prompts)  # noqa: E731
    for letter in "AB":
        model = Model(hashed_log_probs, generate=say(letter), identity={"parameters": letter})
        result = run(circular, model, tokenizer, "generation", tmp_path / "eval")
        assert set(result["predictions"].values()) == {letter}


def test_yes_and_no_are_written_as_words(tmp_path, tokenizer):  # noqa: F811
    """POPE's rule would read a letter as yes."""
    rows = [
        {"question_id": i, "image": "x.png", "text": f"Is it {i}?", "label": ("yes", "no")[i % 2]} for i in range(9)
    ]
    path = tmp_path / "pope.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "x.png").write_bytes(RED)
    for mode in ("likelihood", "letters"):
        result = run(str(path), Model(hashed_log_probs), tokenizer, mode, tmp_path / "eval")
        written = max((tmp_path / "eval").glob("*.predictions.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        again = official.score_predictions("pope", str(path), str(written))
        assert again["items"] == result["items"] and again["accuracy"] == result["overall"]["accuracy"]
        assert 0 < again["yes_ratio"] < 1


# ---------------------------------------------------------------- shards


class Stop(Exception):
    """A kill between two shards."""


def counting(calls, stop_after=None):
    def answer(items):
        if stop_after is not None and len(calls) == stop_after:
            raise Stop
        calls.append([item.index for item in items])
        return [{"index": item.index, "value": int(item.index) ** 2} for item in items]

    return answer


@pytest.mark.parametrize("shard_items", [1, 5, 36, 37, 100])
def test_every_item_exactly_once(tmp_path, shard_items):
    items, calls, seen = make_items(COUNT), [], []
    stem = epath.Path(tmp_path / "eval" / "a-1")
    answers = run_job(stem, {}, items, shard_items, counting(calls), lambda *x: seen.append(x))
    assert [answer["index"] for answer in answers] == [item.index for item in items]
    assert [index for call in calls for index in call] == [item.index for item in items]
    assert len(calls) == math.ceil(COUNT / shard_items) and seen[-1] == (COUNT, COUNT)
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["a-1.jsonl"]
    header, *lines = (json.loads(line) for line in (tmp_path / "eval" / "a-1.jsonl").read_text().splitlines())
    assert lines == answers and header["num_items"] == COUNT


@pytest.mark.parametrize("stop_after", range(8))
def test_a_killed_job_goes_on_where_it_was(tmp_path, stop_after):
    items, first, second = make_items(COUNT), [], []
    stem = epath.Path(tmp_path / "a-1")
    with pytest.raises(Stop):
        run_job(stem, {"step": 1}, items, 5, counting(first, stop_after))
    assert len(first) == stop_after
    answers = run_job(stem, {"step": 1}, items, 5, counting(second))
    assert answers == run_job(None, {}, items, 5, counting([]))
    assert first + second == [[item.index for item in items[i : i + 5]] for i in range(0, COUNT, 5)]


def test_answers_of_another_model_or_half_a_file_are_not_used(tmp_path):
    items, stem, calls = make_items(COUNT), epath.Path(tmp_path / "a-1"), []
    for identity in ({"step": 1}, {"step": 2}):
        with pytest.raises(Stop):
            run_job(stem, identity, items, 5, counting([], 3))
    part = jobs._part_path(stem, {"num_shards": 8}, 1)
    part.write_text(part.read_text()[:-20])
    run_job(stem, {"step": 2}, items, 5, counting(calls))
    assert [call[0] for call in calls] == ["5", "15", "20", "25", "30", "35"], "the shards 0 and 2 were there"


def test_a_finished_job_is_read(tmp_path):
    items, stem = make_items(COUNT), epath.Path(tmp_path / "a-1")
    answers = run_job(stem, {}, items, 5, counting([]))
    assert run_job(stem, {}, items, 5, counting([], 0)) == answers
    with pytest.raises(Stop):
        run_job(stem, {"changed": 1}, items, 5, counting([], 0))


def test_rows_of_two_processes_make_the_whole(tokenizer, monkeypatch):  # noqa: F811
    """Each process lays out its rows only; what they found goes to process 0 as text."""
    from unihetero_jax.evaluation.multiple_choice import score_items

    items, config, sent = make_items(COUNT), make_config(), []
    whole = score_items(items, tokenizer, config, hashed_log_probs)

    def half(rows):
        shapes = []

        def log_probs(batch):
            shapes.append(len(batch["tokens"]))
            return hashed_log_probs(batch)

        found = score_items(items, tokenizer, config, log_probs, own_rows=lambda count: rows)
        assert set(shapes) == {len(rows)}
        return found

    def send(name, text):
        sent.append(text)
        return [] if len(sent) == 1 else list(sent)

    monkeypatch.setattr(distributed, "gather", send)
    assert half([1]) == [] and half([0, 2]) == whole
