"""One prompt is answered as it is written, in whole characters, and each turn runs only what is new."""

import gc
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from inference_vlm.answering import Answerer, Conversation, Prompt, answer, greedy
from inference_vlm.spoken import Spoken
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage
from tests import tiny


def user(text, *images):
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def assistant(text):
    return {"role": "assistant", "content": text}


def talkative(model, seed=5):
    """The model, with weights of which answers depend on what is seen."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def answerer(composed):
    model, processor = composed
    return Answerer(talkative(model), processor)


def alone(answerer, messages, config):
    """The answer to a prompt by itself, as an evaluation asks for it."""
    prepared = answerer.read(messages)
    ids, _ = answerer.processor.encode_messages(messages, add_generation_prompt=True)
    return answer(answerer.model, answerer.processor, [Prompt(ids, prepared.images)], 1, config)[0]


def talk(answerer, image, turns=4, tokens=6):
    """Of each turn of a conversation: the answer, what an evaluation would have got, and how it ended."""
    settings, conversation = answerer.settings(temperature=0, max_new_tokens=tokens), Conversation()
    messages = []
    for number in range(turns):
        messages.append(user(f"what is number {number}?", *[image(number)] * (number % 2 == 0)))
        stream = answerer.stream(answerer.read(messages), settings, conversation=conversation)
        text = "".join(stream)
        yield text, alone(answerer, messages, settings.config), stream.finish
        messages.append(assistant(text or "."))


def test_each_turn_is_answered_as_without_what_earlier_ones_left_and_runs_only_what_is_new(answerer, image):
    last = 0
    for text, expected, finish in talk(answerer, image):
        assert text == expected
        assert finish.cached_tokens >= last and finish.prompt_tokens > finish.cached_tokens
        last = finish.prompt_tokens
    assert last > 60


def test_tiled_images_of_a_conversation_are_encoded_once(folders, image):
    model, processor = tiny.compose(*folders("siglip-llama"), max_tiles=4)
    answerer = Answerer(talkative(model), processor)
    answerer.max_positions = None
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    settings, conversation = answerer.settings(temperature=0, max_new_tokens=4), Conversation()
    large, small = image(1, size=(64, 64)), image(2, size=(20, 20))
    messages = [user("what?", large)]
    texts = ["".join(answerer.stream(answerer.read(messages), settings, conversation=conversation))]
    messages += [assistant("it"), user("and?", small, large)]
    stream = answerer.stream(answerer.read(messages), settings, conversation=conversation)
    texts.append("".join(stream))
    assert seen == [5, 1 + 5] and stream.finish.cached_tokens > processor.image_tokens(64, 64)
    assert texts == [alone(answerer, messages[:1], settings.config), alone(answerer, messages, settings.config)]


def test_another_image_or_another_word_is_run_again_from_there(answerer, image):
    settings, conversation = answerer.settings(temperature=0, max_new_tokens=5), Conversation()
    one = answerer.read([user("what is it in the picture?", image(0))])
    for messages in (
        [user("what is it in the picture?", image(1))],
        [user("what is it in the house?", image(1))],
        [user("what is it in the picture?", image(1))],
        [user("what is it in the picture? and then?", image(1), image(1))],
        [user("no picture at all?")],
    ):
        list(answerer.stream(one, settings, conversation=conversation))
        stream = answerer.stream(answerer.read(messages), settings, conversation=conversation)
        assert "".join(stream) == alone(answerer, messages, settings.config)
        list(answerer.stream(answerer.read(messages), settings, conversation=conversation))
    stream = answerer.stream(answerer.read(messages), settings, conversation=conversation)
    list(stream)
    assert stream.finish.cached_tokens == stream.finish.prompt_tokens - 1  # of the same prompt all but its last token


def test_a_caption_prompt_that_ends_in_its_image_runs_the_image_again(answerer, image):
    settings, conversation = answerer.settings(temperature=0, max_new_tokens=5), Conversation()
    prepared = answerer.read_caption([image(0)])
    expected = "".join(answerer.stream(prepared, settings))
    for _ in range(2):
        stream = answerer.stream(prepared, settings, conversation=conversation)
        assert "".join(stream) == expected
    assert stream.finish.cached_tokens == prepared.prompt_tokens - prepared.image_tokens


def causal(folder, kind):
    """A language model that cannot go back in its cache: its windows move on, its layers are recurrent, or ..."""
    torch.manual_seed(4)
    tokenizer = tiny.with_chatml(tiny.unigram_tokenizer())
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=256, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    if kind == "dynamic":  # keys of a short text are turned otherwise in a long one
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 64}, rope_parameters=rope))
    elif kind == "window":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=16, head_dim=8))
    else:
        sizes |= dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
        model = FalconH1ForCausalLM(FalconH1Config(**sizes, mamba_chunk_size=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["window", "recurrent", "dynamic"])
def test_where_a_cache_cannot_be_cut_the_prompt_is_run_again_and_the_answer_is_the_same(kind, folders, image, tmp_path):
    model, processor = tiny.compose(folders("siglip-llama")[0], causal(tmp_path / kind, kind))
    answerer = Answerer(talkative(model), processor)
    finishes = []
    for text, expected, finish in talk(answerer, image, turns=3):
        assert text == expected
        finishes.append(finish)
    assert kind == "window" or all(finish.cached_tokens == 0 for finish in finishes)


@pytest.mark.parametrize("kind", ["window", "full"])
def test_what_was_written_is_not_run_again_where_the_next_prompt_goes_on_from_it(kind, folders, image, tmp_path):
    text = causal(tmp_path / kind, kind) if kind == "window" else folders("siglip-llama")[1]
    model, processor = tiny.compose(folders("siglip-llama")[0], text)
    answerer, conversation = Answerer(talkative(model), processor), Conversation()
    settings = answerer.settings(temperature=0, max_new_tokens=6)
    settings.config.eos_token_id = None
    prepared = answerer.read([user("what is it?", image(0))])
    for _ in range(3):
        ids = model.generate(
            torch.tensor([prepared.row]),
            pixel_values=processor.process_images(prepared.images)["pixel_values"],
            generation_config=settings.config,
        )[0].tolist()
        stream = answerer.stream(prepared, settings, conversation=conversation)
        assert "".join(stream) == processor.tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
        prepared = prepared._replace(row=[*ids, 60, 61, 62])
    assert stream.finish.cached_tokens == stream.finish.prompt_tokens - 4  # and the last that was written


def test_a_stop_string_ends_the_answer_and_is_never_shown(answerer, image):
    settings, prepared = answerer.settings(temperature=0, max_new_tokens=40), answerer.read([user("what?", image(3))])
    whole = "".join(answerer.stream(prepared, settings))
    assert len(whole) > 4
    for length in (1, 2, 3):
        stop = whole[2 : 2 + length]
        stream = answerer.stream(prepared, settings, stop=["never", stop])
        text = "".join(stream)
        assert text == whole[: whole.index(stop)].rstrip() and stream.finish.reason == "stop"
        assert stream.finish.completion_tokens < 40
    stream = answerer.stream(prepared, settings, stop=[whole[-1] + "and more", "\x00"])  # what only begins like one
    assert "".join(stream) == whole and stream.finish.reason == "length"
    with pytest.raises(DuetError, match="not empty"):
        answerer.stream(prepared, settings, stop=[""])


def test_a_control_token_among_the_stop_strings_ends_an_answer(answerer, image):
    settings, prepared = answerer.settings(temperature=0, max_new_tokens=4), answerer.read([user("what?", image(3))])
    token = answerer.processor.image_token
    written = iter([5, answerer.processor.image_token_id, 6, 7])
    settings.config.suppress_tokens = None

    def forced(module, given, outputs):
        outputs.logits[:, -1] = -1.0
        outputs.logits[:, -1, next(written)] = 1.0
        return outputs

    handle = answerer.model.register_forward_hook(forced)
    stream = answerer.stream(prepared, settings, stop=[token])
    list(stream)
    handle.remove()
    assert stream.finish.reason == "stop" and stream.finish.completion_tokens == 2


def slow(answerer, seconds=0.02):
    """The number of steps that the model took, which last a while."""
    steps = []
    answerer.model.register_forward_pre_hook(lambda *given: (steps.append(1), time.sleep(seconds))[0] and None)
    return steps


def test_a_flag_ends_an_answer_within_a_step(answerer, image):
    steps, cancelled = slow(answerer), threading.Event()
    prepared = answerer.read([user("what?", image(0))])
    settings = answerer.settings(temperature=0, max_new_tokens=80)
    settings.config.eos_token_id = None
    written = []

    def tell(piece):
        written.append((piece, len(steps)))
        cancelled.set()

    finish = answerer.write(prepared, settings, cancelled=cancelled, tell=tell)
    assert finish.reason == "cancelled" and len(steps) == finish.completion_tokens == written[0][1] < 80
    assert answerer.write(prepared, settings, cancelled=cancelled).completion_tokens == 0
    assert len(steps) == finish.completion_tokens  # nothing was run for one that nobody waits for


def test_whoever_lets_go_of_a_stream_ends_the_answer_and_the_next_is_not_held_up(answerer, image):
    steps = slow(answerer)
    prepared = answerer.read([user("what?", image(0))])
    settings = answerer.settings(temperature=0, max_new_tokens=100)
    settings.config.eos_token_id = None
    for _ in answerer.stream(prepared, settings):
        break
    gc.disable()
    try:
        stream = answerer.stream(prepared, settings)
        next(stream)
        del stream
    finally:
        gc.enable()
    taken = len(steps)
    time.sleep(0.1)
    assert len(steps) == taken < 60 and threading.active_count() < 20
    assert answerer.turns._places.acquire(timeout=1)
    answerer.turns._places.release()


def test_what_goes_wrong_while_writing_is_raised_where_it_is_read(answerer, image):
    prepared = answerer.read([user("what?", image(0))])
    own = answerer.model.generation_config

    def fails(*given):
        raise RuntimeError("out of memory")

    handle = answerer.model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answerer.stream(prepared))
    handle.remove()
    assert answerer.model.generation_config is own and "".join(answerer.stream(prepared)) is not None


def test_answers_of_several_threads_are_those_of_one(answerer, image):
    settings = answerer.settings(temperature=0, max_new_tokens=5)
    asked = [[user(f"what is it, {number}?", image(number))] for number in range(6)]
    expected = [alone(answerer, messages, settings.config) for messages in asked]
    found = {}

    def ask(number):
        found[number] = "".join(answerer.stream(answerer.read(asked[number]), settings))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == expected


def test_a_seed_draws_the_same_answer_and_touches_no_other_random_numbers(answerer, image):
    prepared = answerer.read([user("what?", image(0))])

    def drawn(**options):
        return "".join(answerer.stream(prepared, answerer.settings(max_new_tokens=12, **options)))

    before = torch.random.get_rng_state()
    assert drawn(temperature=1.5, seed=7) == drawn(temperature=1.5, seed=7)
    assert len({drawn(temperature=1.5, seed=seed) for seed in range(6)}) > 4
    assert len({drawn(temperature=1.5) for _ in range(6)}) > 4
    assert len({drawn(top_p=0.99, seed=seed) for seed in range(6)}) > 1
    assert drawn(temperature=1.5, top_k=1, seed=3) == drawn(temperature=0) == drawn(temperature=1.5, top_p=0.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    from transformers import GenerationConfig

    from inference_vlm.sampled import drawing

    scores = torch.tensor([[0.5, 2.0, -1.0, float("-inf"), 1.0]]).expand(20_000, -1)
    config = GenerationConfig(do_sample=True, temperature=2.0, top_k=3)
    plain, processors = drawing(config, range(20_000))
    found = processors(torch.zeros(20_000, 1, dtype=torch.long), scores.clone()).argmax(-1).bincount(minlength=5)
    expected = torch.tensor([0.5, 2.0, float("-inf"), float("-inf"), 1.0]).div(2).softmax(-1)
    assert torch.allclose(found / 20_000, expected, atol=0.015)
    assert config.do_sample and plain.do_sample is False and plain.temperature is None


def spoken(tokenizer, ids, stops=()):
    text = Spoken(tokenizer, (), stops)
    return [piece for piece in [*(text.add(id) for id in ids), text.end()] if piece]


@pytest.mark.parametrize("kind", ["byte-level", "unigram-always", "wordpiece", "bytes"])
def test_pieces_are_whole_characters_and_together_what_the_ids_say(kind):
    texts = [
        "  你好，世界！ two  blanks\n\nnew lines \n",
        "مرحبا بالعالم",
        "🙂👩‍👩‍👧 a 🇩🇪",
        "a cat sat on the mat",
        "",
    ]
    tokenizer = with_bytes() if kind == "bytes" else tiny.TOKENIZERS[kind]()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = spoken(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()
        if kind in ("byte-level", "bytes"):
            assert "".join(pieces) == text.strip() and not any("\ufffd" in piece for piece in pieces)
            assert len(pieces) > 1 or not text
        assert not pieces or not (pieces[0][0].isspace() or pieces[-1][-1].isspace())


def with_bytes():
    """Like Llama 2's: a character that is not in its vocabulary is written byte by byte."""
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), ("▁", -3.0), ("a", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]  # type: ignore[list-item]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_that_are_no_character_are_shown_and_held_no_longer_than_to_the_end():
    tokenizer = with_bytes()
    broken = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in (0xE4, 0x41, 0xFF, 0xBD, 0x42)]
    assert "".join(spoken(tokenizer, broken)) == tokenizer.decode(broken)


