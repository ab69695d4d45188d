"""Whether texts share prefixes follows from the images that a step really holds, of data ahead and of streams."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset, MixedDataset, StreamedDataset
from processing.batching.encoding import Encoder, encode_caption
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from tests import tiny
from training_vlm.efficiency import EfficiencyArguments
from training_vlm.learning.savings import choose_savings, plan_batches
from training_vlm.survey import _survey, some_items


ENCODER = Encoder(tiny.processor_of("byte-level", image_seq_length=40), encode_caption)
READING = Reading("captions", images=ImagePolicy(own_paths=True))


def rows_of(images, captions, source="captions"):
    words = "a cat two mats the sun it is red".split()
    return [
        {"image": f"{source}-{n}.png", "caption": [f"{words[c]} {n}" for c in range(captions)]} for n in range(images)
    ]


def ahead(rows, reading=READING):
    dataset = ConversationDataset(datasets.Dataset.from_list(rows), reading)
    dataset.encode_ahead(ENCODER)
    return dataset


def streamed(rows, shards=1):
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards), READING


def run_of(dataset, batch=8, accumulation=1, processes=1):
    """What is asked of a Trainer."""
    args = SimpleNamespace(
        train_sampling_strategy="random", per_device_train_batch_size=batch, torch_compile=False, world_size=processes,
        gradient_accumulation_steps=accumulation, seed=0, data_seed=None, num_train_epochs=1, max_steps=-1,
    )  # fmt: skip
    collator = VLMDataCollator(ENCODER)
    return SimpleNamespace(args=args, train_dataset=dataset, data_collator=collator, model=torch.nn.Identity())


def chosen(dataset, asked=None, **settings):
    return choose_savings(EfficiencyArguments(**(asked or {})), run_of(dataset, **settings), lambda *_: None)


def images_of_batches(dataset, tokens, images=None):
    """The mean number of images of a batch that is planned with shared prefixes."""
    trainer = run_of(dataset)
    trainer.data_collator.padding_free = trainer.data_collator.share_prefix = True
    planned = plan_batches(EfficiencyArguments(max_tokens_per_batch=tokens, max_images_per_batch=images), trainer)
    batches = [planned[index] for index in range(len(planned))]
    return np.mean([len({item["row"] for item in batch}) for batch in batches])


@pytest.mark.parametrize("make", [ahead, lambda rows: StreamedDataset([streamed(rows)])], ids=["ahead", "stream"])
@pytest.mark.parametrize("tokens", [400, 700, 1500])
def test_a_budget_s_step_is_counted_with_prefixes_shared(make, tokens):
    """Five captions of 45 positions take about 65 in one row, and not 225."""
    rows = rows_of(100, 5)
    found, images = chosen(make(rows), {"max_tokens_per_batch": tokens}), images_of_batches(ahead(rows), tokens)
    assert found.share_prefix == (images >= 8)
    if not found.share_prefix:
        said = float(found.why.split("would hold ")[1].split()[0])
        assert said == pytest.approx(images, rel=0.25)


@pytest.mark.parametrize("make", [ahead, lambda rows: StreamedDataset([streamed(rows)])], ids=["ahead", "stream"])
def test_a_limit_of_images_limits_those_of_a_step(make):
    data, asked = make(rows_of(60, 5)), {"max_tokens_per_batch": 100_000, "max_images_per_batch": 3}
    assert "a step would hold 3.0 images" in chosen(data, asked).why
    assert "a step would hold 6.0 images" in chosen(data, asked, accumulation=2).why
    assert chosen(data, asked, accumulation=3).share_prefix and chosen(data, asked, processes=3).share_prefix


@pytest.mark.parametrize("settings", [{"batch": 64}, {"batch": 8, "accumulation": 9}, {"batch": 8, "processes": 9}])
def test_a_step_holds_no_more_images_than_the_data_have(settings):
    assert "a step would hold 6.0 images" in chosen(ahead(rows_of(6, 5)), **settings).why
    assert chosen(ahead(rows_of(8, 5)), **settings).share_prefix
    assert chosen(StreamedDataset([streamed(rows_of(6, 5))]), **settings).share_prefix  # which has no end


def test_a_stream_s_batch_holds_no_more_than_its_buffer():
    rows, asked = rows_of(300, 5), {"max_tokens_per_batch": 100_000}
    small, large = (StreamedDataset([streamed(rows)], shuffle_buffer=size) for size in (20, 1000))
    assert "a step would hold 4.0 images" in chosen(small, asked).why
    assert chosen(large, asked).share_prefix


@pytest.mark.parametrize("asked", [{}, {"max_tokens_per_batch": 100_000}], ids=["conversations", "positions"])
def test_a_stream_that_is_short_is_counted_once(asked):
    """However often a run reads it, an image with one text has one."""
    one, five = (StreamedDataset([streamed(rows_of(30, captions))]) for captions in (1, 5))
    assert chosen(one, asked, batch=256).why == "prefixes are not shared: each image has one text"
    assert chosen(five, asked, batch=256).share_prefix
    assert "with 5.0 texts an image" in chosen(five, {"max_tokens_per_batch": 200}).why
    assert "with 5.0 texts an image a step would hold 1.6 images" in chosen(five).why


def test_a_step_of_few_images_that_shares_unasked_says_what_that_costs():
    data = ahead(rows_of(60, 5))
    assert "a step holds 12.0 images, and below 32 it teaches less" in chosen(data, batch=60).why
    assert chosen(data, batch=160) == (True, True, "", False)  # 32 images
    assert chosen(data, {"share_prefix": "on"}, batch=60).why == ""  # whoever asks knows


def test_a_mix_of_streams_is_counted_in_its_shares():
    parts = [streamed(rows_of(40, 1, "a")), streamed(rows_of(10, 5, "b"))]
    found = chosen(StreamedDataset(parts, weights=[1.0, 3.0]), batch=16)
    assert "with 2.5 texts an image a step would hold 6.4 images" in found.why  # 16 x (0.25 / 1 + 0.75 / 5)


def test_a_text_that_a_mix_shows_again_is_not_another_text_of_its_image():
    small, large = ahead(rows_of(10, 1, "a")), ahead(rows_of(50, 1, "b"))
    mix = MixedDataset([small, large], weights=[1.0, 1.0])
    assert chosen(mix, batch=256).why == "prefixes are not shared: each image has one text"
    groups, rows = mix.groups, [mix[index]["row"] for index in range(30)]
    assert len(set(groups.tolist())) == 60 and max(rows.count(row) for row in rows) == 3


# What is surveyed of a stream.


def test_what_is_surveyed_of_a_short_stream_is_every_sample_once():
    rows = [*rows_of(20, 2), {"image": "x.png", "caption": None}]
    stream = StreamedDataset([streamed(rows)])
    account, sampled, _ = _survey(stream, ENCODER)
    assert account.total["samples"] == 41 and account.total["learned from"] == 40 and not sampled
    assert account.total["dropped: malformed row"] == 1 and len(list(some_items(stream, 1000))) == 41


def test_what_is_surveyed_of_a_long_stream_or_a_mix_with_one_is_said_to_be_a_sample():
    long, short = (StreamedDataset([streamed(rows_of(number, 1))]) for number in (1500, 1000))
    assert _survey(long, ENCODER).sampled and _survey(long, ENCODER).account.total["samples"] == 1000
    assert not _survey(short, ENCODER).sampled
    mix = StreamedDataset([streamed(rows_of(1500, 1)), streamed(rows_of(7, 1, "b"))])
    account, sampled, _ = _survey(mix, ENCODER)
    assert sampled and account.total["samples"] == 507
    items = [{"images": [Image.new("RGB", (8, 8))], **item} for item in some_items(short, 5)]
    assert not _survey(items, ENCODER).sampled  # such as what is held out of a stream
