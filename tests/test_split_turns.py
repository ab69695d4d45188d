"""Each answer the last of a sample of its own: behind the prompt that generation gives, however the rows are read."""

import datasets
import pytest
from torch.utils.data import DataLoader

from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset, MixedDataset, StreamedDataset
from processing.batching.encoding import IGNORE, Encoder, encode_dialogue
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading, each_answer_last
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
    samples = each_answer_last(whole)
    for number, sample in enumerate(samples):
        encoded = encode_dialogue(processor, sample)
        prompt, _ = processor.encode_messages(whole["messages"][: 2 * number + 1], add_generation_prompt=True)
        assert not encoded.get("notes") and encoded["input_ids"][: len(prompt)] == prompt
        assert [label != IGNORE for label in encoded["labels"]].index(True) == len(prompt)
    # An answer that is not to be learned is none to end with; where there is none, the sample is counted as it was.
    whole["messages"][1]["train"] = False
    whole["messages"][3]["weight"] = 0
    assert [len(sample["messages"]) for sample in each_answer_last(whole)] == [6]
    whole["messages"][5]["train"] = False
    assert each_answer_last(whole) == [whole]
    assert each_answer_last({"source": "a", "row": 1, "dropped": ("malformed row", "")}) == [
        {"source": "a", "row": 1, "dropped": ("malformed row", "")}
    ]


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
