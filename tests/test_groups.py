"""What items of a data set share is known from their columns, and a batch that is planned by it is never larger."""

import time

import datasets
import numpy as np
import pytest
from PIL import Image

from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset, MixedDataset
from processing.batching.encoding import Encoder, encode_caption, encode_dialogue
from processing.batching.groups import ImageTokens, grouped
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from tests import tiny


@pytest.fixture(scope="module", params=[1, 4])
def processor(request):
    """Twelve positions a view, not tiled and tiled."""
    return tiny.processor_of("byte-level", "chatml", image_seq_length=12, max_tiles=request.param)


@pytest.fixture
def policy(tmp_path):
    for number, size in enumerate([(40, 28), (100, 20), (64, 64)]):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{number}.png")
    return ImagePolicy(str(tmp_path))


def said(*words):
    return [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]


def dialogues():
    """Many rows of three images, some of two at once, and texts; one that is dropped."""
    rows = []
    for number in range(24):
        shown = [[number % 3], [number % 3, 1], [], [2]][number % 4]
        words = ["what is it?", "a cat", "how many?", "two", "and?", "no"][: 2 * (1 + number % 3)]
        if number == 7:
            words = words[:1]
        words[0] += " really" * (number % 5)
        rows.append({"images": [f"{n}.png" for n in shown], "messages": said(*words)})
    return datasets.Dataset.from_list(rows)


def captioned(stored=False):
    rows = [{"image": f"{n % 3}.png", "caption": [f"a cat {n}", "two", "the sun"][: 1 + n % 3]} for n in range(9)]
    return datasets.Dataset.from_list(rows)


def run_of(processor, dataset, items):
    """Positions that the collator runs for items."""
    collate = VLMDataCollator(processor, padding_free=True, share_prefix=True, account=True)
    batch = collate([dataset[int(item)] for item in items])
    return batch["account"].positions, len(batch.get("image_grids", batch.get("pixel_values", ())))


def planned(found, chosen):
    """Positions and images of consecutive places in `found`."""
    shared, images = found.shared[chosen].copy(), found.new_images[chosen].copy()
    shared[0], images[0] = 0, found.images[chosen][0]
    return int(found.lengths[chosen].sum() - shared.sum()), int(images.sum())


def check_all(processor, dataset, is_exact):
    found = dataset.in_groups()
    assert sorted(found.order) == list(range(len(dataset)))
    assert found.groups.tolist() == dataset.groups[found.order].tolist()
    assert found.lengths.tolist() == np.array(dataset.lengths)[found.order].tolist()
    begins = np.flatnonzero(np.append(True, found.groups[1:] != found.groups[:-1]))
    assert len(begins) == len(set(found.groups.tolist()))  # those of a group are beside each other
    assert not found.shared[begins].any()
    for first in range(len(dataset)):
        for end in range(first + 1, min(first + 9, len(dataset)) + 1):
            positions, images = planned(found, slice(first, end))
            run, shown = run_of(processor, dataset, found.order[first:end])
            assert run <= positions and shown <= images
            if is_exact:
                assert run == positions


@pytest.mark.parametrize("split", ["none", "history"])
def test_a_batch_of_dialogues_is_never_larger_than_planned(processor, policy, split):
    dataset = ConversationDataset(dialogues(), Reading("rows", images=policy, split_turns=split))
    dataset.encode_ahead(Encoder(processor))
    check_all(processor, dataset, is_exact=False)
    assert dataset.in_groups().shared.any()


@pytest.mark.parametrize("encode, prompt", [(encode_caption, ""), (encode_dialogue, "Describe it.")])
def test_a_batch_of_captions_is_as_large_as_planned(processor, policy, encode, prompt):
    dataset = ConversationDataset(captioned(), Reading("rows", prompt, images=policy))
    of_rows = [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7, 8, 8, 8]
    assert dataset.groups.tolist() == of_rows  # as long as no more is known
    dataset.encode_ahead(Encoder(processor, encode))
    assert dataset.groups.tolist() == [0, 1, 1, 2, 2, 2] * 3  # images
    check_all(processor, dataset, is_exact=True)


