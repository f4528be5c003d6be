"""Scoring alone: equal to the public scorers item by item, and plain about what does not match."""

import json
import math

import openpyxl
import pytest
from test_benchmarks import COLUMNS, DATA, mmbench_row, needs_data, write_tsv

from unihetero_jax.cli import main
from unihetero_jax.evaluation.official import BENCHMARKS, format_score, score_predictions

EVALMINI, GOLDEN = DATA / "evalmini", DATA / "evalmini" / "golden"
CIRCULAR = (EVALMINI / "MMBench_DEVMINI_circular.tsv", GOLDEN / "DEVMINI_circular_pred.tsv")
VANILLA = (EVALMINI / "MMBench_DEVMINI.tsv", GOLDEN / "DEVMINI_vanilla_pred.tsv")
GROUPS = {
    "AR": "attribute_reasoning", "LR": "logic_reasoning", "RR": "relation_reasoning",
    "FP-C": "finegrained_perception (cross-instance)", "FP-S": "finegrained_perception (instance-level)",
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "DEVMINI_expected.json").read_text())


@needs_data
@pytest.mark.parametrize(
    ("benchmark", "files", "key"), [("mmbench", CIRCULAR, "circular"), ("mmbench-vanilla", VANILLA, "vanilla")]
)
def test_every_item_as_the_harnesses_have_it(benchmark, files, key, expected):
    ours = score_predictions(benchmark, *map(str, files))
    theirs = expected[key]["VLMEvalKit"]
    assert ours["items"] == expected[key]["VLMEvalKit_hits"] and ours["num_items"] == expected[key]["VLMEvalKit_n"]
    table = ours["by_category"] | {short: ours["by_group"][name] for short, name in GROUPS.items()}
    table["Overall"] = ours["overall"]
    assert table == {name: pytest.approx(theirs[name][0], abs=1e-9) for name in set(theirs) - {"split"}}
    lmms = score_predictions(benchmark, *map(str, files), "lmms-eval")
    theirs = expected[key]["lmms_eval_static"]
    assert lmms["overall"] == pytest.approx(theirs["overall"], abs=1e-9) and lmms["overall"] != ours["overall"]
    assert lmms["by_category"] == pytest.approx(theirs["category"], abs=1e-9)
    assert lmms["by_group"] == pytest.approx(theirs["l2"], abs=1e-9)
    assert "VLMEvalKit" in ours["rule"] and "lmms-eval" in lmms["rule"]


@needs_data
def test_seed_bench_by_letters_and_by_losses(expected):
    questions = str(EVALMINI / "SEED-Bench_DEVMINI.json")
    letters = score_predictions("seedbench", questions, str(GOLDEN / "DEVMINI_seed_pred.jsonl"))
    theirs = expected["seed_generate"]["lmms_eval"]
    assert letters["overall"] == pytest.approx(theirs["all"], abs=1e-9) and letters["num_items"] == theirs["n"]
    assert letters["by_group"] == pytest.approx(theirs["per_type"], abs=1e-9)
    assert sorted(letters["by_category"].values()) == pytest.approx(sorted(theirs["per_type"].values()))
    losses = score_predictions("seedbench-likelihood", questions, str(GOLDEN / "DEVMINI_seed_losses.jsonl"))
    theirs = expected["seed_ppl"]["seed_bench_rule"]
    assert 100 * losses["overall"] == pytest.approx(theirs["total_pct"], abs=1e-9)
    assert {k: 100 * v for k, v in losses["by_group"].items()} == pytest.approx(theirs["per_type_pct"], abs=1e-9)


@needs_data
def test_published_seed_bench_predictions():
    path = str(DATA / "eval_samples" / "seedbench1_gpt4v_predictions.json")
    result = score_predictions("seedbench", "", path)
    assert result["overall"] == pytest.approx(0.672834361282436, abs=1e-12)
    assert (result["num_items"], len(result["items"]), result["num_repeated"]) == (17_997, 17_997, 8)


