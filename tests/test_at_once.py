"""Several answers are written at the same time, and each is what it is alone."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from inference_vlm.answering import Answerer, Conversation
from inference_vlm.turns import kept_between_steps
from processing import VLMProcessor
from tests import matrix, tiny
from tests.test_conversing import assistant, causal, talkative, user


def answerer_of(name, folder):
    matrix.save_language_model(name, folder)
    model = matrix.compose("ViT", folder, None)
    processor = VLMProcessor.from_backbones(matrix.encoder_of("ViT"), str(folder), model.config)
    processor.update_generation_config(model.generation_config)
    return Answerer(talkative(model), processor)


@pytest.fixture
def answerer(composed):
    model, processor = composed
    return Answerer(talkative(model), processor)


def say(answerer, messages, conversation=None, **settings):
    """An answer to the byte, and what it took."""
    stream = answerer.stream(answerer.read(messages), answerer.settings(**settings), conversation=conversation)
    return list(stream), stream.finish


def talk(answerer, image, number, turns=2):
    """A conversation of one of many people: pictures, seeds, likeliest and drawn tokens, turns whose cache is kept."""
    conversation, messages, said = Conversation(), [], []
    for turn in range(turns):
        pictures = [image(number + turn)] * (number % 3 > 0)
        messages.append(user(f"what is {number}{' and then' * (number % 4)}?", *pictures))
        settings = {"temperature": 1.3, "top_k": 20 + number, "seed": number} if number % 2 else {"temperature": 0}
        said.append(say(answerer, messages, conversation, max_new_tokens=5 + number, **settings))
        messages.append(assistant("".join(said[-1][0]) or "."))
    return said


def check(answerer, image, people=6, at_once=4):
    alone = [talk(answerer, image, number) for number in range(people)]
    assert answerer.turns.share(at_once) is None and answerer.turns.at_once == at_once
    own = answerer.model.generation_config
    with ThreadPoolExecutor(people) as threads:
        together = list(threads.map(lambda number: talk(answerer, image, number), range(people)))
    assert together == alone
    assert answerer.model.generation_config is own


def test_answers_that_are_written_at_the_same_time_are_what_each_is_alone(answerer, image):
    check(answerer, image, people=10)


FAMILIES = ["Gemma 3 text", "Granite 4", "Falcon-H1", "Qwen3-MoE", "LFM2"]


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES,
        *(pytest.param(name, marks=pytest.mark.slow) for name in matrix.LANGUAGE_MODELS if name not in FAMILIES),
    ],
)
def test_so_they_are_with_every_language_model(name, image, tmp_path):
    check(answerer_of(name, tmp_path), image, people=4)


def dynamic(folders, tmp_path):
    model, processor = tiny.compose(folders("siglip-llama")[0], causal(tmp_path / "dynamic", "dynamic"))
    return Answerer(talkative(model), processor)


def test_rotary_frequencies_that_grow_with_a_text_are_that_texts_alone(folders, image, tmp_path):
    answerer = dynamic(folders, tmp_path)
    (rope,) = answerer.turns._kept.ropes
    assert rope.max_seq_len_cached == 64
    long, short = [user("a red circle " * 12)], [user("what is it?")]
    middle = [user("a red circle " * 3)]  # which grows beyond the 64 behind the long one
    settings = {"temperature": 0, "max_new_tokens": 30}
    alone = [say(answerer, asked, **settings) for asked in (middle, short, long, middle)]
    assert alone[0] == alone[3] and 64 < rope.max_seq_len_cached < alone[2][1].prompt_tokens
    check(answerer, image)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda asked: say(answerer, asked, **settings), [long, middle, short, middle]))
    assert together == [alone[2], alone[0], alone[1], alone[0]]
    pieces = [[], [], []]  # as one batch, in which the longest turns the positions of all
    prepared = [answerer.read(asked) for asked in (long, middle, short)]
    answerer.write_together(prepared, answerer.settings(**settings), tell=lambda row, piece: pieces[row].append(piece))
    assert ["".join(row) for row in pieces] == ["".join(alone[number][0]) for number in (2, 0, 1)]


def test_experts_are_multiplied_as_for_the_step_of_each_answer(image, tmp_path, monkeypatch):
    """The library has others for prompts than for tokens on an accelerator, by a setting of the model."""
    answerer = answerer_of("Qwen3-MoE", tmp_path)
    model, own = answerer.model, answerer.model.get_experts_implementation()
    assert own["text_config"] not in (None, "eager")

    @contextlib.contextmanager
    def switched(self):
        before = self.get_experts_implementation()
        self.set_experts_implementation({**before, "text_config": "eager"})
        try:
            yield
        finally:
            self.set_experts_implementation(before)

    monkeypatch.setattr(type(model), "_optimize_model_for_decode", switched)
    seen = {1: set(), 2: set()}
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, given: seen[1 if given[0].shape[1] == 1 else 2].add(
            model.config.text_config._experts_implementation
        )
    )
    check(answerer, image, people=4)
    assert seen == {1: {"eager"}, 2: {own["text_config"]}} and model.get_experts_implementation() == own


def stepping(answerer):
    """Which thread each step of the model is of."""
    steps = []
    answerer.model.register_forward_pre_hook(lambda *given: steps.append(threading.get_ident()))
    return steps


def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one(answerer, image):
    answerer.turns.share(2)
    steps, begun, ended = stepping(answerer), threading.Event(), []
    settings = answerer.settings(temperature=0, max_new_tokens=100)
    settings.config.eos_token_id = None
    prepared = answerer.read([user("what?")])

    def long():
        answerer.write(prepared, settings, tell=lambda piece: begun.set())
        ended.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    assert begun.wait(10)
    say(answerer, [user("and?", image(0))], temperature=0, max_new_tokens=4)
    ended.append("short")
    thread.join()
    assert ended == ["short", "long"]
    mine = [number for number, thread in enumerate(steps) if thread != steps[0]]
    assert all(last + 2 == number for last, number in zip(mine, mine[1:]))  # a step of each in turn


def test_no_more_are_written_at_the_same_time_than_have_a_place(answerer):
    answerer.turns.share(2)
    settings, prepared = answerer.settings(temperature=0, max_new_tokens=30), answerer.read([user("what?")])
    settings.config.eos_token_id = None
    writing, most = set(), []

    def write(number):
        def tell(piece):
            writing.add(number)
            most.append(len(writing))

        finish = answerer.write(prepared, settings, tell=tell)
        writing.discard(number)
        return finish.completion_tokens

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(write, range(5))) == [30] * 5
    assert max(most) == 2


def test_one_that_ends_badly_or_is_cancelled_leaves_the_model_to_the_others(answerer, image):
    answerer.turns.share(3)
    expected = say(answerer, [user("what?", image(0))], temperature=0, max_new_tokens=20)
    settings, prepared = answerer.settings(temperature=0, max_new_tokens=60), answerer.read([user("and?")])
    settings.config.eos_token_id = None

    def write(how):
        if how == "well":
            return say(answerer, [user("what?", image(0))], temperature=0, max_new_tokens=20)
        cancelled, pieces = threading.Event(), []

        def tell(piece):
            pieces.append(piece)
            if len(pieces) == 3:
                if how == "cancelled":
                    cancelled.set()
                else:
                    raise RuntimeError("it fell over")

        try:
            return answerer.write(prepared, settings, tell=tell, cancelled=cancelled).reason
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(write, ["well", "cancelled", "badly"] * 4))
    assert found == [expected, "cancelled", "it fell over"] * 4
    assert not answerer.turns._line._is_taken and not answerer.turns._line.is_waited_for


class Remembers(torch.nn.Module):
    """A layer that keeps what it saw last in itself, as code of others may."""

    def __init__(self, layer, inside):
        super().__init__()
        self.layer, self.seen = layer, None
        self.register_buffer("total", torch.zeros(1))
        self.inside = inside

    def forward(self, states, *args, **kwargs):
        if self.inside == "attribute":
            self.seen = states[:, -1:]
        elif self.inside == "buffer":
            self.total.add_(states.abs().sum())
        return self.layer(states, *args, **kwargs)


@pytest.mark.parametrize("inside, named", [("attribute", "seen"), ("buffer", "total"), ("nothing", None)])
def test_a_model_that_keeps_something_in_itself_writes_one_answer_at_a_time(folders, inside, named):
    model, processor = tiny.compose(*folders("siglip-llama"))
    layers = model.model.language_model.layers
    layers[1].mlp = Remembers(layers[1].mlp, inside)
    answerer = Answerer(model, processor)
    keeper = answerer.turns.share(4)
    assert keeper == (named and f"layers.1.mlp.{named}")
    assert answerer.turns.at_once == (1 if named else 4)


def test_what_keeps_nothing_is_found_to_keep_nothing_whatever_it_made_before(answerer, image):
    say(answerer, [user("what?", image(0))], max_new_tokens=3)
    started = time.perf_counter()
    assert kept_between_steps(answerer.model) is None
    assert time.perf_counter() - started < 5
