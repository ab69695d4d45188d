"""Each answer the last of a sample of its own, or each question alone: however the rows are read."""

import datasets
import pytest
from torch.utils.data import DataLoader

from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset, MixedDataset, StreamedDataset
from processing.batching.encoding import IGNORE, Encoder, encode_dialogue
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading, split_item
from processing.reading.read_rows import read_rows
from tests import tiny
from training_vlm.arguments import DataArguments


# As DeepSeek-R1: the prompt opens a thought, of which an earlier answer shows nothing.
OPENS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
WORDS = {"what?": "blue.", "and?": "red.", "how many?": "two"}


@pytest.fixture(scope="module")
def processor():
    tokenizer = tiny.with_chatml(tiny.byte_level_tokenizer())
    tokenizer.chat_template = OPENS
    return tiny.processor_of(tokenizer)


def said(*pairs):
    return [
        message for q, a in pairs for message in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
    ]


@pytest.fixture
def rows(image, tmp_path):
    """Dialogues of one to three turns with no to two images, and a row that cannot be read."""
    for number in range(2):
        image(number).save(tmp_path / f"{number}.png")
    pairs = list(WORDS.items())
    tagged = [("<image> what?", "blue."), ("<image> and?", "red."), ("how many?", "two")]
    return datasets.Dataset.from_list(
        [
            {"messages": said(*pairs), "images": []},
            {"messages": said(*tagged), "images": ["0.png", "1.png"]},
            {"messages": [{"role": "nobody", "content": "a"}], "images": []},
            {"messages": said(*pairs[:1]), "images": []},
        ]
    ), ImagePolicy(str(tmp_path))


def learned_by(processor, batches):
    """What each sample of batches learns, and how many images it sees."""
    found = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
            answer = processor.decode([id for id in labels if id != IGNORE])
            if answer:
                found.append((answer.removesuffix("<|im_end|>"), ids.count(processor.image_token_id) // 3))
    return found


EXPECTED = [
    ("blue.", 0), ("red.", 0), ("two", 0), ("blue.", 1), ("red.", 2), ("two", 2), ("blue.", 0),
]  # fmt: skip


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("choice", ["all", "random"])
def test_each_answer_is_learned_once_encoded_ahead_or_not(ahead, workers, choice, rows, processor):
    rows, policy = rows
    reading = Reading("rows", images=policy, split_turns="history", caption_choice=choice)
    dataset = ConversationDataset(rows, reading)
    assert len(dataset) == 8  # and the row that cannot be read
    if ahead:
        dataset.encode_ahead(Encoder(processor))
        assert len(dataset) == 7 and dataset.account.total["dropped: malformed row"] == 1
    assert len(MixedDataset([dataset])) == len(dataset)
    loader = DataLoader(dataset, batch_size=3, collate_fn=VLMDataCollator(processor), num_workers=workers)
    assert learned_by(processor, loader) == EXPECTED


def test_each_answer_is_learned_once_of_a_stream(rows, processor):
    rows, policy = rows
    reading = Reading("rows", images=policy, split_turns="history", caption_choice="random")
    stream = StreamedDataset([(rows.to_iterable_dataset(), reading)], shuffle_buffer=1)
    items = [item for item, _ in zip(stream, range(8))]
    assert learned_by(processor, [VLMDataCollator(processor)(items)]) == EXPECTED


def test_each_answer_is_learned_once_by_whoever_collates_rows(rows, processor, tmp_path):
    rows, _ = rows
    read = read_rows(rows, image_dir=tmp_path)
    collate = VLMDataCollator(processor, split_turns="history")
    assert learned_by(processor, [collate(read)]) == EXPECTED
    split = read_rows(rows, image_dir=tmp_path, split_turns="history")
    assert learned_by(processor, [VLMDataCollator(processor)(split)]) == EXPECTED
    assert len(learned_by(processor, [VLMDataCollator(processor)(read)])) == 3  # the last ones alone
    encoded = [Encoder(processor)(item) for item in split]
    assert learned_by(processor, [collate(encoded)]) == EXPECTED
    with pytest.raises(ValueError, match="split_turns='all': expected one of none, history"):
        VLMDataCollator(processor, split_turns="all")


def test_the_prompt_of_each_sample_is_that_of_generation_and_nothing_is_context_only_unsaid(processor):
    whole = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in said(*WORDS.items())]}
    whole["images"] = []
    assert encode_dialogue(processor, whole)["notes"] == ["an answer is context only"] * 2
    samples = split_item(whole, "history")
    for number, sample in enumerate(samples):
        encoded = encode_dialogue(processor, sample)
        prompt, _ = processor.encode_messages(whole["messages"][: 2 * number + 1], add_generation_prompt=True)
        assert not encoded.get("notes") and encoded["input_ids"][: len(prompt)] == prompt
        assert [label != IGNORE for label in encoded["labels"]].index(True) == len(prompt)
    # An answer that is not to be learned is none to end with; where there is none, the sample is counted as it was.
    whole["messages"][1]["train"] = False
    whole["messages"][3]["weight"] = 0
    assert [len(sample["messages"]) for sample in split_item(whole, "history")] == [6]
    whole["messages"][5]["train"] = False
    assert split_item(whole, "history") == [whole]
    assert split_item({"source": "a", "row": 1, "dropped": ("malformed row", "")}, "history") == [
        {"source": "a", "row": 1, "dropped": ("malformed row", "")}
    ]