@needs_data
def test_pope_by_three_rules(expected):
    files = str(EVALMINI / "nlvr_statements_DEVMINI.jsonl"), str(GOLDEN / "DEVMINI_pope_pred.jsonl")
    own, kit, lmms = (score_predictions("pope", *files, rule) for rule in BENCHMARKS["pope"].rules)
    theirs = expected["pope"]
    assert {name: own[name] for name in theirs["POPE_evaluate_rule"]} == pytest.approx(
        theirs["POPE_evaluate_rule"], abs=1e-9
    )
    table = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
    for name, ours in table.items():
        assert 100 * kit[ours] == pytest.approx(theirs["VLMEvalKit"][0][name], abs=1e-9)
    coded = theirs["lmms_eval"].pop("yes_ratio_as_coded")
    assert {name: lmms[name] for name in theirs["lmms_eval"]} == pytest.approx(theirs["lmms_eval"], abs=1e-9)
    assert lmms["yes_ratio_of_labels"] == pytest.approx(coded) and lmms["num_unparsed"] == 73


def test_the_three_files_of_pope_are_averaged(tmp_path):
    rows = {"random": ["yes", "no"], "popular": ["yes", "yes"]}
    files = []
    for name, labels in rows.items():
        lines = [{"question_id": i, "image": str(i), "text": "Is it?", "label": one} for i, one in enumerate(labels)]
        answers = [{"question_id": i, "answer": "Yes, it is"} for i in range(2)]
        for kind, content in (("q", lines), ("p", answers)):
            (tmp_path / f"{name}_{kind}.jsonl").write_text("\n".join(map(json.dumps, content)))
        files.append((str(tmp_path / f"{name}_q.jsonl"), str(tmp_path / f"{name}_p.jsonl")))
    questions, predictions = (",".join(paths) for paths in zip(*files, strict=True))
    result = score_predictions("pope", questions, predictions)
    assert result["by_group"] == {"random_q": 0.5, "popular_q": 1.0} and result["overall"] == 0.75
    assert result["num_items"] == 4 and result["items"]["random_q/1"] == 0
    of_random = math.sqrt(0.5) / 2
    assert result["errors"]["by_group"] == {"random_q": pytest.approx(of_random), "popular_q": 0.0}
    assert result["standard_error"] == pytest.approx(of_random / 2) == result["errors"]["figures"]["accuracy"]
    assert result["f1"] == pytest.approx((2 / 3 + 1) / 2) and "mean over 2 files" in format_score(result)
    with pytest.raises(ValueError, match="as many files of one as of the other"):
        score_predictions("pope", questions, files[0][1])


def rotations(index="0", options=("cat", "dog", "frog"), answer=1, **changes):
    """The rows of an item, option j of row k being option (j + k) mod n."""
    rows = []
    for k in range(len(options)):
        moved = options[k:] + options[:k]
        letters = dict(zip("ABCD", moved, strict=False))
        right = "ABCD"[moved.index(options[answer])]
        rows.append(mmbench_row(index=str(int(index) + k * 1_000_000), answer=right, **letters, **changes))
    return rows


def predicted(path, answers):
    rows = [{"index": index, "prediction": text} for index, text in answers.items()]
    return str(write_tsv(path, rows, ("index", "prediction")))


