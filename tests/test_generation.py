"""Generation: a batch writes what each prompt writes alone, and a trained model stops by itself."""

import pytest
import torch
from transformers import pipeline

from modeling_vlm.backbones_vlm import CACHE
from tests import tiny
from training_vlm.learning.tuning import apply_tuning


def prompts(image):
    """Ragged, with no to three images each."""
    return [
        _ask("what is it?", image(0)),
        _ask("which colour has the sun?"),
        _ask("describe both of the pictures in many words, and say what is left of the red circle", image(1), image(2)),
        _ask("and?", image(3), image(4), image(5)),
    ]


def _ask(question, *images):
    content = [{"type": "image", "image": one} for one in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def encode(processor, conversations):
    return processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def answers(model, inputs, **options):
    """The new tokens of each row, cut at the first end token."""
    written = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 12, **options})
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in written[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((place for place, id in enumerate(row) if id in ends), len(row))
        rows.append(row[:stop])
    return rows


@pytest.fixture
def lively(composed):
    """A model whose answers differ from prompt to prompt: random weights of a larger spread."""
    model, processor = composed
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model.float(), processor


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "no cache", "beams", "beams, no cache", "static cache", "prompt lookup"],
)
def test_a_batch_writes_what_each_prompt_writes_alone(lively, image, options):
    model, processor = lively
    asked = prompts(image)
    alone = [answers(model, encode(processor, [one]))[0] for one in asked]
    assert len({tuple(row) for row in alone}) == len(alone) and all(len(row) > 3 for row in alone)
    if "num_beams" in options:
        alone = [_beams_of_embeddings(model, encode(processor, [one])) for one in asked]
    if "prompt_lookup_num_tokens" in options:  # it takes one prompt at a time
        assert [answers(model, encode(processor, [one]), **options)[0] for one in asked] == alone
    else:
        assert answers(model, encode(processor, asked), **options) == alone


def _beams_of_embeddings(model, inputs):
    """Beam search over a prompt whose images are in place already, so that no beam can get those of another."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if "pixel_values" in inputs:
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
    written = model.generate(inputs_embeds=embeds, num_beams=3, do_sample=False, max_new_tokens=12)[0].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return written[: next((place for place, id in enumerate(written) if id in ends), len(written))]


def test_greedy_decoding_is_the_argmax_of_the_forward_pass(lively, image):
    """Token by token, from the whole sequence each time, the image token left out."""
    model, processor = lively
    for one in prompts(image):
        inputs = encode(processor, [one])
        written = answers(model, inputs, eos_token_id=-1)[0]
        ids, expected = inputs["input_ids"], []
        for _ in range(len(written)):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits[0, -1]
            logits[model.config.image_token_id] = -torch.inf
            expected.append(logits.argmax().item())
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], 1)
        assert written == expected


def test_the_image_token_is_never_written(composed, image):
    """Not even by a model that likes nothing better."""
    model, processor = composed
    inputs = encode(processor, prompts(image))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, torch.tensor(favourite), 50.0))
    favourite = [processor.image_token_id]
    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 2}):
        written = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 5, **options})
        assert processor.image_token_id not in written[:, inputs["input_ids"].shape[1] :]


def test_one_prompt_gives_several_samples(lively, image):
    model, processor = lively
    inputs = encode(processor, prompts(image)[:1])
    torch.manual_seed(0)
    samples = model.generate(**inputs, do_sample=True, num_return_sequences=5, max_new_tokens=8)
    assert len({tuple(row) for row in samples.tolist()}) > 1 and len(samples) == 5
    beams = model.generate(**inputs, do_sample=False, num_beams=4, num_return_sequences=3, max_new_tokens=8)
    assert len(beams) == 3


def test_another_model_may_assist(lively, image):
    """With text: the library gives an assistant no images."""
    model, processor = lively
    inputs = encode(processor, prompts(image)[1:2])
    assert answers(model, inputs, assistant_model=model) == answers(model, inputs)


def test_a_turn_goes_on_from_the_last_one(lively, image):
    """The cache of a first turn serves the second; its image is not encoded again."""
    model, processor = lively
    first = prompts(image)[0]
    inputs = encode(processor, [first])
    turn = model.generate(**inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, torch.tensor([[5, 6, 7]])], 1)
    fresh = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], do_sample=False, max_new_tokens=6)
    again = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, **{CACHE: turn[CACHE]})
    assert torch.equal(again, fresh)


# -- a model that was taught a handful of answers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(folders):
    """Each pair, made to know three answers by heart; taught once."""
    known = {}

    def get(pair, image):
        if pair not in known:
            model, processor = tiny.compose(*folders(pair), tiny.PAIRS[pair][2])
            lessons = [
                tiny.dialogue("what is it?", "a cat", image(0)),
                tiny.dialogue("what is it?", "a red circle on a mat", image(1)),
                tiny.dialogue("how many?", "two", image(2), more=(("which colour?", "it is blue"),)),
            ]
            apply_tuning(model, "full", "full")
            batch = tiny.collate(processor, lessons)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
            for _ in range(400):  # in evaluation mode: dropout would only take longer
                loss = model(**batch).loss
                if loss.item() < 0.01:
                    break
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert loss.item() < 0.01
            known[pair] = model.eval(), processor, lessons
        return known[pair]

    return get


def test_a_taught_model_stops_by_itself(pair, taught, image):
    """GPT-2's pad token is its end token, ChatML's end token is not eos: both end where the answer ends."""
    model, processor, lessons = taught(pair, image)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    for lesson in lessons:
        places = [place for place, message in enumerate(lesson["messages"]) if message["role"] == "assistant"]
        for place in places:
            asked = [{**m, "content": list(m["content"])} for m in lesson["messages"][:place]]
            images = iter(lesson["images"])
            for message in asked:
                message["content"] = [
                    {"type": "image", "image": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ]
            inputs = encode(processor, [asked])
            written = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
            assert len(written) < 40 and written[-1].item() in ends
            text = processor.decode(written, skip_special_tokens=True).strip()
            assert text == lesson["messages"][place]["content"][0]["text"]


def test_a_taught_batch_stops_row_by_row(pair, taught, image):
    model, processor, _ = taught(pair, image)
    inputs = encode(processor, [_ask("what is it?", image(0)), _ask("what is it?", image(1))])
    written = model.generate(**inputs, do_sample=False, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    assert texts == ["a cat", "a red circle on a mat"] and written.shape[1] < 40


def test_the_librarys_pipeline_answers(pair, taught, image):
    model, processor, _ = taught(pair, image)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    found = pipe(text=_ask("what is it?", image(1)), max_new_tokens=40, return_full_text=False, do_sample=False)
    assert found[0]["generated_text"].strip() == "a red circle on a mat"
    several = pipe(
        text=[_ask("what is it?", image(0)), _ask("what is it?", image(1))],
        max_new_tokens=40, return_full_text=False, do_sample=False, batch_size=2,
    )  # fmt: skip
    assert [one[0]["generated_text"].strip() for one in several] == ["a cat", "a red circle on a mat"]
