"""Each metric gives the value of its paper, or of the program that it comes from, for what rows call for."""

import importlib.util
import itertools
import json
import math
import random
import shutil

import pytest

from evaluation_vlm import metrics
from evaluation_vlm.judgement import judge
from evaluation_vlm.metrics import METRICS, choose_metrics, named_metrics
from evaluation_vlm.predictions import Prediction, Scores
from evaluation_vlm.questions import Question, find_questions
from evaluation_vlm.scores import words
from evaluation_vlm.scores.answers import normalised
from evaluation_vlm.scores.captions import NO_WORDS, bleu, bleu4
from evaluation_vlm.scores.words import OWN_WORDS, own_words, split_words
from inference_vlm.answering import Prompt
from processing.batching.encoding import Encoder, encode_caption, encode_item
from processing.data_error_vlm import DuetError
from processing.reading.conversations import conversations_from_row
from tests import tiny


needs_coco = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not here")
needs_bleu = pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not here")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not here")


def asked(*answers, choices=(), captions=0, kind="all") -> Question:
    right = tuple(dict.fromkeys(answers))
    return Question(Prompt([1], []), right, kind, "all", given=answers, choices=tuple(choices), captions=captions)


def scored(name, answers, questions) -> Scores:
    return METRICS[name].score([*map(Prediction, questions, answers)])


# --- VQA accuracy


def by_the_paper(answer: str, given: list[str]) -> float:
    """The mean over each nine of ten people of min(people who agree / 3, 1), as the paper writes it."""
    people = itertools.combinations(given, len(given) - 1)
    return sum(min(nine.count(answer) / 3, 1) for nine in people) / len(given)


