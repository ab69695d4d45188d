"""Choices are weighed as training would learn them, in the same pass in which the questions are answered."""

import pytest
import torch
from PIL import Image

from evaluation_vlm.asking import answer_questions
from evaluation_vlm.judgement import judge
from evaluation_vlm.metrics import choose_metrics
from evaluation_vlm.questions import Question, find_questions
from inference_vlm import weighing
from inference_vlm.answering import greedy
from inference_vlm.weighing import Weighing, answer_ids
from processing.batching.encoding import IGNORE, Encoder, encode_dialogue, encode_item
from processing.reading.conversations import conversations_from_row
from tests import tiny


OPTIONS = ["a cat", "two", "a large green triangle", "red"]


@pytest.mark.parametrize("template", tiny.TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "unigram-always"])
def test_the_ids_of_a_choice_are_those_that_training_learns(kind, template):
    processor = tiny.processor_of(kind, template)
    for answer in OPTIONS:
        learned = encode_dialogue(processor, tiny.dialogue("what is it?", answer))["labels"]
        assert answer_ids(processor, answer) == [label for label in learned if label != IGNORE]


@pytest.fixture
def asked(composed, image):
    """Questions of one to four choices about three images, one without an image and one without choices."""
    model, processor = composed
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    pictures = [image(number) for number in range(3)]
    rows = [
        {"image": pictures[0], "question": "what?", "choices": OPTIONS, "answer": 0},
        {"image": pictures[1], "question": "what is in the picture?", "choices": OPTIONS[:2], "answer": 1},
        {"image": pictures[0], "question": "and which colour has it?", "choices": OPTIONS[2:], "answer": 1},
        {"question": "how many?", "choices": OPTIONS[:3], "answer": 2},
        {"images": [pictures[2], pictures[0]], "question": "what are these?", "choices": OPTIONS, "answer": 3},
        {"image": pictures[1], "question": "what is it?", "answer": "a cat"},
    ]
    items = [item for row in rows for item in conversations_from_row(row, choice_answer="text")]
    return model, processor, find_questions([encode_item(item, Encoder(processor))[0] for item in items], processor)


def alone(model, processor, question: Question, option: str) -> float:
    """The mean log-likelihood of an option from pixels, by the loss that training would have of it."""
    images = question.prompt.images
    counts = [processor.image_tokens(image.height, image.width) for image in images]
    (row,) = processor.expand_images(question.prompt.ids, counts=counts)
    ids = torch.tensor([[*row, *answer_ids(processor, option)]])
    labels = ids.clone()
    labels[:, : len(row)] = IGNORE
    seen = dict(processor.process_images(images)) if images else {}
    return -model(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids), **seen).loss.item()


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_choice_is_as_likely_as_its_loss_says_and_costs_no_image(asked, batch_size):
    model, processor, questions = asked
    expected = [[alone(model.eval(), processor, one, option) for option in one.choices] for one in questions]
    config, seen = greedy(model, processor, 5), []
    only_answered = answer_questions(model, processor, questions, batch_size, config)
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    found = answer_questions(model, processor, questions, batch_size, config, weighs=True)
    assert sum(seen) == 3  # each image once, for answers and likelihoods
    assert [one.answer for one in found] == [one.answer for one in only_answered]
    assert [one.question for one in found] == questions
    for one, values in zip(found, expected):
        assert list(one.likelihoods or ()) == pytest.approx(values, abs=1e-5)
    judgement = judge(found, choose_metrics(questions))
    right = [
        question.is_right(question.choices[values.index(max(values))])
        for question, values in zip(questions[:5], expected)
    ]
    assert judgement.values["multiple_choice"] == pytest.approx(sum(right) / 5)
    assert judgement.scores["multiple_choice"].each[5] is None


def test_a_choice_that_there_is_no_room_for_is_the_least_likely(asked, monkeypatch):
    model, processor, questions = asked
    question = questions[0]._replace(choices=("a cat", " a cat" * 200))
    monkeypatch.setattr(model.model, "max_positions", 128, raising=False)
    long = question._replace(prompt=question.prompt._replace(ids=question.prompt.ids + [5] * 128))
    found = answer_questions(model, processor, [question, long], 4, greedy(model, processor, 3), weighs=True)
    assert found[0].likelihoods[0] > found[0].likelihoods[1] == -float("inf")
    assert found[1].likelihoods is None and found[1].answer == ""
    judgement = judge(found, choose_metrics([question], "multiple_choice"))
    assert judgement.scores["multiple_choice"].each == [1.0, 0.0]


@torch.no_grad()
def test_in_step_as_many_calls_are_made_as_the_process_with_the_most_choices_makes(asked, monkeypatch):
    model, processor, questions = asked
    calls, prompts = [], [[5, 6, 7], [8, 9]]
    ids = [answer_ids(processor, option) for option in OPTIONS]
    model.eval().register_forward_pre_hook(lambda module, given, named: calls.append(named), with_kwargs=True)
    found = []
    for others in (0, 2, 5):
        monkeypatch.setattr(weighing, "gather_object", lambda mine, others=others: [*mine, others])
        calls.clear()
        asking = Weighing([ids, ids[:1]], batch_size=2)
        asking.weigh(model, processor, [0, 1], prompts, [[], []], None, in_step=True)
        assert len(calls) == max(3, others)
        found.append(asking.found)
    assert found[0] == found[1] == found[2] and [len(values) for values in found[0].values()] == [4, 1]


@torch.no_grad()
def test_a_choice_is_weighed_with_all_tiles_of_its_images(folders):
    model, processor = tiny.compose(*folders("siglip-llama"), max_tiles=4)
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((32, 32), (64, 32), (64, 64))]
    rows = [{"images": pictures[n : n + 2], "question": "what?", "choices": OPTIONS[:3], "answer": 0} for n in range(3)]
    items = [item for row in rows for item in conversations_from_row(row, choice_answer="text")]
    questions = find_questions([encode_item(item, Encoder(processor))[0] for item in items], processor)
    found = answer_questions(model, processor, questions, 4, greedy(model, processor, 2), weighs=True)
    for one in found:
        expected = [alone(model.eval(), processor, one.question, option) for option in one.question.choices]
        assert list(one.likelihoods) == pytest.approx(expected, abs=1e-5)
