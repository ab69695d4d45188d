"""Questions of a row with their options, context and answers; captions and answers that are lists, one by one."""

import json

import pytest

from processing.image_files_vlm import ImagePolicy
from processing.reading.cells import MalformedRow
from processing.reading.conversations import caption_column, caption_count, conversations_from_row
from tests.rows import assistant, messages, turns, user


FOLDER = ImagePolicy("/d", allow_urls=True)


def read(row, **options):
    (conversation,) = conversations_from_row(row, images=FOLDER, **options)
    return conversation


def learned(row, **options):
    """The question and the answer of a row without image."""
    question, answer = read(row, **options)["messages"]
    return question["content"][0]["text"], answer["content"][0]["text"]


# --- multiple choice


WATER = {"question": "Which is a solid?"}
LISTED = "Which is a solid?\nA. water\nB. a rock"

CHOICES = {
    "ScienceQA": {"choices": ["water", "a rock"], "answer": 1},
    "ScienceQA from a table with gaps": {"choices": ["water", "a rock"], "answer": 1.0},
    "ScienceQA in a CSV file": {"choices": "['water', 'a rock']", "answer": "1"},
    "AI2D": {"options": ["water", "a rock"], "answer": "1"},
    "MMBench": {"A": "water", "B": "a rock", "C": None, "D": "nan", "hint": "nan", "answer": "B"},
    "SEED-Bench": {"choice_a": "water", "choice_b": "a rock", "answer": "B"},
    "PMC-VQA": {"Choice A": "A: water ", "Choice B": "B:a rock ", "Answer": "x", "answer": "B"},
    "MMMU": {"options": "['water', 'a rock']", "answer": "B"},
    "MathVista": {"choices": ["water", "a rock"], "answer": "a rock"},
    "A-OKVQA": {"choices": ["water", "a rock"], "correct_choice_idx": 1, "direct_answers": "['rock', 'rock']"},
    "ARC": {"choices": {"text": ["water", "a rock"], "label": ["A", "B"]}, "answerKey": "B"},
    "MedQA": {"options": {"A": "water", "B": "a rock"}, "answer": "a rock", "answer_idx": "B"},
    "JSON": {"choices": '["water", "a rock"]', "answer": "(b)"},
    "lines": {"options": "(A) water\n(B) a rock\n", "answer": "B."},
    "with their letters": {"choices": ["A. water", "B. a rock"], "answer": "B. a rock"},
    "a list of one answer": {"options": ["water", "a rock"], "answer": ["B"]},
}


@pytest.mark.parametrize("name", CHOICES)
def test_options_stand_in_the_prompt_and_the_right_one_is_learned_as_letter_or_text(name):
    row = {**WATER, **CHOICES[name]}
    assert learned(row) == (LISTED, "B")
    assert learned(row, choice_answer="text") == (LISTED, "a rock")
    assert read(row)["answers"] == ["B"] and read(row, choice_answer="text")["answers"] == ["a rock"]


@pytest.mark.parametrize(
    ("columns", "answer", "right"),
    [
        ("choices", "2", "2"),  # what is said itself
        ("choices", 2, "3"),
        ("choices", "B", "2"),
        ("options", "2", "3"),  # its number, from 0
        ("options", "C", "3"),
        ("options", "7", "7"),
    ],
)
def test_an_index_a_letter_and_a_text_are_told_apart_by_the_columns(columns, answer, right):
    row = {"question": "How many?", columns: ["1", "2", "3", "7"], "answer": answer}
    assert learned(row, choice_answer="text")[1] == right


def test_options_that_are_letters_are_told_from_the_letters_before_them():
    assert learned({"question": "Which?", "options": ["C", "A", "B"], "answer": "B"}, choice_answer="text")[1] == "A"
    assert learned({"question": "Which?", "choices": ["C", "A", "B"], "answer": "B"}, choice_answer="text")[1] == "B"


def test_an_answer_that_is_no_option_is_refused():
    for answer in (2, -1, "C", "ice", "?", True, ["A", "B"]):
        with pytest.raises(MalformedRow, match="^row 0: found .* as answer; expected"):
            read({**WATER, "choices": ["water", "a rock"], "answer": answer})
    with pytest.raises(MalformedRow, match="found 'water; a rock' as choices; expected a list of up to 26 options"):
        read({**WATER, "choices": "water; a rock", "answer": 1})
    with pytest.raises(MalformedRow, match="found 1 as answer_idx; expected a column of choices"):
        read({**WATER, "answer_idx": 1})
    with pytest.raises(ValueError, match="choice_answer is 'word'; expected one of letter, text"):
        read(WATER, choice_answer="word")


