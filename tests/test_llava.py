"""LLaVA conversations to records: literal entries in, literal records or reasons out."""

import gzip
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.entries import Dropped
from data_pipelines.llava import LlavaOptions, parse_entry, read_llava
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def png(color, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"red.png": png("red"), "blue.png": png("blue", (4, 10)), "text.png": b"no image"}
RED = ImageSegment(FILES["red.png"], 6, 8)
BLUE = ImageSegment(FILES["blue.png"], 10, 4)
WHERE = "set.json[3]"


def read_image(name):
    if name not in FILES:
        raise RecordError("missing_image", f"{name} does not exist")
    return FILES[name]


def talk(*values):
    """Messages of a person and a model in turn."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def parse(conversations, image="red.png", **options):
    entry = {"id": "7", "image": image, "conversations": conversations}
    if image is None:
        del entry["image"]
    return parse_entry(entry, read_image, LlavaOptions("set", **options), WHERE)


def asked(text, branch=0):
    return TextSegment(text, False, branch)


def answered(text, branch=0):
    return TextSegment(text, True, branch)


def test_independent_turns_share_the_image_alone():
    record = parse(talk("<image>\nWhat is it?", "red", "  Is it big? ", " no "))
    segments = (RED, asked("What is it?", 1), answered(" red", 1), asked("Is it big?", 2), answered(" no", 2))
    assert record == Record("set", "vqa", segments, {"id": "7"})
    assert record.where == WHERE


def test_turns_of_a_dialogue_follow_each_other():
    record = parse(talk("What is it?\n<image>", "red", "Is it big?", "no"), turns="dialogue")
    assert record.segments == (RED, asked("What is it?"), answered(" red"), asked("\nIs it big?"), answered(" no"))


def test_an_entry_without_image_is_text_and_without_id_is_named_by_its_place():
    entry = {"conversations": talk("Who?", "I")}
    record = parse_entry(entry, read_image, LlavaOptions("set"), WHERE)
    assert record == Record("set", "text", (asked("Who?", 1), answered(" I", 1)), {"id": WHERE})


def test_several_images_stay_in_their_places_in_a_dialogue():
    values = ("First <image>\nthen <image> : which is red?", "the first", "Sure?", "yes")
    record = parse(talk(*values), ["red.png", "blue.png"], turns="dialogue")
    assert record.segments == (
        asked("First"), RED, asked("then"), BLUE, asked(": which is red?"),
        answered(" the first"), asked("\nSure?"), answered(" yes"),
    )  # fmt: skip


def test_images_of_later_questions_stay_in_their_places_in_a_dialogue():
    values = ("<image>\nWhat is it?", "red", "<image>\nAnd this?", "blue", "Is <image> first?", "yes", "Sure?", "no")
    record = parse(talk(*values), ["red.png", "blue.png", "red.png"], turns="dialogue")
    assert record.kind == "vqa"
    assert record.segments == (
        RED, asked("What is it?"), answered(" red"),
        asked("\n"), BLUE, asked("And this?"), answered(" blue"),
        asked("\nIs"), RED, asked("first?"), answered(" yes"),
        asked("\nSure?"), answered(" no"),
    )  # fmt: skip


def test_a_single_image_of_a_later_question_stays_there_too():
    record = parse(talk("Hello", "Hi", "And <image>?", "red"), turns="dialogue")
    assert record.segments == (
        asked("Hello"), answered(" Hi"), asked("\nAnd"), RED, asked("?"), answered(" red"),
    )  # fmt: skip


def test_images_of_turns_that_are_left_out_are_not_read():
    values = ("<image>\nWhat?", "red", "<image>\nAnd?", "gone")
    record = parse(talk(*values), ["red.png", "gone.png"], turns="dialogue", last_turn=1)
    assert record.segments == (RED, asked("What?"), answered(" red"))
    record = parse(talk("Hello", "Hi", *values), ["red.png", "gone.png"], turns="dialogue", last_turn=1)
    assert (record.kind, record.segments) == ("text", (asked("Hello"), answered(" Hi")))


def test_questions_with_images_in_places_are_reworded_too():
    values = ("<image><image>\nHow many?" + CHOICES, "C.")
    options = {"turns": "dialogue", "choices": "text", "replacements": {"many": "few"}}
    record = parse(talk(*values), ["red.png", "blue.png"], **options)
    assert record.segments == (RED, BLUE, asked("How few?"), answered(" 5"))
    dropped = parse(talk("<image>?\nA. <image>\nB. 3", "B"), ["red.png", "blue.png"], **options)
    assert dropped.reason == "image_count" and "option" in dropped.where


@pytest.mark.parametrize("question", ["user", "human"])
@pytest.mark.parametrize("answer", ["assistant", "gpt"])
def test_roles_and_keys_of_sets_like_sharegpt(question, answer):
    conversation = [{"from": "system", "value": "Be brief."}, *talk("<image>\nWhat?", "red", "Big?", "no")]
    roles = ["system", question, answer, question, answer]
    messages = [{"role": role, "content": message["value"]} for role, message in zip(roles, conversation, strict=True)]
    expected = parse(conversation)
    assert isinstance(expected, Record)
    for entry in (
        {"id": "7", "images": ["red.png"], "messages": messages},
        {"id": "7", "image": "red.png", "conversations": messages},
        {"id": "7", "images": "red.png", "messages": [{"from": m["role"], "value": m["content"]} for m in messages]},
    ):
        assert parse_entry(entry, read_image, LlavaOptions("set"), WHERE) == expected


CAULDRON = {
    "images": ["red.png", "blue.png"],
    "texts": [
        {"user": "Which is red?\nAnswer briefly.", "assistant": "The first.", "source": "x"},
        {"user": " Which is blue?", "assistant": "The second. ", "source": "x"},
    ],
}


def test_texts_of_the_cauldron_are_turns_about_all_images():
    record = parse_entry(CAULDRON, read_image, LlavaOptions("set"), WHERE)
    assert record == Record(
        "set", "vqa",
        (RED, BLUE, asked("Which is red?\nAnswer briefly.", 1), answered(" The first.", 1),
         asked("Which is blue?", 2), answered(" The second.", 2)),
        {"id": WHERE},
    )  # fmt: skip
    record = parse_entry(CAULDRON, read_image, LlavaOptions("set", turns="dialogue", first_turn=1), WHERE)
    assert record.segments == (RED, BLUE, asked("Which is blue?"), answered(" The second."))


BAD_TEXTS = {
    "none": ([], "empty_conversation"),
    "no_list": ("Which?", "empty_conversation"),
    "no_object": (["Which?"], "bad_conversation"),
    "no_assistant": ([{"user": "Which?"}], "bad_conversation"),
    "null_user": ([{"user": None, "assistant": "red"}], "bad_conversation"),
    "blank_assistant": ([{"user": "Which?", "assistant": " "}], "empty_answer"),
    "mark": ([{"user": "<image>Which?", "assistant": "red"}], "image_count"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts_of_the_cauldron_have_a_reason(name):
    texts, reason = BAD_TEXTS[name]
    dropped = parse_entry({"images": ["red.png"], "texts": texts}, read_image, LlavaOptions("set"), WHERE)
    assert dropped.reason == reason and dropped.where.startswith(f"{WHERE}: {reason}")


@pytest.mark.parametrize("value", ["<image>\nWhat is it?", "What is it?\n<image>", "<image>What is it?"])
@pytest.mark.parametrize("turns", ["independent", "dialogue"])
def test_a_system_message_goes_before_the_first_question_alone(value, turns):
    conversation = [{"from": "system", "value": " Be brief. "}, *talk(value, "red", "Is it big?", "no")]
    record = parse(conversation, turns=turns)
    assert record.segments[:2] == (RED, asked("Be brief.\nWhat is it?", 1 if turns == "independent" else 0))
    assert record.segments[2:] == parse(conversation[1:], turns=turns).segments[2:]


def test_a_system_message_that_is_empty_or_whose_turn_is_left_out_adds_nothing():
    plain = talk("<image>\nWhat is it?", "red", "Is it big?", "no")
    assert parse([{"from": "system", "value": " \n"}, *plain]) == parse(plain)
    assert parse([{"from": "system", "value": "Be brief."}, *plain], first_turn=1) == parse(plain, first_turn=1)


def test_a_system_message_stands_before_the_images_of_a_dialogue():
    conversation = [{"from": "system", "value": "Be brief."}, *talk("<image><image>Same?", "no")]
    record = parse(conversation, ["red.png", "blue.png"], turns="dialogue")
    assert record.segments == (asked("Be brief."), RED, BLUE, asked("Same?"), answered(" no"))


CHOICES = "\nA. 4\nB. 0\nC. 5\nAnswer with the option's letter from the given choices directly."


def test_multiple_choice_as_text_or_as_letters():
    conversation = talk("<image>\nHow many?" + CHOICES, "C.")
    assert parse(conversation, choices="text").segments == (RED, asked("How many?", 1), answered(" 5", 1))
    assert parse(conversation).segments == (RED, asked("How many?" + CHOICES, 1), answered(" C.", 1))
    plain = talk("<image>\nHow many?\nA. Few or what?", "5")
    assert parse(plain, choices="text").segments[1:] == (asked("How many?\nA. Few or what?", 1), answered(" 5", 1))


def test_turns_are_selected_and_reworded():
    values = ("<image>\nTrue? A.", "yes", "How many?", "5", "Where?", "here")
    record = parse(talk(*values), first_turn=1, last_turn=2, replacements={"many": "few"})
    assert record.segments == (RED, asked("How few?", 1), answered(" 5", 1))


Q = talk("<image>\nWhat?", "red")
REFUSED = {
    "two_questions": ([*Q[:1], *Q], "red.png", {}, "bad_conversation"),
    "no_answer": (Q[:1], "red.png", {}, "bad_conversation"),
    "answer_first": (Q[::-1], "red.png", {}, "bad_conversation"),
    "other_role": ([{"from": "tool", "value": "x"}, *Q], "red.png", {}, "bad_conversation"),
    "system_in_the_middle": ([*Q, {"from": "system", "value": "x"}, *Q], "red.png", {}, "bad_conversation"),
    "two_systems": ([{"from": "system", "value": "x"}] * 2 + Q, "red.png", {}, "bad_conversation"),
    "system_no_text": ([{"from": "system", "value": None}, *Q], "red.png", {}, "bad_conversation"),
    "system_and_no_answer": ([{"from": "system", "value": "x"}, Q[0]], "red.png", {}, "bad_conversation"),
    "system_alone": ([{"from": "system", "value": "x"}], None, {}, "empty_conversation"),
    "no_object": (["What?", "red"], "red.png", {}, "bad_conversation"),
    "no_text": (talk("<image>", 5), "red.png", {}, "bad_conversation"),
    "no_conversation": ([], "red.png", {}, "empty_conversation"),
    "no_list": ("What?", "red.png", {}, "empty_conversation"),
    "no_mark": (talk("What?", "red"), "red.png", {}, "image_count"),
    "mark_without_image": (Q, None, {}, "image_count"),
    "two_marks": (talk("<image><image>What?", "red"), "red.png", {}, "image_count"),
    "mark_later": (talk("What?", "red", "<image>And?", "red"), "red.png", {}, "image_count"),
    "blank_answer": (talk("<image>What?", " \n"), "red.png", {}, "empty_answer"),
    "no_such_option": (talk("<image>What?" + CHOICES, "D"), "red.png", {"choices": "text"}, "answer_not_an_option"),
    "option_twice": (talk("<image>?\nA. 1\nA. 2", "A"), "red.png", {"choices": "text"}, "answer_not_an_option"),
    "no_turn": (Q, "red.png", {"first_turn": 1}, "no_turn_selected"),
    "mark_in_answer": (talk("What?", "<image>"), "red.png", {"turns": "dialogue"}, "image_count"),
    "later_image_alone": (
        talk("?", "x", "<image>?", "y"),
        "red.png",
        {"turns": "dialogue", "first_turn": 1},
        "image_count",
    ),
    "later_images": (talk("<image>?", "x", "<image>?", "y"), ["red.png", "blue.png"], {}, "several_images"),
    "missing_later": (talk("?", "x", "<image>?", "y"), "gone.png", {"turns": "dialogue"}, "missing_image"),
    "option_of_an_image": (talk("?\nA. <image>\nB. 3", "A"), "red.png", {"choices": "text"}, "empty_answer"),
    "role_no_text": ([{"from": ["human"], "value": "x"}, Q[1]], "red.png", {}, "bad_conversation"),
    "other_keys": ([{"speaker": "human", "text": "x"}, Q[1]], "red.png", {}, "bad_conversation"),
    "several_images": (talk("<image><image>?", "x"), ["red.png", "blue.png"], {}, "several_images"),
    "missing_image": (Q, "gone.png", {}, "missing_image"),
    "not_an_image": (Q, "text.png", {}, "not_an_image"),
    "bad_image_field": (Q, [3], {}, "bad_image_field"),
    "empty_image_name": (Q, "", {}, "bad_image_field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_record_has_a_reason_and_a_place(name):
    conversations, image, options, reason = REFUSED[name]
    dropped = parse(conversations, image, **options)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.where.startswith(f"{WHERE}: {reason}")


@pytest.mark.parametrize("entry", ["text", 3, None, [1]])
def test_entries_that_are_no_objects(entry):
    assert parse_entry(entry, read_image, LlavaOptions("set"), WHERE).reason == "not_an_object"


def test_a_file_is_read_in_order_and_a_wrong_one_is_named(tmp_path):
    (tmp_path / "red.png").write_bytes(FILES["red.png"])
    entries = [{"id": n, "image": name, "conversations": Q} for n, name in enumerate(["red.png", "gone.png"])]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(entries))
    record, dropped = read_llava(path, tmp_path, LlavaOptions("set"))
    assert record == Record("set", "vqa", (RED, asked("What?", 1), answered(" red", 1)), {"id": "0"})
    assert dropped.reason == "missing_image" and dropped.where.startswith("set.json[1]: ")
    for content, message in (("{", "no readable LLaVA JSON"), ('{"a": 1}', "this is a dict")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"set\.json: .*{message}"):
            list(read_llava(path, tmp_path, LlavaOptions("set")))


def test_lines_and_compressed_files_give_what_a_list_gives(tmp_path):
    (tmp_path / "red.png").write_bytes(FILES["red.png"])
    entries = [{"id": n, "image": "red.png", "conversations": talk(f"<image>{n}?", "red")} for n in range(3)]
    whole, lines = json.dumps(entries).encode(), b"\n".join(json.dumps(entry).encode() for entry in entries)
    contents = {
        "a.json": whole, "a.json.gz": gzip.compress(whole), "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        made = list(read_llava(tmp_path / name, tmp_path, LlavaOptions("set")))
        assert [record.meta["id"] for record in made] == ["0", "1", "2"]
        assert [record.segments for record in made] == [(RED, asked(f"{n}?", 1), answered(" red", 1)) for n in range(3)]
    (tmp_path / "b.jsonl").write_bytes(b"{\n\n[1]\n" + lines)
    made = list(read_llava(tmp_path / "b.jsonl", tmp_path, LlavaOptions("set")))
    assert [(sample.reason, sample.where.partition(":")[0]) for sample in made[:3]] == [
        ("not_json", "b.jsonl, line 1"), ("empty_line", "b.jsonl, line 2"), ("not_an_object", "b.jsonl, line 3"),
    ]  # fmt: skip
    assert [record.where for record in made[3:]] == ["b.jsonl, line 4", "b.jsonl, line 5", "b.jsonl, line 6"]
    (tmp_path / "b.json").write_bytes(lines)
    with pytest.raises(ValueError, match=r"b\.json: no readable LLaVA JSON: .*name it \.jsonl"):
        list(read_llava(tmp_path / "b.json", tmp_path, LlavaOptions("set")))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not in {DATA}")
@pytest.mark.parametrize(("split", "num_records", "num_turns"), [("train", 3384, 14_034), ("val", 287, 1189)])
def test_real_conversations_are_all_read(split, num_records, num_turns):
    """Counts as the raw folder's own description states them."""
    path = DATA / f"nlvr/llava_{split}.json"
    made = list(read_llava(path, DATA / f"nlvr/images_{split}.zip", LlavaOptions("nlvr")))
    assert all(isinstance(sample, Record) for sample in made) and len(made) == num_records
    assert sum(segment.loss for record in made for segment in record.segments[1:]) == num_turns