def test_a_control_token_within_an_answer_costs_no_blank():
    tokenizer = tiny.with_chatml(tiny.unigram_tokenizer())
    ids = [*tokenizer("a cat", add_special_tokens=False)["input_ids"]]
    between = [*ids, tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids, *ids]
    assert "".join(spoken(tokenizer, between)) == tokenizer.decode(between, skip_special_tokens=True).strip()


def test_an_answer_ends_at_the_first_of_its_stop_strings():
    tokenizer = tiny.byte_level_tokenizer()
    ids = tokenizer("a red circle\nUser: and?\n")["input_ids"]
    assert "".join(spoken(tokenizer, ids, ["\nUser:", "\n"])) == "a red circle"
    assert "".join(spoken(tokenizer, ids, ["and", "User:"])) == "a red circle"
    assert "".join(spoken(tokenizer, ids, ["\n\n", "never"])) == "a red circle\nUser: and?"
    assert spoken(tokenizer, tokenizer("\nyes")["input_ids"], ["\n"]) == []


def test_a_prompt_longer_than_the_context_is_counted_and_says_what_to_drop(answerer, image):
    most, each = answerer.max_positions, answerer.processor.image_seq_length
    assert most in (128, 256)
    long = "the cat sat on the mat and it looks at the sun. " * 60
    with pytest.raises(DuetError) as error:
        answerer.read([user("a cat?", image(0), image(1)), assistant("yes"), user(long)])
    line = str(error.value)
    assert f"{2 * each:,} of them those of 2 images" in line and f"has {most:,}" in line
    assert "earlier turns or images" in line and "\n" not in line
    with pytest.raises(DuetError, match=r"leave out [\d,]+ or more: words\.$"):
        answerer.read([user(long)])