def test_an_item_is_right_only_in_all_rotations(tmp_path):
    questions = str(write_tsv(tmp_path / "q.tsv", rotations() + rotations("7")))
    right = {"0": "B", "1000000": "A", "2000000": "C", "7": "B", "1000007": "A", "2000007": "dog"}
    everything = score_predictions("mmbench", questions, predicted(tmp_path / "p.tsv", right))
    assert everything["items"] == {"0": 1, "7": 1} and everything["num_rows"] == 6
    always_a = dict.fromkeys(right, "A")
    assert score_predictions("mmbench", questions, predicted(tmp_path / "p.tsv", always_a))["overall"] == 0.0
    right["2000000"] = "what?"
    result = score_predictions("mmbench", questions, predicted(tmp_path / "p.tsv", right))
    assert result["items"] == {"0": 0, "7": 1}
    assert (result["num_unparsed"], result["num_unparsed_rows"]) == (1, 1)
    vanilla = score_predictions("mmbench-vanilla", questions, predicted(tmp_path / "p.tsv", right))
    assert vanilla["overall"] == 1.0 and vanilla["num_rotated_rows_left_out"] == 4
    assert vanilla["num_unanswered"] == vanilla["num_unknown_predictions"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(1), r"1 of 1 items .* item 0: 2 of 3 rotations are there \(rows 0, 2000000\)"),
        (lambda rows: rows.pop(0), r"rows 1000000, 2000000 repeat it, and it is not there itself"),
        (lambda rows: rows[1].update(A="frog", C="dog"), "row 1000000 does not have its options in rotated order"),
        (lambda rows: rows[1].update(answer="B"), "another right answer"),
        (lambda rows: rows.append(dict(rows[0])), "must be unique, repeated: 0"),
        (lambda rows: rows.append(dict(rows[1], index="3000000")), "4 of 3 rotations are there"),
        (lambda rows: rows[0].update(answer=""), "row 2: no right answer; a TEST file"),
        (lambda rows: rows[0].update(answer="D"), "row 2: .*column answer: expected one of A, B, C, got 'D'"),
    ],
)
def test_incomplete_or_contradictory_items_are_refused(tmp_path, change, message):
    rows = rotations()
    change(rows)
    questions = str(write_tsv(tmp_path / "q.tsv", rows))
    with pytest.raises(ValueError, match=message):
        score_predictions("mmbench", questions, predicted(tmp_path / "p.tsv", {"0": "A"}))


def test_options_that_look_missing_are_options(tmp_path):
    """pandas would read None, NA and null as missing, and 3 as 3.0."""
    rows = [mmbench_row(A="None", B="NA", C="3", answer="A"), mmbench_row(index="1", A="null", B="3", answer="B")]
    questions = str(write_tsv(tmp_path / "q.tsv", rows))
    result = score_predictions("mmbench-vanilla", questions, predicted(tmp_path / "p.tsv", {"0": "none", "1": "3"}))
    assert result["items"] == {"0": 1, "1": 1}


def test_questions_without_options_are_judged_as_vlmevalkit_does_in_mmmu(tmp_path):
    rows = [mmbench_row(index=str(i), A="", B="", answer="twelve") for i in range(3)] + [mmbench_row(index="3")]
    questions = str(write_tsv(tmp_path / "q.tsv", rows))
    answers = {"0": "It is Twelve.", "1": "thirteen", "2": "A", "3": "A"}
    result = score_predictions("mmbench-vanilla", questions, predicted(tmp_path / "p.tsv", answers))
    assert result["items"] == {"0": 1, "1": 0, "2": 1, "3": 1} and result["num_unparsed"] == 1