ALONE = [("blue.", 0), ("red.", 0), ("two", 0), ("blue.", 1), ("red.", 2), ("two", 2), ("blue.", 0)]


@pytest.mark.parametrize("how", ["ahead", "when asked for", "stream", "read_rows", "collator"])
def test_each_question_is_learned_alone_with_the_images_shown_so_far(how, rows, processor, tmp_path):
    rows, policy = rows
    reading = Reading("rows", images=policy, split_turns="questions")
    if how in ("ahead", "when asked for"):
        items = ConversationDataset(rows, reading)
        assert len(items) == 8
        if how == "ahead":
            items.encode_ahead(Encoder(processor))
        items = [items[index] for index in range(len(items))]
    elif how == "stream":
        items = [
            i for i, _ in zip(StreamedDataset([(rows.to_iterable_dataset(), reading)], shuffle_buffer=1), range(8))
        ]
    else:
        items = read_rows(rows, image_dir=tmp_path, split_turns="questions" if how == "read_rows" else "none")
    collate = VLMDataCollator(processor, split_turns="questions" if how == "collator" else "none")
    batch = collate(items)
    assert learned_by(processor, [batch]) == ALONE
    prompts = {processor.decode(ids[:place]) for ids, place in zip(batch["input_ids"], first_learned(batch))}
    assert not any("blue" in prompt or "red" in prompt for prompt in prompts)  # no earlier answer
    assert not any(prompt.count("?") > 1 for prompt in prompts)  # and no earlier question


def first_learned(batch):
    return batch["labels"].ne(IGNORE).int().argmax(1).tolist()


IMAGE = {"type": "image"}


def says(role, *words, **more):
    """A message; `None` among its words is an image."""
    parts = [IMAGE if word is None else {"type": "text", "text": word} for word in words]
    return {"role": role, "content": parts, **more}


def shortly(part):
    """Roles and words of a conversation, an image as its number, and what it says of how it is learned."""
    images = iter(part["images"])
    return [
        (m["role"][0], *(next(images) if p == IMAGE else p["text"] for p in m["content"]), *_learned(m))
        for m in part["messages"]
    ]


def _learned(message):
    return [f"{name} {message[name]}" for name in ("train", "weight") if name in message]