def test_the_turns_of_a_dialogue_are_as_large_as_planned(processor, policy):
    row = {"images": ["0.png"], "messages": said(*["what is it?", "a cat", "how many?", "two", "and?", "no"] * 4)}
    reading = Reading("rows", images=policy, split_turns="history")
    dataset = ConversationDataset(datasets.Dataset.from_list([row]), reading)
    dataset.encode_ahead(Encoder(processor))
    assert len(dataset) == 12
    check_all(processor, dataset, is_exact=True)


def test_images_stored_in_their_rows_are_those_of_their_rows(processor, tmp_path, policy):
    rows = [
        {"image": {"path": None, "bytes": (tmp_path / "0.png").read_bytes()}, "caption": ["a", "b"]},
        {"image": {"path": str(tmp_path / "1.png"), "bytes": None}, "caption": ["c", "d"]},
        {"image": {"path": None, "bytes": (tmp_path / "0.png").read_bytes()}, "caption": ["e"]},
        {"image": {"path": str(tmp_path / "1.png"), "bytes": None}, "caption": ["f"]},
    ]
    rows = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    dataset = ConversationDataset(rows, Reading("rows", images=policy))
    dataset.encode_ahead(Encoder(processor, encode_caption))
    assert dataset.groups.tolist() == [0, 0, 1, 1, 2, 1]
    check_all(processor, dataset, is_exact=False)  # where the bytes of two rows are the same, it takes less


def test_of_captions_that_are_drawn_the_longest_is_planned(processor, policy):
    dataset = ConversationDataset(captioned(), Reading("rows", images=policy, caption_choice="random"))
    assert dataset.groups.tolist() == list(range(9))
    dataset.encode_ahead(Encoder(processor, encode_caption))
    assert dataset.groups.tolist() == [0, 1, 2] * 3
    found = dataset.in_groups()
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for first in range(9):
            assert run_of(processor, dataset, found.order[first:])[0] <= planned(found, slice(first, 9))[0]


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_a_mix_is_planned_anew_for_each_epoch(processor, policy, weights):
    parts = [
        ConversationDataset(captioned().select(range(3)), Reading("a", "Describe it.", images=policy)),
        ConversationDataset(dialogues(), Reading("b", images=policy)),
    ]
    mix = MixedDataset(parts, weights)
    unknown = mix.groups
    for part in parts:
        part.encode_ahead(Encoder(processor))
    mix = MixedDataset(parts, weights)
    assert len(set(mix.groups.tolist())) <= len(set(unknown.tolist()))
    seen = []
    for epoch in range(2):
        mix.set_epoch(epoch)
        check_all(processor, mix, is_exact=False)
        seen.append(mix.in_groups().order.tolist())
        sources = [mix[int(item)]["source"] for item in mix.in_groups().order]
        assert sources == sorted(sources)  # no group goes over two sources
    assert weights is None or seen[0] != seen[1]


def test_a_hundred_thousand_items_are_grouped_in_a_second():
    number = 100_000
    encodings = datasets.Dataset.from_dict(
        {
            "input_ids": np.tile(np.array([[99, 5, 6, 7]]), (number, 1)),
            "labels": np.tile(np.array([[-100, 5, 6, 7]]), (number, 1)),
            "length": np.full(number, 199),
            "position": np.arange(number) // 5,
            "references": [[f"{n // 10}.jpg"] for n in range(number)],
        }
    )
    begun = time.process_time()
    found = grouped(encodings, ImageTokens(99, 196, False))
    assert time.process_time() - begun < 5  # 0.2 s, of which a machine that does other things makes more
    assert len(np.unique(found.groups)) == number // 10
    assert found.shared.reshape(-1, 10).tolist() == [[0] + [195] * 9] * (number // 10)