def test_an_answer_ends_where_the_context_does(answerer, image):
    prepared = answerer.read([user("the cat " * 20, image(0))])
    settings = answerer.settings(temperature=0, max_new_tokens=10_000)
    settings.config.eos_token_id = None
    finish = answerer.write(prepared, settings)
    assert finish.reason == "length"
    assert finish.prompt_tokens + finish.completion_tokens == answerer.max_positions


def test_images_are_read_from_where_they_may_be(answerer, image, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    image(0).save(file)
    assert answerer.read([user("?", str(file))]).names == answerer.read([user("?", file)]).names
    assert answerer.read([user("?", str(file))]).image_tokens == answerer.processor.image_tokens(28, 40)
    with pytest.raises(DuetError, match="is a URL, and none is fetched"):
        answerer.read([user("?", "http://127.0.0.1/a.png")])
    monkeypatch.setattr("processing.image_urls_vlm.is_offline_mode", lambda: False)
    with pytest.raises(BadImage, match="no address of the internet at large"):
        answerer.read([user("?", "http://127.0.0.1/a.png")], allow_urls=True)
    for name in (str(file), "a.png", file):
        with pytest.raises(DuetError, match="is a file, and none is opened here"):
            answerer.read([user("?", name)], allow_files=False)
    with pytest.raises(DuetError, match="unknown scheme"):
        answerer.read([user("?", f"file://{file}")], allow_files=False)
    with pytest.raises(BadImage, match="no such image file"):
        answerer.read([user("?", "gone.png")])
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(BadImage, match="not a readable image"):
        answerer.read([user("?", tmp_path / "b.png")])


def test_settings_that_cannot_be_are_a_line_and_the_models_own_hold_where_none_is_given(answerer):
    for name, value in (
        ("temperature", -1), ("temperature", float("nan")), ("top_p", 1.5), ("max_new_tokens", 0), ("min_p", 2),
        ("top_k", -1), ("top_k", 1.5), ("seed", 2**64), ("repetition_penalty", 0),
    ):  # fmt: skip
        with pytest.raises(DuetError, match=f"^{name}={value}: expected"):
            answerer.settings(**{name: value})
    own = answerer.model.generation_config
    own.num_beams, own.stop_strings = 4, ["a", "\n"]
    assert answerer.settings().config.num_beams is None
    prepared = answerer.read([user("what?")])
    stream = answerer.stream(prepared, answerer.settings(max_new_tokens=30))
    assert not {"a", "\n"} & set("".join(stream))
    own.num_beams = own.stop_strings = None
    own.do_sample, own.temperature, own.repetition_penalty, own.max_new_tokens = True, 0.7, 1.3, 17
    config = answerer.settings().config
    assert config.do_sample and config.temperature == 0.7 and config.max_new_tokens == 17 and config is not own
    config = answerer.settings(temperature=0).config
    assert not config.do_sample and config.repetition_penalty is None
    assert config.eos_token_id == greedy(answerer.model, answerer.processor, 1).eos_token_id


def test_prompts_answered_together_get_what_each_would_alone_up_to_its_own_end_of_the_context(answerer, image):
    settings = answerer.settings(temperature=0, max_new_tokens=9)
    settings.config.eos_token_id = None
    word = answerer.processor.tokenizer("cat", add_special_tokens=False)["input_ids"][-1]
    prepared = []
    for number in range(5):
        one = answerer.read([user(f"what is it, {number}?", *[image(number)] * (number % 3))])
        if number > 2:  # with room for 2 tokens, and for 9
            one = one._replace(row=[*one.row, *[word] * (answerer.max_positions - len(one.row) - (2, 9)[number - 3])])
        prepared.append(one)
    expected = [(answerer.write(one, settings), "".join(answerer.stream(one, settings))) for one in prepared]
    pieces = [[] for _ in prepared]
    found = answerer.write_together(prepared, settings, tell=lambda number, piece: pieces[number].append(piece))
    assert [(finish, "".join(text)) for finish, text in zip(found, pieces)] == expected
    assert [finish.completion_tokens for finish in found] == [9, 9, 9, 2, 9]
    stopped = expected[1][1][2]
    found = answerer.write_together(prepared, settings, stop=[stopped])
    assert found == [answerer.write(one, settings, stop=[stopped]) for one in prepared]