@pytest.mark.parametrize(
    "messages, expected",
    [
        (  # an image where it is asked about, several, and one in an answer
            [says("system", "be brief"), says("user", "see ", None, "?"), says("assistant", "yes"),
             says("user", None, "and?"), says("assistant", "so: ", None), says("user", "which?"),
             says("assistant", "a")],
            [[("s", "be brief"), ("u", "see ", 0, "?"), ("a", "yes")],
             [("s", "be brief"), ("u", 0, 1, "and?"), ("a", "so: ", 2)],
             [("s", "be brief"), ("u", 0, 1, 2, "which?"), ("a", "a")]],
        ),
        (  # it begins with an answer, which no question follows
            [says("assistant", "hello"), says("user", None, "what?"), says("assistant", "a cat")],
            [[("a", "hello")], [("u", 0, "what?"), ("a", "a cat")]],
        ),
        (  # a question in several messages, and several answers to one
            [says("user", None), says("user", "what?"), says("assistant", "a"), says("assistant", "cat"),
             says("user", "and?"), says("user", "why?"), says("assistant", "so")],
            [[("u", 0), ("u", "what?"), ("a", "a"), ("a", "cat")], [("u", 0, "and?"), ("u", "why?"), ("a", "so")]],
        ),
        (  # what the system says later holds from there on, its image too
            [says("user", None, "what?"), says("assistant", "a cat"), says("system", "now this: ", None),
             says("user", None, "and?"), says("assistant", "so"), says("user", "why?"), says("assistant", "it is")],
            [[("u", 0, "what?"), ("a", "a cat")],
             [("s", "now this: ", 1), ("u", 0, 2, "and?"), ("a", "so")],
             [("s", "now this: ", 1), ("u", 0, 2, "why?"), ("a", "it is")]],
        ),
        (  # what is not to be learned is no part, but its images were shown; weights stay with their answers
            [says("user", None, "what?"), says("assistant", "a cat", train=False), says("user", "and?"),
             says("assistant", "red", weight=0.5), says("user", "so?"), says("assistant", "", weight=0),
             says("user", "no answer")],
            [[("u", 0, "and?"), ("a", "red", "weight 0.5")]],
        ),
    ],
)  # fmt: skip
def test_a_question_has_its_own_answers_the_systems_words_and_the_images_so_far(messages, expected):
    number = sum(part == IMAGE for message in messages for part in message["content"])
    whole = {"messages": messages, "images": list(range(number))}
    assert [shortly(part) for part in split_item(whole, "questions")] == expected


def test_what_a_row_says_of_its_question_stays_with_that_question():
    row = {
        "question": "how many?", "answers": ["two", "2"], "kind": "number", "id": "7", "subset": "hard",
        "history": [["what?", "a cat"], ["and?", "red"]],
    }  # fmt: skip
    *others, last = Reading("rows", split_turns="questions").items(row, 3)
    assert [shortly(part)[0] for part in (*others, last)] == [("u", "what?"), ("u", "and?"), ("u", "how many?")]
    assert (last["answers"], last["kind"], last["id"]) == (["two", "2"], "number", "7")
    for part in others:
        assert part.keys().isdisjoint({"answers", "kind", "id"})
    assert {(part["subset"], part["row"], part["group"]) for part in (*others, last)} == {("hard", 3, 3)}
    dialogue = {"id": "7", "kind": "talk", "messages": said(("what?", "a cat"), ("and?", "red"))}
    parts = Reading("rows", split_turns="questions").items(dialogue, 0)
    assert [(part["id"], part["kind"]) for part in parts] == [("7", "talk")] * 2


def test_captions_of_an_image_are_drawn_all_the_same(image, tmp_path, processor):
    image(0).save(tmp_path / "0.png")
    rows = datasets.Dataset.from_list([{"image": "0.png", "caption": ["a cat", "a red cat"]}])
    for choice, number in (("random", 1), ("all", 2), ("first", 1)):
        options = {"images": ImagePolicy(str(tmp_path)), "caption_choice": choice, "prompt": "what?"}
        assert len(ConversationDataset(rows, Reading("rows", split_turns="history", **options))) == number
        dataset = ConversationDataset(rows, Reading("rows", split_turns="history", **options))
        assert len([dataset[index] for index in range(len(dataset))]) == number


def test_turns_are_split_in_stage_2_alone_and_not_where_the_last_is_learned_anyway():
    arguments = DataArguments(dataset="a", split_turns="history")
    assert arguments.encoding_kwargs(asks=True)["supervise"] == "all"
    with pytest.raises(ValueError, match="split_turns are about dialogues"):
        arguments.encoding_kwargs(asks=False)
    with pytest.raises(ValueError, match="leave out --supervise"):
        DataArguments(dataset="a", split_turns="history", supervise="last").encoding_kwargs(asks=True)
    with pytest.raises(ValueError, match="split_turns='all': expected one of none, history"):
        DataArguments(dataset="a", split_turns="all")
    with pytest.raises(ValueError, match="split_turns are about dialogues"):
        DataArguments(dataset="a", split_turns="questions").encoding_kwargs(asks=False)
    with pytest.raises(ValueError, match="split_turns='all': expected one of none, history, questions"):
        read_rows([], split_turns="all")