@pytest.mark.parametrize("agree, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_published_one_for_each_number_of_people_who_agree(agree, accuracy):
    question = asked(*["cat"] * agree, *["dog"] * (10 - agree))
    assert scored("vqa_accuracy", ["cat"], [question]).value == pytest.approx(accuracy)


def test_vqa_accuracy_leaves_each_person_out_as_the_paper_does():
    rng = random.Random(0)
    for _ in range(300):
        given = rng.choices(["cat", "dog", "blue bird", "3"], k=rng.choice([4, 5, 10]))
        answer = rng.choice(["cat", "dog", "blue bird", "3", "fish"])
        found = scored("vqa_accuracy", [answer], [asked(*given)])
        assert found.value == pytest.approx(by_the_paper(answer, given))


# What processPunctuation and processDigitArticle of GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py,
# commit c4e6a0e) make of these.
NORMALISED = {
    "The Cat.": "cat",
    "two dogs": "2 dogs",
    "none": "0",
    "isnt it": "isn't it",
    "shed've": "she'd've",
    "somebody'd": "somebodyd",
    "its": "its",
    "3,000": "3000",
    "2.5": "2.5",
    "St. Louis": "st louis",
    "black/white": "black white",
    "black / white": "black white",
    "left-hand side": "left hand side",
    "10:30": "10:30",
    "yes, sir": "yes sir",
    "yes,sir": "yes sir",
    "a\nb\tc": "b c",
    "man's hat?": "man's hat",
    "": "",
}


@pytest.mark.parametrize("answer", NORMALISED)
def test_answers_are_made_alike_as_vqav2s_evaluation_makes_them(answer):
    assert normalised(answer) == NORMALISED[answer]


def test_vqa_accuracy_compares_answers_that_were_made_alike():
    question = asked("2", "two", "Two.", "2 dogs", *["three"] * 6)
    assert scored("vqa_accuracy", ["the two"], [question]).value == pytest.approx(0.9)


# What VQAEval of GT-Vision-Lab/VQA (commit a013f00, the last) gave: answer, what ten people said, accuracy.
OFFICIAL = [
    ("yes", ["yes"] * 10, 1.0),
    ("Yes", ["yes"] * 10, 0.0),  # all say the same, so nothing is made alike
    ("yes.", ["yes"] * 10, 0.0),
    ("The Dog", ["The Dog"] * 10, 1.0),
    ("a\nb", ["a b "] * 10, 1.0),
    ("Yes.", ["yes"] * 9 + ["no"], 1.0),
    ("the dog", ["dog"] * 2 + ["a dog", "Dog!"] + ["cat"] * 6, 1.0),
    ("none", ["none"] * 3 + ["0"] * 2 + ["zero"] + ["1"] * 4, 1.0),
    ("one on left", ["1 on the left", "one on left"] + ["2"] * 8, 0.6),
    ("dont walk", ["don't walk", "dont walk", "stop"] + ["walk"] * 7, 0.6),
    ("3,000", ["3000", "3,000", "3 000"] + ["300"] * 7, 0.6),
    ("black/white", ["black and white", "black white"] * 5, 1.0),
    ("", ["the"] + ["a"] + ["b"] * 8, 0.6),
    ("." * 40 + "x", ["x"] * 3 + ["y"] * 7, 0.0),  # of so many periods not all are taken out
]


@pytest.mark.parametrize("answer, people, accuracy", OFFICIAL)
def test_vqa_accuracy_is_that_of_vqav2s_script(answer, people, accuracy):
    assert scored("vqa_accuracy", [answer], [asked(*people)]).value == pytest.approx(accuracy)


# --- ANLS


@pytest.mark.parametrize(
    "answer, score",
    # The table of the Robust Reading Competition (https://rrc.cvc.uab.es/?ch=11&com=tasks).
    [("The Coca", 0), ("CocaCola", 1 - 1 / 9), ("Coca cola", 1), ("Cola", 0), ("Cat", 0)],
)
def test_anls_is_the_published_one(answer, score):
    question = asked("Coca Cola", "Coca Cola Company")
    assert scored("anls", [answer], [question]).value == pytest.approx(score)


def test_anls_counts_blanks_once_and_nothing_from_half_on():
    assert scored("anls", ["a  b"], [asked("A b")]).value == 1
    assert scored("anls", ["ab"], [asked("ax")]).value == 0  # a half, which is the paper's threshold
    assert scored("anls", [""], [asked("a")]).value == 0 and scored("anls", [""], [asked("")]).value == 1
    assert scored("anls", ["kitten"], [asked("sitting")]).value == pytest.approx(1 - 3 / 7)


# --- captions

REFERENCES = [
    [
        "A man rides a brown horse on the beach.",
        "A person on horseback at the seaside",
        "Man riding a horse, by the sea!",
    ],
    ["Two dogs can't stop playing in the snow.", "A black dog and a white dog run through deep snow"],
    ["A red double-decker bus parked at the U.S. embassy", "the bus's color is red; it's parked", "red bus"],
    ["A cat sits on a mat looking at the sun."],
]
SAID = [
    "A man riding a horse on the beach.",
    "two dogs playing in the snow",
    "A red bus is parked on the street.",
    "a dog runs on the grass",
]
CAPTIONS = [asked(*of_one, captions=len(of_one)) for of_one in REFERENCES]


def coco(name, said, references):
    """Value and scores as pycocoevalcap's own classes give them, tokenizer and all."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    right = {n: [{"caption": text} for text in of_one] for n, of_one in enumerate(references)}
    both = PTBTokenizer().tokenize(right), PTBTokenizer().tokenize({n: [{"caption": t}] for n, t in enumerate(said)})
    if name == "bleu4":
        value, each = Bleu(4).compute_score(*both, verbose=0)
        return value[3], each[3]
    return (Cider() if name == "cider" else Rouge()).compute_score(*both)


@needs_coco
@needs_java
@pytest.mark.parametrize("name", ["cider", "bleu4", "rouge_l"])
def test_metrics_of_captions_are_cocos(name, recwarn):
    value, each = coco(name, SAID, REFERENCES)
    found = scored(name, SAID, CAPTIONS)
    assert found.value == pytest.approx(value, abs=1e-12) and found.note == ""
    assert found.each == pytest.approx(list(each), abs=1e-12)


@needs_coco
@needs_java
def test_metrics_of_captions_have_the_values_that_pycocoevalcap_1_2_gave():
    values = {name: scored(name, SAID, CAPTIONS).value for name in ("bleu4", "cider", "rouge_l")}
    assert values == pytest.approx(RECORDED, abs=1e-9)


RECORDED = {"bleu4": 0.3097651029, "cider": 1.7151102569, "rouge_l": 0.6871231258}


@needs_coco
@needs_java
def test_words_are_those_of_ptbs_tokenizer_whatever_a_text_holds():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = ["Don't! (It's a café — 50%)", "", "...", "a man's dog;", "", "last, empty:", ""]
    found, note = split_words((*texts, "one\u2028line\r\n more\x1cand more"))
    own = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate([*texts, "end"])})
    assert (found[:-1], note) == ([own[n][0] for n in range(len(texts))], "")
    assert found[-1] == "one line more and more"


@needs_coco
@needs_java
@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not here")
@pytest.mark.parametrize("said, right", [(["", ""], ["!", "?"]), (["a cat", "a dog"], ["", "..."]), ([""], [""])])
def test_answers_without_a_word_are_judged_and_told(said, right):
    found = scored("cider", said, [asked(text, captions=1) for text in right])
    assert (found.value, found.each) == (0.0, [0.0] * len(said)) and NO_WORDS in found.note
    for name in ("bleu4", "rouge_l"):
        assert math.isfinite(scored(name, said, [asked(text, captions=1) for text in right]).value)
    assert not scored("cider", ["", "!"], [asked("a cat"), asked("a dog")]).note  # answers alone


def test_our_words_are_ptbs_on_plain_english():
    texts = (*SAID, *itertools.chain(*REFERENCES), "There are 3.5 men, at 10:30; they've gone!", 'I cannot say "no"')
    assert [own_words(text) for text in texts] == split_words(texts)[0]


@needs_coco
def test_without_java_the_value_says_what_it_was_counted_with(monkeypatch):
    monkeypatch.setattr(words.shutil, "which", lambda name: None)
    split_words.cache_clear()
    try:
        judgement = judge([*map(Prediction, CAPTIONS, SAID)], named_metrics("cider,bleu4,rouge_l,exact_match"))
    finally:
        split_words.cache_clear()
    assert judgement.notes == {name: OWN_WORDS for name in ("cider", "bleu4", "rouge_l")}
    assert judgement.report().count(OWN_WORDS) == 3
    values = {name: value for name, value in judgement.values.items() if name != "exact_match"}
    assert values == pytest.approx(RECORDED, abs=1e-9)  # of plain English the same


@needs_coco
def test_java_that_fails_is_said_and_costs_no_evaluation(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    split_words.cache_clear()
    try:
        found = scored("cider", SAID, CAPTIONS)
    finally:
        split_words.cache_clear()
    assert found.note.startswith(OWN_WORDS) and "Java failed" in found.note and found.value > 1


@needs_bleu
def test_bleu_is_sacrebleus_with_any_number_of_references():
    import sacrebleu

    streams = [[of_one[n] if n < len(of_one) else None for of_one in REFERENCES] for n in range(3)]
    found = scored("bleu", SAID, CAPTIONS)
    assert found.value == sacrebleu.corpus_bleu(SAID, streams).score
    alone = [sacrebleu.sentence_bleu(text, of_one).score for text, of_one in zip(SAID, REFERENCES)]
    assert found.each == pytest.approx(alone)
    assert "tok:13a" in found.note and "version:" in found.note


@pytest.mark.parametrize(
    "score", [pytest.param(bleu4, marks=needs_coco), pytest.param(bleu, marks=needs_bleu)], ids=["bleu4", "bleu"]
)
def test_bleu_of_some_captions_is_the_bleu_of_those_alone(score):
    predictions = [*map(Prediction, CAPTIONS, SAID)]
    whole = score(predictions)
    for numbers in ([0, 1, 2, 3], [0, 2], [1], [3, 1, 1, 0]):
        alone = score([predictions[number] for number in numbers])
        assert whole.among(numbers) == pytest.approx(alone.value, abs=1e-9)


# --- which metrics follow from the data


def chosen(*questions):
    found = choose_metrics(questions)
    return [{metric.name for metric in found if metric.fits(question)} for question in questions]


@needs_coco
def test_metrics_follow_from_each_question_of_a_mixed_data_set():
    captions, vqa = asked("one", "two", captions=2), asked(*["yes"] * 10)
    plain, several, choice = asked("red"), asked("red", "dark red"), asked("B", choices="AB")
    of_captions = {"cider", "bleu4", "rouge_l"}
    exact = {"exact_match"}
    found = chosen(captions, vqa, plain, several, choice)
    assert found[:4] == [of_captions, {"vqa_accuracy"}, exact, exact] and "exact_match" in found[4]


def test_captions_are_judged_exactly_and_said_to_be_where_the_package_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(metrics.logger, "propagate", True, raising=False)
    lines = []
    monkeypatch.setattr(metrics.logger, "warning", lines.append)
    captions, vqa = asked("one", "two", captions=2), asked(*["yes"] * 10)
    assert chosen(captions, vqa) == [{"exact_match"}, {"vqa_accuracy"}]
    assert len(lines) == 1 and "cider, bleu4, rouge_l" in lines[0] and "duet-vlm[evaluation]" in lines[0]
    with pytest.raises(DuetError, match="metrics=cider needs the package pycocoevalcap"):
        named_metrics("cider")


def test_a_metric_without_what_it_needs_is_one_line():
    with pytest.raises(DuetError, match="metrics=vqa_accuracy: expected questions with four people's answers or more"):
        choose_metrics([asked("red"), asked("blue", "dark blue")], "vqa_accuracy")
    with pytest.raises(DuetError, match="metrics has 'cidre'; expected exact_match, .*, or FILE.py:FUNCTION"):
        named_metrics("exact_match,cidre")
    with pytest.raises(DuetError, match="names none"):
        named_metrics(" , ")


def test_each_question_is_judged_by_its_own_metrics_and_counted_under_its_kind():
    vqa, plain = asked(*["yes"] * 10, kind="v"), asked("red", kind="p")
    predictions = [Prediction(vqa, "yes"), Prediction(plain, "red"), Prediction(plain, "blue")]
    judgement = judge(predictions, choose_metrics([vqa, plain]))
    assert judgement.values == {"exact_match": 0.5, "vqa_accuracy": 1.0}
    assert judgement.scores["exact_match"].each == [None, 1.0, 0.0]
    assert [judgement.score_of(number) for number in range(3)] == [1.0, 1.0, 0.0]
    assert judgement.shares("vqa_accuracy") == {"all": {"v": 1.0}}
    assert judgement.by_name()["exact_match/all/p"] == 0.5


# --- a metric of one's own

OWN = """
def length(predictions):
    return [len(answer) / max(map(len, question.references)) for question, answer, _ in predictions]

def one(predictions):
    return len(predictions)

def text(predictions):
    return "good"

def short(predictions):
    return [1.0]

def infinite(predictions):
    return [1.0, float("nan")]

def broken(predictions):
    return 1 / 0

def leaves(predictions):
    raise SystemExit(3)

def no_number(predictions):
    from evaluation_vlm.predictions import Scores
    return Scores(float("nan"))

def no_numbers(predictions):
    from evaluation_vlm.predictions import Scores
    return Scores(1.0, [1.0, float("inf")])

def too_few(predictions):
    from evaluation_vlm.predictions import Scores
    return Scores(1.0, [1.0])

def none_at_all(predictions):
    from evaluation_vlm.predictions import Scores
    return Scores(1.0, [])

def array(predictions):
    import numpy as np
    from evaluation_vlm.predictions import Scores
    return Scores(np.float32(0.5), np.array([1.0, 0.0], dtype="float32"))
"""


def test_a_function_of_ones_own_is_a_metric(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    questions = [asked("abcd", "ab"), asked("ab")]
    found = judge([*map(Prediction, questions, ["ab", "ab"])], named_metrics(f"{file}:length,{file}:one,exact_match"))
    assert found.values == {"length": 0.75, "one": 2.0, "exact_match": 1.0}
    assert found.scores["length"].each == [0.5, 1.0] and found.scores["one"].each is None


@pytest.mark.parametrize(
    "name, line",
    [
        ("text", "returned a str of 4; expected a finite number, or a list with one for each of the 2 predictions"),
        ("short", "returned a list of 1; expected a finite number"),
        ("infinite", "returned a list of 2; expected a finite number"),
        ("leaves", "failed on 2 predictions: SystemExit: 3"),
        ("no_number", "returned a Scores"),
        ("no_numbers", "returned a Scores"),
        ("too_few", "returned a Scores of 1; expected"),
        ("none_at_all", "returned a Scores of 0; expected"),
        ("broken", "failed on 2 predictions: ZeroDivisionError: division by zero"),
        ("loss", "the log has another eval_loss; give the function another name"),
        ("missing", "has no function missing; it has length, one, text, short, infinite, broken, leaves, no_number"),
    ],
)
def test_what_is_wrong_with_a_function_of_ones_own_is_one_line(tmp_path, name, line):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with pytest.raises(DuetError) as error:
        judge([*map(Prediction, [asked("a"), asked("b")], "ab")], named_metrics(f"{file}:{name}"))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_scores_of_ones_own_may_be_an_array(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    found = judge([*map(Prediction, [asked("a"), asked("b")], "ab")], named_metrics(f"{file}:array"))
    assert json.dumps([found.values, found.scores["array"].each]) == '[{"array": 0.5}, [1.0, 0.0]]'


def test_no_choice_is_the_models_where_none_has_room():
    question = asked("A")._replace(choices=("A", "B"))
    found = METRICS["multiple_choice"].score([Prediction(question, "", (-math.inf, -math.inf))])
    assert found.value == 0.0


def test_a_number_in_a_tensor_is_a_number(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import torch\n\ndef mean(predictions):\n    return torch.tensor(12.5)\n")
    found = judge([Prediction(asked("a"), "a")], named_metrics(f"{file}:mean"))
    assert found.values == {"mean": 12.5} and "12.5" in found.report() and "%" not in found.report()


def test_a_file_of_ones_own_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(DuetError, match="there is no file"):
        named_metrics(f"{tmp_path}/none.py:score")
    (tmp_path / "bad.py").write_text("import no_such_package_anywhere\n")
    with pytest.raises(DuetError, match="cannot be read: ModuleNotFoundError"):
        named_metrics(f"{tmp_path}/bad.py:score")
    for number, text in enumerate(("def score(:", "raise SystemExit", "\0")):
        (tmp_path / f"{number}.py").write_text(text)
        with pytest.raises(DuetError, match="cannot be read: (Syntax|System|Value)E"):
            named_metrics(f"{tmp_path}/{number}.py:score")


# --- what of a row reaches a metric


def questions_of(row, processor, encode=None, **reading) -> list[Question]:
    items = conversations_from_row(row, source="data", index=7, **reading)
    encoder = Encoder(processor, encode) if encode else Encoder(processor)
    return find_questions((encode_item(item, encoder)[0] for item in items), processor)


@pytest.mark.parametrize("encode", [None, encode_caption], ids=["stage 2", "stage 1"])
def test_the_captions_of_an_image_are_one_question(composed, image, encode):
    _, processor = composed
    row = {"image": image(0), "captions": ["a cat", "a small cat", "a cat"], "kind": "pets"}
    (question,) = questions_of(row, processor, encode, prompt="" if encode else "what is it?")
    assert question.references == ("a cat", "a small cat", "a cat") and question.answers == ("a cat", "a small cat")
    assert (question.captions, question.row, question.kind) == (3, 7, "pets")


def test_all_ten_answers_of_a_row_reach_the_metric(composed, image):
    _, processor = composed
    given = ["yes"] * 6 + ["no"] * 3 + ["maybe"]
    row = {"image": image(0), "question": "is it?", "multiple_choice_answer": "yes", "answers": given}
    (question,) = questions_of(row, processor)
    assert list(question.references) == given and question.expected == "yes" and not question.captions
    assert chosen(question) == [{"vqa_accuracy"}]
    assert scored("vqa_accuracy", ["no"], [question]).value == pytest.approx(0.9)


@pytest.mark.parametrize("choice_answer, choices", [("letter", ("A", "B", "C")), ("text", ("red", "blue", "a cat"))])
def test_the_choices_of_a_row_reach_the_metric_as_they_would_be_answered(composed, image, choice_answer, choices):
    _, processor = composed
    row = {"image": image(0), "question": "which?", "choices": ["red", "blue", "a cat"], "answer": 1}
    (question,) = questions_of(row, processor, choice_answer=choice_answer)
    assert question.choices == choices and question.references == (choices[1],)


def test_questions_about_one_image_stay_apart(composed, image):
    _, processor = composed
    item = {**tiny.dialogue("what?", "a cat", image(0), more=(("what?", "a cat"),)), "row": 3, "source": "s"}
    assert len(find_questions([encode_item(item, Encoder(processor))[0]], processor)) == 2