def test_what_does_not_match_is_counted_and_said(tmp_path):
    rows = [mmbench_row(index=str(i), comment="x", strange="y") for i in range(9)]
    questions = str(write_tsv(tmp_path / "q.tsv", rows, (*COLUMNS, "comment", "strange")))
    answers = {"0": "A", "1": "", "900": "A", "901": "B"}
    result = score_predictions("mmbench-vanilla", questions, predicted(tmp_path / "p.tsv", answers))
    assert result["overall"] == pytest.approx(1 / 9) and result["num_unparsed"] == 8
    assert (result["num_unanswered"], result["unanswered"]) == (7, ["2", "3", "4", "5", "6"])
    assert (result["num_unknown_predictions"], result["unknown_predictions"]) == (2, ["900", "901"])
    text = format_score(result)
    assert "7 without a prediction, counted as misses: 2, 3, 4, 5, 6 and 2 more" in text
    assert "2 predictions for no question, not scored: 900, 901" in text
    assert "columns of the questions that nothing here reads: strange" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tprediction\n", "no predictions in it"),
        ("", "no predictions in it"),
        ("index\tanswer\n0\tA\n", r"row 2: a prediction is missing \(one of prediction\); found: index, answer"),
        ("number\tprediction\n0\tA\n", "row 2: an identifier is missing"),
        ("index\tprediction\n0\tA\n0\tB\n", "1 items have several predictions"),
        ("index\tprediction\n77\tA\n", r"no prediction is for a question of .* \(it has items 77, asked are 0\)"),
        ("index\tprediction\n0\n", "row 2 .* has 1 cells, the header 2"),
    ],
)
def test_faulty_predictions_are_refused(tmp_path, content, message):
    questions = str(write_tsv(tmp_path / "q.tsv", [mmbench_row()]))
    path = tmp_path / "p.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        score_predictions("mmbench-vanilla", questions, str(path))


def test_a_workbook_of_vlmevalkit(tmp_path):
    """With the types that a sheet gives back: numbers for indices and for options, nothing for an empty text."""
    book = openpyxl.Workbook()
    for row in (["index", "question", "prediction"], [0, "What?", "A"], [1.0, "What?", 3], [2, "What?", None]):
        book.active.append(row)
    book.save(tmp_path / "model_set.xlsx")
    rows = [mmbench_row(), mmbench_row(index="1", A="2", B="3", answer="B"), mmbench_row(index="2")]
    result = score_predictions(
        "mmbench-vanilla", str(write_tsv(tmp_path / "q.tsv", rows)), str(tmp_path / "model_set.xlsx")
    )
    assert result["items"] == {"0": 1, "1": 1, "2": 0} and result["num_unparsed"] == 1
    (tmp_path / "broken.xlsx").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"broken.xlsx: no Excel workbook"):
        score_predictions("mmbench-vanilla", str(tmp_path / "q.tsv"), str(tmp_path / "broken.xlsx"))


def mme_rows():
    """Two pictures in color, one in OCR, two questions each."""
    kinds = [("color", "a.png"), ("color", "b.png"), ("OCR", "c.png")]
    return [
        {"index": str(2 * i + j), "question": "Is it?", "answer": answer, "category": kind, "image_path": name}
        for i, (kind, name) in enumerate(kinds)
        for j, answer in enumerate(("Yes", "No"))
    ]


def test_mme_adds_accuracy_and_accuracy_of_both(tmp_path):
    columns = ("index", "question", "answer", "category", "image_path")
    questions = str(write_tsv(tmp_path / "mme.tsv", mme_rows(), columns))
    answers = {"0": "Yes", "1": "No.", "2": "yes", "3": "yes", "4": "no", "5": "perhaps"}
    result = score_predictions("mme", questions, predicted(tmp_path / "p.tsv", answers))
    assert result["by_category"] == {"color": 75.0 + 50.0, "OCR": 0.0} and result["overall"] == 125.0
    assert result["by_group"] == {"perception": 125.0, "cognition": 0.0} and len(result["missing_categories"]) == 12
    assert result["accuracy"] == 0.5 and result["num_unparsed"] == 1
    # Pictures of 200 and 50 points: their spread over the root of two; of one picture there is no spread.
    assert result["errors"]["by_category"] == {"color": pytest.approx(75 / math.sqrt(2)), "OCR": 0.0}
    assert result["standard_error"] == pytest.approx(75 / math.sqrt(2)) == result["errors"]["by_group"]["perception"]
    assert "125.0 ± 53.0" in format_score(result)
    with pytest.raises(ValueError, match="MME's points are of one file"):
        score_predictions("mme", f"{questions},x.tsv", "p.tsv,q.tsv")
    write_tsv(tmp_path / "mme.tsv", mme_rows()[:-1], columns)
    with pytest.raises(ValueError, match=r"two questions on each picture; not so for c\.png"):
        score_predictions("mme", questions, predicted(tmp_path / "p.tsv", answers))


