"""What is right about a question reaches its metric whole: every answer of its row, to its last word."""

import json

import datasets
import pytest

import train_pretrain
import train_sft
from evaluation_vlm.asking import questions_of
from processing.batching.dataset import ConversationDataset
from processing.batching.encoding import Encoder, encode_caption, encode_dialogue
from processing.reading.items import Reading
from tests import tiny
from training_vlm.data import items_to_ask


LONG = "a large green triangle is at the top left and a small red circle sits on the mat below it"
QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "1", "--max_new_tokens", "3", "--dataloader_num_workers", "0",
    "--disable_tqdm", "True", "--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "1",
]  # fmt: skip


@pytest.fixture
def small(folders):
    """A composed model's processor."""
    return tiny.compose(*folders("siglip-llama"), tiny.PAIRS["siglip-llama"][2])[1]


@pytest.fixture
def rows(tmp_path, image):
    """`rows(name, *rows)` is a file of rows whose images are there."""
    for number in range(4):
        image(number).save(tmp_path / f"{number}.png")

    def write(name, *content):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("choice", ["first", "random"])
@pytest.mark.parametrize("more", [[], ["--encode_ahead", "False"], ["--streaming", "True"]])
def test_all_captions_of_a_held_out_row_are_right_whatever_is_learned(folders, rows, tmp_path, choice, more):
    captions = ["a cat", "a small cat", "one cat"]
    file = rows("captions.jsonl", *({"image": f"{n % 4}.png", "captions": captions} for n in range(12)))
    vision, text = folders("siglip-llama")
    train_pretrain.main(
        [
            "--vision_model", str(vision), "--text_model", str(text), "--dataset", file, "--caption_choice", choice,
            "--predict_with_generate", "--metrics", "exact_match", "--eval_share", "0.3", "--output_dir",
            str(tmp_path / "out"), *QUICK, *more,
        ]
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert lines and all(line["expected"] == captions for line in lines)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("encode", [encode_dialogue, encode_caption])
def test_an_answer_is_whole_however_little_is_learned_of_it(small, image, encode, ahead):
    columns = {"image": [image(0), image(1)], "answer": [LONG, "a cat"], "question": ["what is it?"] * 2}
    if encode is encode_caption:
        columns = {"image": columns["image"], "captions": [[LONG, "a cat"], ["a cat"]]}
    dataset = ConversationDataset(datasets.Dataset.from_dict(columns), Reading("data"))
    prompt = len(questions_of(dataset, Encoder(small, encode))[0].prompt.ids) - 1 + small.image_seq_length
    encoder = Encoder(small, encode, prompt + 2)
    if ahead:
        dataset.encode_ahead(encoder)
    first, second = questions_of(dataset, encoder)
    assert first.answers[0] == LONG and second.answers == ("a cat",)
    assert first.captions == (2 if encode is encode_caption else 0)
    assert len(questions_of(dataset, encoder, most=1)) == 1


def test_of_a_long_dialogue_those_questions_are_asked_that_have_room(small, image, capsys):
    item = tiny.dialogue("what?", LONG, image(0), more=(("and?", LONG), ("how many?", "two")))
    whole = questions_of([item], Encoder(small))
    lengths = [len(question.prompt.ids) - 1 + small.image_seq_length for question in whole]
    for limit, count in ((lengths[1], 1), (lengths[1] + 1, 2), (lengths[2], 2), (lengths[2] + 1, 3)):
        found = questions_of([item], Encoder(small, encode_dialogue, limit))
        assert found == whole[:count], limit
    assert questions_of([item], Encoder(small, encode_dialogue, lengths[0])) == []
    assert "1 of 1 samples, such as" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"truncation": "drop"}, {"truncation": "keep_last_turns"}, {"supervise_prompt": True}]
)
def test_what_is_learned_of_long_dialogues_and_of_prompts_changes_no_question(small, image, options):
    item = tiny.dialogue("what?", LONG, image(0), more=(("and?", LONG),))
    (first, second) = questions_of([item], Encoder(small))
    limit = len(second.prompt.ids) + small.image_seq_length + 2
    assert questions_of([item], Encoder(small, encode_dialogue, limit, **options)) == [first, second]


def test_only_the_last_answer_is_asked_for_where_only_that_is_learned(small, image):
    item = tiny.dialogue("what?", "a cat", image(0), more=(("and?", LONG),))
    (only,) = questions_of([item], Encoder(small, encode_dialogue, 200, supervise="last"))
    assert only.answers == (LONG,)


@pytest.mark.parametrize("split", ["test", "evaluation"])
def test_a_run_with_little_room_judges_by_whole_answers(folders, rows, tmp_path, split):
    file = rows("long.jsonl", *({"image": f"{n % 4}.png", "question": "what?", "answer": LONG} for n in range(12)))
    vision, text = folders("siglip-llama")
    more = ["--test_dataset", file] if split == "test" else ["--predict_with_generate", "--eval_share", "0.3"]
    train_sft.main(
        [
            "--vision_model", str(vision), "--text_model", str(text), "--dataset", file, "--max_length", "50",
            "--output_dir", str(tmp_path / "out"), *QUICK, *more,
        ]
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert lines and all(line["expected"] == [LONG] for line in lines)


def test_items_to_ask_are_those_of_every_source_and_of_a_list_the_list(image):
    rows = datasets.Dataset.from_dict({"image": [image(0)], "captions": [["a cat", "one cat"]]})
    dataset = ConversationDataset(rows, Reading("data", caption_choice="first"))
    assert (len(dataset), len(items_to_ask(dataset))) == (1, 2)
    assert items_to_ask([1, 2]) == [1, 2]