@pytest.mark.parametrize("nothing", [None, [], "[]", ""])
def test_a_question_without_options_is_an_open_one(nothing):
    assert learned({**WATER, "options": nothing, "answer": "4.5"}) == ("Which is a solid?", "4.5")


def test_tags_in_question_and_options_are_places():
    row = {"question": "As in <image 1>?\n<image>", "options": ["x", "y"], "answer": "A", "image": "a.png"}
    with pytest.raises(MalformedRow, match="in the turns but 1 image"):
        read(row)
    for tag in ("<image 1>", "<image>"):
        row["question"] = f"As in {tag}"
        assert read(row)["messages"][0] == user("As in ", "image", "\nA. x\nB. y")
    row = {**row, "question": "Which?", "options": ["<image 1>", "<image 2>"], "image": ["a.png", "b.png"]}
    assert read(row)["messages"][0] == user("Which?\nA. ", "image", "\nB. ", "image")


# --- what stands around a question


def test_context_and_hint_stand_before_a_question_and_the_input_behind():
    assert learned({"question": "Why?", "answer": "So.", "hint": "Think.", "context": "A text."}) == (
        "A text.\nThink.\nWhy?",
        "So.",
    )
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
        "history": [["Hi.", "Hello."], ["So?", "No."]],
    }
    assert read(row)["messages"] == [
        *(user("Hi."), assistant("Hello."), user("So?"), assistant("No.")),
        *(user("Translate.\nchat"), assistant("cat")),
    ]
    assert learned({"query": "Why?", "response": "So.", "hint": None, "input": "", "history": []}) == ("Why?", "So.")
    assert read({"question": "Why?", "answer": "So.", "context": {"a": 1}})["notes"] == [
        "the column context is not read"
    ]
    with pytest.raises(MalformedRow, match="found 'Hi.' as history 0; expected a question and its answer"):
        read({"query": "Why?", "response": "So.", "history": ["Hi."]})


def test_pairs_of_question_and_answer_are_a_dialogue():
    qas = [{"question": "What?", "answer": "A cat.", "qa_id": 3}, {"question": "Sure?", "answer": "Yes.", "qa_id": 4}]
    conversation = read({"image": "a.png", "qas": qas})
    assert conversation["messages"] == [user("image", "What?"), assistant("A cat."), user("Sure?"), assistant("Yes.")]
    assert conversation["notes"] == ["the key qa_id of qas is not read"]


# --- lists, also written as text


def test_all_right_answers_stay_with_a_question():
    answers = ["yes", "yes", "no"]
    for given in (answers, str(answers), json.dumps(answers), "['yes' 'yes'\n 'no']", [{"answer": a} for a in answers]):
        conversation = read({"question": "Is it?", "answers": given})
        assert conversation["answers"] == answers and conversation["messages"][1] == assistant("yes")
    structs = str([{"answer": a, "answer_id": n} for n, a in enumerate(answers)])
    conversation = read({"question": "Is it?", "answers": structs, "multiple_choice_answer": "no"})
    assert conversation["answers"] == answers and conversation["messages"][1] == assistant("no")
    assert "answers" not in read({"question": "Is it?", "answer": "yes"})


def test_a_list_of_numbers_is_an_answer_and_not_several():
    for answer in ("[0.1, 0.5]", "[1]", "[UNK]", "[a, b]", "[]", '["a"'):
        assert learned({"question": "Where?", "answer": answer}) == ("Where?", answer)
    assert learned({"question": "How many?", "answers": "[3, 2, 3]"})[1] == "3"


@pytest.mark.parametrize("written", [json.dumps, str, lambda said: f"  {said}\n"])
def test_dialogues_written_as_text_are_read(written):
    said = turns("What's that?", "A cat.")
    assert read({"conversations": written(said)})["messages"] == [user("What's that?"), assistant("A cat.")]
    assert read({"messages": written(messages("What's that?", "A cat."))})["messages"][1] == assistant("A cat.")


@pytest.mark.parametrize(
    "captions",
    ['["two dogs.", "a dog."]', "['two dogs.', 'a dog.']", "['two dogs.' 'a dog.']", ["two dogs.", "a dog."]],
)
def test_captions_written_as_text_are_a_list(captions):
    for column, image in (("raw", "filename"), ("caption", "image"), ("text", "image_path")):
        row = {column: captions, image: "a.png", "sentids": "[1]"}
        found = conversations_from_row(row, images=FOLDER)
        assert [conversation["messages"][1] for conversation in found] == [assistant("two dogs."), assistant("a dog.")]
        assert caption_count(row[caption_column(row)]) == 2