VQA_ANSWERS = [{"answer": text, "answer_id": i} for i, text in enumerate(["two"] * 3 + ["many"] * 7)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vqav2.json", {"annotations": [{"question_id": 5, "answer_type": "number", "answers": VQA_ANSWERS}]}),
        ("textvqa.json", {"data": [{"question_id": 5, "answers": [a["answer"] for a in VQA_ANSWERS]}]}),
        ("vqacp.json", [{"question_id": 5, "answer_type": "number", "answers": VQA_ANSWERS}]),
    ],
)
def test_open_answers_in_the_layouts_of_their_benchmarks(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps([{"question_id": 5, "answer": "2"}]))
    result = score_predictions("vqa", str(tmp_path / name), str(tmp_path / "results.json"))
    assert result["items"] == {"5": pytest.approx(0.9)} and result["num_items"] == 1
    own = score_predictions("vqa", str(tmp_path / name), str(tmp_path / "results.json"), "vqa")
    assert own["overall"] == pytest.approx(0.9), "people differ, so all answers are normalised"


def test_gqa_matches_one_answer(tmp_path):
    questions = {
        "a1": {"question": "Who?", "answer": "man", "imageId": "7", "types": {"structural": "query"}},
        "b2": {"question": "Is it?", "answer": "yes", "imageId": "7", "types": {"structural": "verify"}},
    }
    answers = [{"questionId": "a1", "prediction": "Man."}, {"questionId": "b2", "prediction": "no"}]
    (tmp_path / "gqa.json").write_text(json.dumps(questions))
    (tmp_path / "p.json").write_text(json.dumps(answers))
    result = score_predictions("gqa", str(tmp_path / "gqa.json"), str(tmp_path / "p.json"))
    assert result["items"] == {"a1": 1.0, "b2": 0.0} and result["by_category"] == {"query": 1.0, "verify": 0.0}
    with pytest.raises(ValueError, match="the leave-one-out accuracy needs those of several people"):
        score_predictions("vqa", str(tmp_path / "gqa.json"), str(tmp_path / "p.json"))


def test_the_command_prints_and_writes(tmp_path, capsys):
    questions = write_tsv(tmp_path / "q.tsv", rotations())
    source = predicted(tmp_path / "p.tsv", {"0": "B", "1000000": "A", "2000000": "C"})
    out = tmp_path / "made" / "out.json"
    files = [f"--questions={questions}", f"--predictions={source}", f"--output={out}"]
    assert main(["score", "--benchmark=mmbench", *files]) == 0
    found = json.loads(out.read_text())
    assert {"overall", "num_items", "num_unparsed", "by_category", "by_group", "items", "rule"} <= set(found)
    assert found["overall"] == 1.0 and found["items"] == {"0": 1}
    assert found["errors"]["by_category"] == {"animal": 0.0}
    assert "animal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predictions=nowhere.tsv"], "nowhere.tsv: no such file of predictions"),
        (["--predictions={p}", "--questions=nowhere.tsv"], "nowhere.tsv: no such benchmark file"),
        (["--predictions={p}"], "--questions: mmbench needs the benchmark's own file"),
        (["--predictions={p}", "--rule=mine"], "--rule mine: for mmbench there are vlmevalkit, lmms-eval"),
        (["--predictions={p}", "--config.a=1"], "score takes no --config fields"),
    ],
)
def test_faulty_flags_say_what_to_do(tmp_path, capsys, flags, message):
    source = predicted(tmp_path / "p.tsv", {"0": "B"})
    assert main(["score", "--benchmark=mmbench", *(flag.format(p=source) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