def test_a_caption_of_brackets_is_one():
    for caption in ("[a dog]", "[1]", "[]", "[1, 2]"):
        conversation = read({"image": "/d/a.png", "caption": caption})
        assert conversation["messages"][1] == assistant(caption)


def test_the_sentences_of_karpathy_are_captions():
    row = {"filename": "a.png", "sentences": [{"raw": "two dogs.", "tokens": ["two"]}, {"raw": "a dog.", "tokens": []}]}
    found = conversations_from_row(row, images=FOLDER)
    assert [conversation["messages"][1] for conversation in found] == [assistant("two dogs."), assistant("a dog.")]


def test_a_caption_that_is_none_costs_itself_alone():
    row = {"image": "a.png", "caption": ["a cat", "", None, " \n", True, "a red cat"]}
    found = conversations_from_row(row, images=FOLDER, source="s", index=3)
    assert [item["messages"][1] for item in (found[0], found[-1])] == [assistant("a cat"), assistant("a red cat")]
    for item in found[1:-1]:
        reason, detail = item.pop("dropped")
        assert item == {"source": "s", "row": 3} and reason == "malformed row"
        assert detail.startswith("s, row 3: found ") and "as caption; expected a text" in detail
    for choice, count in (("first", 1), ("random", 2)):
        found = conversations_from_row(row, images=FOLDER, caption_choice=choice)
        assert len(found) == count and all("messages" in item for item in found)
        assert found[0]["notes"] == ["a caption beside it is none"]
    with pytest.raises(MalformedRow, match="found '' as caption"):
        conversations_from_row({"image": "a.png", "caption": ["", None]}, images=FOLDER)


def test_a_list_of_questions_and_one_of_answers_are_the_turns_of_a_dialogue():
    row = {"image": "a.png", "questions": ["Who?", "How many?"], "answers": ["Ann", 2], "title": "t"}
    conversation = read(row)
    assert conversation["messages"] == [user("image", "Who?"), assistant("Ann"), user("How many?"), assistant("2")]
    assert conversation["notes"] == ["the column title is not read"]
    written = read({**row, "questions": '["Who?", "How many?"]', "answers": "['Ann', 2]"})
    assert written == conversation
    with pytest.raises(MalformedRow, match="found 2 questions and 1 answers; expected one answer to each question"):
        read({**row, "answers": ["Ann"]})


def test_the_label_of_a_query_is_its_answer():
    for label in (["14"], "14", 14):
        for image in ("image", "imgname"):
            for beside in ({}, {"question": None, "answer": None, "answers": []}):  # of other rows in its file
                conversation = read({image: "a.png", "query": "How many?", "label": label, **beside})
                assert conversation["messages"] == [user("image", "How many?"), assistant("14")]
    # Elsewhere a label is a class, which answers nothing.
    with pytest.raises(MalformedRow, match="expected a known layout"):
        read({"image": "a.png", "question": "What?", "label": 3})
    with pytest.raises(MalformedRow, match="found None as answer"):
        read({"image": "a.png", "question": "What?", "answer": None, "label": 3})
    conversation = read({"query": "What?", "answer": "x", "label": 3})
    assert conversation["messages"][1] == assistant("x") and conversation["notes"] == ["the column label is not read"]


def test_a_row_written_into_the_text_of_another_is_no_caption():
    """RLHF-V keeps a question, the better and the worse answer as JSON in `text`."""
    said = {"question": "What?", "chosen": "a dog", "rejected": "a cat"}
    line = "found JSON with chosen, question, rejected as text; expected a caption, or what the JSON holds in columns"
    with pytest.raises(MalformedRow, match=line):
        read({"image": "a.png", "text": json.dumps(said)})
    with pytest.raises(MalformedRow, match="found {'question': 'What"):
        read({"image": "a.png", "text": said})
    for text in (
        '{"total": "3.50", "items": ["tea"]}',
        "{question: a brace}",
    ):  # a form is read as JSON by those who want it
        conversation = read({"image": "a.png", "text": text})
        assert conversation["messages"][1] == assistant(text)


def test_an_answer_of_several_that_is_none_costs_itself_alone():
    for none in ("", None, " \n", float("nan")):
        for answers in ([none, "a dog"], [{"answer": none}, {"answer": "a dog"}], {"answer": [none, none, "a dog"]}):
            conversation = read({"image": "a.png", "question": "What?", "answers": answers})
            assert conversation["messages"][1] == assistant("a dog")
            assert conversation["notes"] == ["an answer beside it is none"]
    assert read({"image": "a.png", "question": "What?", "answers": [""]})["messages"][1] == assistant("")
    with pytest.raises(MalformedRow, match="found None as answers; expected a text"):
        read({"image": "a.png", "question": "What?", "answers": [None, ""]})
