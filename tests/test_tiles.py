"""Tiled images: one number of positions everywhere, the right pixels at them, whatever else is in the batch."""

import copy
import json
import random
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers.image_processing_utils import select_best_resolution

import train_pretrain
import train_sft
from evaluation_vlm.questions import Question, find_questions
from inference_vlm.answering import answer, greedy
from processing import VLMDataCollator, VLMProcessor
from processing.batching.account import Account
from processing.batching.dataset import ConversationDataset, Reading, StreamedDataset
from processing.batching.encoding import IGNORE, TRUNCATIONS, Encoder, encode_caption, encode_dialogue
from processing.image_files_vlm import ImagePolicy, image_size, load_image
from processing.images_vlm import IMAGE_MODES, choose_grid
from processing.reading.sources import open_source
from tests import tiny
from tests.isolated import run_without_package
from tests.test_labels import KNOWS_NO_SYSTEM, Bare, expected, trained
from tests.test_remote_code import CHILD
from training_vlm.data import encode_data, load_data
from training_vlm.inspect_data import __main__ as inspect_data
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.load import check_fit
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT
from training_vlm.survey import survey_data
from training_vlm.training_arguments import VLMTrainingArguments


EXIF_ORIENTATION = 0x0112
SIZES = [(1, 1), (20_000, 1), (1, 20_000), (32, 32), (31, 20), (33, 32), (64, 64), (40, 130), (130, 40), (500, 400)]
"""Height and width: lines, as large as a view, smaller, larger by a pixel, landscape, portrait."""

sizes = st.one_of(st.sampled_from(SIZES), st.tuples(st.integers(1, 200), st.integers(1, 200)))
shared = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def llava_next(size, view, most):
    """LLaVA-NeXT's rule: of the grids that show most pixels the one that wastes fewest, written down once more."""

    def merit(grid):
        height, width = grid[0] * view[0], grid[1] * view[1]
        scale = min(height / size[0], width / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return effective, -(height * width - effective)

    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1) if rows * columns <= most]
    return max(grids, key=merit)


def positions(size, most, view=(32, 32), per_view=3):
    """How many an image takes: the whole and a newline, and each row of tiles and a newline."""
    if most == 1:
        return per_view
    rows, columns = llava_next(size, view, most)
    return per_view + 1 + (rows * (columns * per_view + 1) if (rows, columns) != (1, 1) else 0)


def noise(size, seed=0):
    """A picture of a height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def one_line(caught):
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


# -- the grid ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, **shared)
@given(size=sizes, view=st.sampled_from([(32, 32), (24, 40), (224, 224)]), most=st.integers(1, 9))
def test_the_grid_is_the_one_that_llava_next_would_choose(size, view, most):
    grid = choose_grid(size, view, most)
    assert grid == llava_next(size, view, most)
    assert 1 <= grid[0] * grid[1] <= most
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    resolutions = [(rows * view[0], columns * view[1]) for rows, columns in grids]
    if min(size) > 1:  # of a line that vanishes in every grid the library finds none
        assert select_best_resolution(size, resolutions) == (grid[0] * view[0], grid[1] * view[1])


@settings(max_examples=200, **shared)
@given(size=sizes, most=st.integers(1, 9))
def test_wide_images_get_more_columns_tall_ones_more_rows_and_small_ones_no_tiles(size, most):
    rows, columns = choose_grid(size, (32, 32), most)
    if size[0] < size[1]:
        assert rows <= columns
    if size[0] > size[1]:
        assert rows >= columns
    if max(size) <= 32:
        assert (rows, columns) == (1, 1)
    assert choose_grid(size[::-1], (32, 32), most) == (columns, rows) or size[0] == size[1]


def test_some_grids_as_anyone_would_choose_them():
    chosen = {(100, 100): (1, 1), (200, 200): (2, 2), (100, 400): (1, 4), (600, 100): (6, 1), (150, 310): (2, 3)}
    assert {size: choose_grid(size, (100, 100), 6) for size in chosen} == chosen


# -- the number of positions, everywhere ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting(folders):
    """`counting(max_tiles)` is a model of three positions a view, and its processor."""
    made = {}

    def get(max_tiles):
        if max_tiles not in made:
            made[max_tiles] = tiny.compose(
                folders("vit-gpt2")[0], folders("siglip-llama")[1], projector_type="resampler",
                projector_settings={"num_queries": 3, "depth": 1}, max_tiles=max_tiles,
            )  # fmt: skip
        return made[max_tiles]

    return get


def check_positions(model, processor, size, seed, lying, folder):
    """One image, and every place where its positions are counted."""
    most, image_id = processor.max_tiles, processor.image_token_id
    count, grid = positions(size, most), llava_next(size, (32, 32), most)
    views = 1 + (grid[0] * grid[1] if grid != (1, 1) else 0)
    file, exif = folder / "image.png", Image.Exif()
    if lying:
        exif[EXIF_ORIENTATION] = 6
        noise(size, seed).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    else:
        noise(size, seed).save(file)
    image = load_image(str(file))
    assert (image.height, image.width) == size == image_size(str(file)) == image_size({"bytes": file.read_bytes()})

    assert model.config.tile_tokens(*grid) == processor.image_tokens(*size) == count
    known = processor._get_num_multimodal_tokens([size, (10_000, 10_000)])
    assert known.num_image_tokens == [count, positions((10_000, 10_000), most)]
    assert known.num_image_patches[0] == views
    inputs = processor(images=image, text="what <image>?", return_tensors="pt")
    question = [{"type": "image", "image": str(file)}, {"type": "text", "text": "what?"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    sample = tiny.dialogue("what?", "a", str(file))
    batch = tiny.collate(processor, [sample])
    for made in (inputs, asked, batch):
        assert made["input_ids"].eq(image_id).sum() == count and len(made["pixel_values"]) == views
        assert torch.equal(made["pixel_values"], inputs["pixel_values"])
        assert made["image_grids"].tolist() == [[*grid]] if most > 1 else "image_grids" not in made
    encoding = encode_dialogue(processor, sample)
    assert encoding["length"] == batch["input_ids"].shape[1]
    grids = {"image_grids": inputs["image_grids"]} if most > 1 else {}
    with torch.no_grad():
        (features,) = model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        assert features.shape == (count, model.get_input_embeddings().embedding_dim)
        assert model(**batch).logits.shape[1] == encoding["length"]
        assert model.generate(**asked, do_sample=False, max_new_tokens=1).shape[1] == asked["input_ids"].shape[1] + 1


each_example = {
    "size": sizes, "seed": st.integers(0, 9), "lying": st.booleans(), "most": st.integers(1, 9),
    "mode": st.sampled_from([None, *IMAGE_MODES]),
}  # fmt: skip


@settings(max_examples=25, **shared)
@example(size=(20_000, 1), seed=0, lying=False, most=9, mode="pad")
@example(size=(1, 20_000), seed=0, lying=True, most=9, mode="crop")
@example(size=(130, 40), seed=0, lying=True, most=4, mode=None)
@example(size=(1, 1), seed=0, lying=True, most=1, mode="resize")
@given(**each_example)
def test_an_image_takes_as_many_positions_wherever_they_are_counted(counting, tmp_path, size, seed, lying, most, mode):
    model, processor = counting(most)
    processor.image_mode = mode
    check_positions(model, processor, size, seed, lying, tmp_path)


@pytest.mark.slow
@settings(max_examples=1500, **shared)
@given(**each_example)
def test_any_image_takes_as_many_positions_wherever_they_are_counted(counting, tmp_path, size, seed, lying, most, mode):
    model, processor = counting(most)
    processor.image_mode = mode
    check_positions(model, processor, size, seed, lying, tmp_path)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_the_size_is_that_of_the_upright_image_wherever_a_file_says_how_it_lies(tmp_path):
    """A PNG may say it behind its pixels, and none is decoded to find out."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 8
    for suffix in ("jpg", "png", "webp", "tiff"):
        noise((20, 70)).save(tmp_path / f"lying.{suffix}", exif=exif)
    noise((20, 70)).save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    end = plain.rindex(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(plain[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:])
    for file in sorted(tmp_path.iterdir()):
        whole = load_image(str(file))
        assert image_size(str(file)) == (whole.height, whole.width) == ((20, 70) if file.stem == "plain" else (70, 20))
    opened = Image.open(tmp_path / "late.png")
    assert image_size(opened) == (70, 20) and load_image(opened).size == (20, 70)
    assert image_size(load_image(opened)) == (70, 20)


# -- ids and labels ---------------------------------------------------------------------------------------------------

LABELLED = [
    ("byte-level", "chatml"), ("unigram-always", "llama3"), ("unigram-first", "vicuna"), ("wordpiece", "default"),
    ("byte-level", "gemma"), ("unigram-always", "parts"),
]  # fmt: skip
each_template = pytest.mark.parametrize("kind, template", LABELLED, ids=[f"{k}-{t}" for k, t in LABELLED])
OF_IMAGES = [(20, 30), (70, 64), (40, 130), (90, 30)]


def tiled(kind, template, max_tiles=4):
    return tiny.processor_of(copy.deepcopy(trained(kind)), template, max_tiles=max_tiles), Bare(kind)


def interleaved(number, system=False, turns=2, seed=0):
    """A dialogue with that many images of different sizes, between, before and behind the words."""
    words = random.Random(seed)

    def text():
        return {"type": "text", "text": words.choice(["a red circle", "what is it?", "how many", "blue. "])}

    messages = [{"role": "system", "content": [text()]}] if system else []
    for turn in range(turns):
        here = [{"type": "image"} for _ in range(turn, number, turns)]
        content = [text(), *here] if turn % 2 else [*here[:1], text(), *here[1:], text()]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [text()]}]
    images = [noise(OF_IMAGES[(seed + place) % len(OF_IMAGES)], place) for place in range(number)]
    return {"messages": messages, "images": images}


def oracle(processor, bare, template, messages, images):
    """Ids and labels, piece by piece, each image as many image tokens as it takes positions."""
    counts = iter(positions((image.height, image.width), processor.max_tiles) for image in images)
    ids, labels = [], []
    for id, learned in zip(*expected(processor, bare, template, messages)):
        times = next(counts) if id == processor.image_token_id else 1
        ids += [id] * times
        labels += [id if learned else IGNORE] * times
    assert next(counts, None) is None
    return ids, labels


@each_template
def test_ids_and_labels_are_those_of_the_pieces_with_each_image_as_long_as_it_is(kind, template):
    processor, bare = tiled(kind, template)
    samples = [interleaved(number, template not in KNOWS_NO_SYSTEM, seed=number) for number in (3, 0, 1, 2, 0)]
    for rows in (samples, samples[1::3], samples[:1]):  # with rows without images, of nothing else, and alone
        batch = VLMDataCollator(processor)(rows)
        images = [image for row in rows for image in row["images"]]
        of_images = ["pixel_values", "image_grids"] if images else []
        assert set(batch) == {"input_ids", "attention_mask", "labels", "shift_labels", *of_images}
        for row, sample in enumerate(rows):
            ids, labels = oracle(processor, bare, template, **sample)
            rest = batch["input_ids"].shape[1] - len(ids)
            assert batch["input_ids"][row].tolist() == ids + [processor.tokenizer.pad_token_id] * rest
            assert batch["labels"][row].tolist() == labels + [IGNORE] * rest
            assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * rest
        if images:
            alone = [processor.process_images([image]) for image in images]
            assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
            assert torch.equal(batch["image_grids"], torch.cat([one["image_grids"] for one in alone]))


def kept_of(truncation, processor, bare, template, sample, max_length):
    """What of a sample is to be left at a length: ids and labels, or `None` where nothing can be learned from it."""
    messages, images = sample["messages"], sample["images"]
    ids, labels = oracle(processor, bare, template, messages, images)
    if truncation == "keep_last_turns":
        while len(ids) > max_length and sum(message["role"] == "user" for message in messages) > 1:
            first = next(index for index, message in enumerate(messages) if message["role"] == "user")
            moved = [part for part in messages[first]["content"] if part["type"] == "image"]
            question = {**messages[first + 2], "content": [*moved, *messages[first + 2]["content"]]}
            messages = [*messages[:first], question, *messages[first + 3 :]]
            ids, labels = oracle(processor, bare, template, messages, images)
    if len(ids) > max_length:
        lost = processor.image_token_id in ids[max_length:]
        if truncation != "truncate_text" or lost or not any(label != IGNORE for label in labels[1:max_length]):
            return None
        ids, labels = ids[:max_length], labels[:max_length]
    return ids, labels


@each_template
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_every_max_length_gives_an_intact_sample_or_a_counted_drop(kind, template, truncation):
    processor, bare = tiled(kind, template)
    for number in (0, 1, 3):
        sample = interleaved(number, seed=1)
        views = len(processor.process_images(sample["images"])["pixel_values"]) if number else 0
        full = len(oracle(processor, bare, template, **sample)[0])
        outcomes = set()
        for max_length in range(1, full + 2):

            def encode(*given):
                return encode_dialogue(*given, truncation=truncation)

            collator = VLMDataCollator(processor, max_length, encode, account=True)
            batch = collator([sample])
            kept = kept_of(truncation, processor, bare, template, sample, max_length)
            (record,) = batch.pop("account").records
            outcomes.add(kept is not None)
            if kept is None:
                assert sum(collator.dropped.values()) == 1 and record.dropped in collator.dropped
                assert "pixel_values" not in batch and batch["labels"].tolist() == [[IGNORE]]
                continue
            assert collator.dropped == {} and (record.cut is not None) == (max_length < full)
            assert (batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) == kept
            assert len(batch.get("pixel_values", ())) == views
            of_images = kept[0].count(processor.image_token_id)
            assert of_images == sum(positions((i.height, i.width), 4) for i in sample["images"]) == record.image_tokens
            assert record.tokens == len(kept[0]) <= max_length
        assert outcomes == {True, False}


def test_stage_1_is_the_image_the_caption_and_the_end():
    processor, bare = tiled("unigram-always", "chatml")
    for size in OF_IMAGES:
        sample = tiny.dialogue("", "a red circle", noise(size))
        del sample["messages"][0]["content"][1]
        batch = VLMDataCollator(processor, encode=encode_caption)([sample])
        caption = [*bare.ids("a red circle", "control"), processor.tokenizer.eos_token_id]
        count = positions(size, 4)
        assert batch["input_ids"][0].tolist() == [1, *[processor.image_token_id] * count, *caption]
        assert batch["labels"][0].tolist() == [IGNORE] * (1 + count) + caption


# -- pixels and features ----------------------------------------------------------------------------------------------

QUARTERS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


@pytest.mark.parametrize("kind", tiny.IMAGE_PROCESSORS)
@pytest.mark.parametrize("view", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("mode", [None, *IMAGE_MODES])
def test_tiles_are_the_quarters_of_the_image_in_reading_order(kind, view, mode, tmp_path):
    processor = tiny.processor_seeing(kind, tmp_path, view, 4, mode)
    small = Image.new("RGB", (2, 2))
    small.putdata(QUARTERS)
    features = processor.process_images([small.resize((2 * view[1], 2 * view[0]), Image.Resampling.NEAREST)])
    assert features["image_grids"].tolist() == [[2, 2]] and len(features["pixel_values"]) == 5
    own = processor.image_processor
    shown = features["pixel_values"].permute(0, 2, 3, 1) * torch.tensor(own.image_std) + torch.tensor(own.image_mean)
    shown = shown.mul(255).round()
    for tile, colour in zip(shown[1:], QUARTERS, strict=True):
        assert (tile == torch.tensor(colour)).all()
    for place, colour in zip([(2, 2), (2, -3), (-3, 2), (-3, -3)], QUARTERS):
        assert (shown[0][place] - torch.tensor(colour)).abs().max() < 60  # the whole has all four


def test_padded_tiles_together_are_the_image_in_the_middle_of_the_mean_colour(tmp_path):
    processor = tiny.processor_seeing("siglip", tmp_path, (32, 32), 6, "pad")
    image = noise((64, 80))  # on two rows of three, 8 columns left on both sides
    features = processor.process_images([image])
    assert features["image_grids"].tolist() == [[2, 3]]
    tiles = features["pixel_values"][1:].unflatten(0, (2, 3))  # rows, columns, channels, height, width
    canvas = tiles.permute(2, 0, 3, 1, 4).reshape(3, 64, 96).mul(0.5).add(0.5).mul(255).round()
    assert torch.equal(canvas[:, :, 8:88].permute(1, 2, 0).byte(), torch.from_numpy(np.array(image)))
    assert (canvas[:, :, :8] == 128).all() and (canvas[:, :, 88:] == 128).all()


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_the_view_of_the_whole_is_what_an_untiled_image_would_be(mode, tmp_path):
    images = [noise(size) for size in SIZES]
    untiled = tiny.processor_seeing("clip", tmp_path, image_mode=mode).process_images(images)
    assert "image_grids" not in untiled
    tiled = tiny.processor_seeing("clip", tmp_path, max_tiles=6, image_mode=mode)
    features = tiled.process_images(images)
    counts = [1 + (rows * columns if rows * columns > 1 else 0) for rows, columns in features["image_grids"].tolist()]
    starts = np.cumsum([0, *counts[:-1]])
    assert len(set(counts)) > 2 and torch.equal(features["pixel_values"][starts], untiled["pixel_values"])


@pytest.fixture
def tiling(pair, folders):
    """A composed model whose images have up to four tiles, and its processor."""
    return tiny.compose(*folders(pair), tiny.PAIRS[pair][2], max_tiles=4)


def test_features_are_those_of_each_view_alone_joined_by_newlines(tiling):
    model, processor = tiling
    images = [noise(size, seed) for seed, size in enumerate([(20, 20), (64, 64), (30, 90), (90, 30), (70, 60)])]
    features = processor.process_images(images)
    views, newline = iter(features["pixel_values"].split(1)), model.model.image_newline[None]
    grids = [llava_next((image.height, image.width), (32, 32), 4) for image in images]
    assert features["image_grids"].tolist() == [[*grid] for grid in grids] and len(set(grids)) == 4

    def encoded():
        states = model.model.vision_tower(next(views)).last_hidden_state
        keep = {"cls": slice(0, 1), "patch": slice(model.config.num_prefix_tokens, None)}
        return model.model.multi_modal_projector(states[:, keep[model.config.vision_feature_select_strategy]])[0]

    with torch.no_grad():
        items = model.get_image_features(**features).pooler_output
        assert len(items) == len(images)
        for item, (rows, columns) in zip(items, grids):
            expected = [encoded(), newline]
            for _ in range(rows if rows * columns > 1 else 0):
                expected += [*(encoded() for _ in range(columns)), newline]
            assert torch.allclose(item, torch.cat(expected), atol=1e-5)
    assert next(views, None) is None


# -- the loss ---------------------------------------------------------------------------------------------------------


def ragged():
    """Seven dialogues with no to three images of different sizes."""
    return [interleaved(number, turns=1 + number % 2, seed=seed) for seed, number in enumerate((1, 2, 0, 3, 1, 0, 2))]


def gradients(model, batches, count):
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for batch in batches:
        part = model(**batch, num_items_in_batch=torch.tensor(count)).loss
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_of_ragged_tiles_have_the_loss_and_gradients_of_one_batch(tiling):
    model, processor = tiling
    apply_tuning(model, "full", "full")
    samples = ragged() if model.model.max_positions is None else ragged()[:3]
    whole = tiny.collate(processor, samples)
    count = whole["labels"][:, 1:].ne(IGNORE).sum().item()
    loss, expected = gradients(model, [whole], count)
    assert expected["model.image_newline"].abs().max() > 1e-6
    for size in (1, 2):
        parts = [tiny.collate(processor, samples[begin : begin + size]) for begin in range(0, len(samples), size)]
        found, grads = gradients(model, parts, count)
        assert abs(found - loss) <= 1e-5 * loss and grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], atol=1e-5, rtol=1e-4), name


def test_texts_alone_give_all_that_an_image_would_reach_a_gradient_of_zero(tiling):
    model, processor = tiling
    apply_tuning(model, "full", "full")
    model.train()
    batch = tiny.collate(processor, [interleaved(0), interleaved(0, seed=3)])
    assert "image_grids" not in batch
    model(**batch).loss.backward()
    of_images = [model.model.image_newline, *model.model.vision_tower.parameters()]
    of_images += model.model.multi_modal_projector.parameters()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in of_images)
    loss = model.eval()(**batch).loss
    model.model.image_newline = None
    assert model(**batch).loss == loss


@pytest.mark.parametrize("tune", ["frozen", "full"])
def test_the_newline_learns_with_the_projector(tiling, tune):
    model, processor = tiling
    apply_tuning(model, tune, tune)
    model.train()
    model(**tiny.collate(processor, ragged()[:1])).loss.backward()
    assert model.model.image_newline.grad.any()


# -- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return tiny.processor_of("byte-level", "chatml", max_tiles=4)


def rows_of(folder, stored):
    """Rows of no to two images, as paths, as PIL images or as the bytes that a parquet file holds."""
    rows = []
    for number in range(9):
        files = []
        for place in range(number % 3):
            file = folder / f"{number}-{place}.{'jpg' if number % 2 else 'png'}"
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = 6 if number % 4 == 0 else 1
            noise(OF_IMAGES[(number + place) % 4], number).save(file, exif=exif)
            files.append(file)
        turns = [("user", "what?"), ("assistant", "a red circle " * (1 + number % 4))]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows.append({"images": [str(file) for file in files], "messages": messages})
    if stored == "paths":
        return datasets.Dataset.from_list(rows)
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(images=datasets.List(datasets.Image()), messages=datasets.List(message))
    for row in rows:
        files = map(Path, row["images"])
        row["images"] = [
            Image.open(file) if stored == "images" else {"bytes": file.read_bytes(), "path": None} for file in files
        ]
    datasets.Dataset.from_list(rows, features).to_parquet(folder / "rows.parquet")
    held = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))
    return held.cast_column("images", datasets.List(datasets.Image(decode=False)))


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(
        torch.equal(found[name], expected[name]) if name != "account" else found[name] == expected[name]
        for name in found
    )


@pytest.mark.parametrize("stored", ["paths", "bytes", "images"])
@pytest.mark.parametrize("max_length", [None, 40])
def test_encoded_ahead_on_the_fly_or_streamed_is_the_same(processor, tmp_path, stored, max_length):
    rows, reading = rows_of(tmp_path, stored), Reading(source="s", images=ImagePolicy(str(tmp_path)))
    later, ahead = ConversationDataset(rows, reading), ConversationDataset(rows, reading)
    ahead.encode_ahead(Encoder(processor, max_length=max_length))
    collate = VLMDataCollator(processor, max_length, account=True)
    batch = collate([later[index] for index in range(9)])
    account = Account()
    account.add_batch(batch["account"])
    assert account.total == ahead.account.total and account.named == ahead.account.named
    assert account.total["image_tokens"] == batch["input_ids"].eq(processor.image_token_id).sum()
    assert account.total["tokens"] == batch["attention_mask"].sum()
    assert (len(ahead) < 9) == (max_length is not None)
    assert ahead.lengths == batch["attention_mask"].sum(1).tolist()
    encoded = collate([ahead[index] for index in range(len(ahead))])
    encoded.pop("account"), batch.pop("account")
    assert same(encoded, batch)
    stream = StreamedDataset([(rows.to_iterable_dataset(), reading)], shuffle_buffer=1)
    streamed = VLMDataCollator(processor, max_length)([item for _, item in zip(range(9), stream)])
    assert same(streamed, batch)


def test_images_that_are_drawn_are_tiled_too(processor):
    rows = open_source("shapes", name="dialogues", split="validation").rows.select(range(5))
    later, ahead = (ConversationDataset(rows, Reading(source="shapes")) for _ in range(2))
    ahead.encode_ahead(Encoder(processor))
    collate = VLMDataCollator(processor)
    assert len(ahead) == 5 and collate([later[0]])["image_grids"].tolist() == [[2, 2]]
    assert same(collate([ahead[index] for index in range(5)]), collate([later[index] for index in range(5)]))


def test_batches_of_like_lengths_go_by_the_positions_that_samples_take(folders, tmp_path):
    model, processor = tiny.compose(*folders("siglip-llama"), max_tiles=4)
    dataset = ConversationDataset(rows_of(tmp_path, "paths"), Reading(source="s", images=ImagePolicy(str(tmp_path))))
    later = [dataset[index] for index in range(9)]
    dataset.encode_ahead(Encoder(processor))
    arguments = VLMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=9,
        train_sampling_strategy="group_by_length", dataloader_num_workers=0,
    )  # fmt: skip
    trainer = VLMTrainer(
        model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor),
        train_dataset=dataset,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 4
    assert sorted(lengths) == sorted(tiny.collate(processor, [item])["input_ids"].shape[1] for item in later)


def test_no_pixel_is_decoded_to_encode_ahead(processor, tmp_path, monkeypatch):
    for stored in ("paths", "bytes"):
        dataset = ConversationDataset(rows_of(tmp_path, stored), Reading(source="s", images=ImagePolicy(str(tmp_path))))
        with monkeypatch.context() as patched:
            for reader in {ImageFile.ImageFile, type(Image.open(tmp_path / "2-0.png"))}:
                patched.setattr(reader, "load", None)
            dataset.encode_ahead(Encoder(processor))
        assert len(dataset) == 9 and dataset.account.total["images"] == 9


def test_an_image_whose_size_cannot_be_had_is_a_counted_drop(processor, tmp_path):
    noise((70, 64)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + whole[33:]
    )
    names = ["good.png", "broken.png", "gone.png", "bomb.png", "cut.png"]
    reasons = {"unreadable image": 1, "missing image file": 1, "image too large": 1}
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}]
    rows = datasets.Dataset.from_list([{"image": name, "messages": said} for name in names])
    reading = Reading(source="s", images=ImagePolicy(str(tmp_path)))
    later, ahead = ConversationDataset(rows, reading), ConversationDataset(rows, reading)
    ahead.encode_ahead(Encoder(processor))
    assert ahead.account.report()["total"]["dropped"] == reasons
    details = [entry["detail"] for entry in ahead.account.report()["dropped samples"]]
    assert all(line.startswith("s, row ") for line in details) and "broken.png" in details[0]
    for dataset, more in ((later, reasons), (ahead, {})):  # that one is cut is only seen when it is decoded
        collator = VLMDataCollator(processor)
        assert len(collator([dataset[index] for index in range(len(dataset))])["input_ids"]) == 1
        assert collator.dropped == {**more, "unreadable image": more.get("unreadable image", 0) + 1}
    with pytest.raises(ValueError, match="s, row 1: .*broken.png") as caught:
        VLMDataCollator(processor, on_bad_sample="error")([later[1]])
    one_line(caught)
    with pytest.raises(ValueError, match="s, row 1: .*broken.png"):
        ConversationDataset(rows, reading).encode_ahead(Encoder(processor), on_bad_sample="error")


def test_an_image_that_is_a_url_is_fetched_once_and_never_ahead(processor, tmp_path, monkeypatch):
    noise((70, 64)).save(tmp_path / "a.png")
    fetched = []

    def fetch(url):
        fetched.append(url)
        return (tmp_path / "a.png").read_bytes()

    monkeypatch.setattr("processing.image_files_vlm._fetch", fetch)
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a"}]
    rows = [{"image": f"https://example.org/{number}.png", "messages": said} for number in range(4)]
    rows.append({"image": str(tmp_path / "a.png"), "messages": said})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--dataset", str(tmp_path / "rows.jsonl"), "--image_dir", str(tmp_path), "--allow_urls"]

    def encoded(*more):
        _, _, data_args, *_, training_args = parse_arguments(SFT, [*argv, "--eval_share", "0", "--use_cpu", *more])
        settings = SFT.encoder(processor, data_args, 500), data_args, training_args
        sets = encode_data(load_data(SFT, data_args, training_args), *settings)
        return sets[0], survey_data(SFT, *sets, None, *settings)

    train, surveys = encoded()
    assert fetched == [] and not train.is_encoded and surveys["training"].account.total["samples"] == 1
    batch = VLMDataCollator(processor)([train[index] for index in range(5)])
    assert sorted(fetched) == [row["image"] for row in rows[:4]]
    assert batch["image_grids"].tolist() == [[2, 2]] * 5
    for ahead in (["--encode_ahead", "True"], ["--train_sampling_strategy", "group_by_length"]):
        with pytest.raises(ValueError, match="with --max_tiles the length of a sample follows from the ") as caught:
            encoded(*ahead)
        one_line(caught)
    assert len(fetched) == 4


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lively(tiling):
    """A model whose answers differ from prompt to prompt: random weights of a larger spread."""
    model, processor = tiling
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
        model.model.image_newline.mul_(10.0)
    return model, processor


def prompts():
    """Ragged, with no to three images each."""
    asked = [
        ("what is it?", [(70, 64)]),
        ("which colour has the sun?", []),
        ("describe the pictures in many words, and say what is left of the red circle", [(20, 30), (90, 30)]),
        ("and?", [(40, 130), (70, 64), (20, 20)]),
    ]
    conversations = []
    for text, of_prompt in asked:
        content = [{"type": "image", "image": noise(size, seed)} for seed, size in enumerate(of_prompt)]
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    return conversations


def encode(processor, conversations):
    return processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def written(model, inputs, **options):
    """The new tokens of each row, cut at the first end token."""
    rows = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8, **options})
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = rows[:, start:].tolist()
    return [row[: next((place for place, id in enumerate(row) if id in ends), len(row))] for row in rows]


def embedded(model, inputs):
    """The prompt with its images in place already: no beam can get those of another."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if "pixel_values" in inputs:
            features = model.get_image_features(inputs["pixel_values"], inputs["image_grids"]).pooler_output
            embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "no cache", "beams", "two of three beams, no cache", "static cache", "prompt lookup"],
)
def test_a_batch_writes_what_each_prompt_writes_alone(lively, options):
    model, processor = lively
    asked = prompts()
    plain = {key: value for key, value in options.items() if key.startswith("num_")}
    alone = [row for one in asked for row in written(model, embedded(model, encode(processor, [one])), **plain)]
    assert len({tuple(row) for row in alone}) == len(alone) and sum(len(row) > 3 for row in alone) > 2
    if "prompt_lookup_num_tokens" in options:  # it takes one prompt at a time
        assert [written(model, encode(processor, [one]), **options)[0] for one in asked] == alone
    else:
        assert written(model, encode(processor, asked), **options) == alone


def test_embeddings_instead_of_ids_write_the_same(lively):
    model, processor = lively
    inputs = encode(processor, prompts())
    expected, beams = written(model, inputs), written(model, inputs, num_beams=3)
    assert expected != beams
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    images = {"pixel_values": inputs["pixel_values"], "image_grids": inputs["image_grids"]}
    with_pixels = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **images}
    assert written(model, with_pixels) == expected
    assert written(model, with_pixels, num_beams=3) == beams


def test_features_instead_of_pixels_write_the_same(lively):
    model, processor = lively
    inputs = encode(processor, prompts())
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    for beams in ({}, {"num_beams": 3}):
        with torch.no_grad():
            encoded = {"image": model.get_image_features(inputs["pixel_values"], inputs["image_grids"])}
        assert written(model, {**text, "mm_encoder_outputs": encoded}, **beams) == written(model, inputs, **beams)


def test_views_and_grids_move_with_their_prompt(lively):
    model, processor = lively
    inputs = encode(processor, prompts())
    grids = inputs["image_grids"].tolist()
    assert grids == [[2, 2], [1, 1], [3, 1], [1, 4], [2, 2], [1, 1]]
    pixels = torch.arange(5 + 1 + 4 + 5 + 5 + 1).float().view(-1, 1, 1, 1)  # a number for each view
    assert len(inputs["pixel_values"]) == len(pixels)
    ids, moved = model._expand_inputs_for_generation(
        expand_size=2, input_ids=inputs["input_ids"], pixel_values=pixels, image_grids=inputs["image_grids"]
    )
    assert torch.equal(ids, inputs["input_ids"].repeat_interleave(2, 0))
    first, second, third = range(5), range(5, 10), range(10, 21)
    expected = [*first, *first, *second, *second, *third, *third]
    assert moved["pixel_values"].flatten().tolist() == expected
    assert moved["image_grids"].tolist() == [grids[i] for i in (0, 0, 1, 2, 1, 2, 3, 4, 5, 3, 4, 5)]


def test_questions_about_tiled_images_are_answered_as_alone(lively):
    model, processor = lively
    no_words = [*processor.tokenizer.all_special_ids, *range(len(processor.tokenizer), model.lm_head.out_features)]
    config = greedy(model, processor, max_new_tokens=6)
    config.suppress_tokens = no_words
    samples = [interleaved(number, turns=1, seed=number) for number in (2, 0, 1, 3)]
    questions = find_questions(
        [{**encode_dialogue(processor, sample), "images": sample["images"]} for sample in samples], processor
    )
    assert len(questions) == 4 and isinstance(questions[0], Question)
    asked = [question.prompt for question in questions]
    together = answer(model, processor, asked, 4, config)
    alone = [answer(model, processor, [one], 1, config)[0] for one in asked]
    assert together == alone and len(set(alone)) == 4
    for sample, said in zip(samples, alone):
        images = iter(sample["images"])
        content = [
            {"type": "image", "image": next(images)} if part["type"] == "image" else part
            for part in sample["messages"][0]["content"]
        ]
        prompt = encode(processor, [[{"role": "user", "content": content}]])
        (row,) = written(model, prompt, max_new_tokens=6, suppress_tokens=no_words)
        assert processor.decode(row, skip_special_tokens=True).strip() == said


@pytest.mark.parametrize("pair", ["siglip-llama"])
def test_a_saved_folder_answers_about_tiles_without_this_package(lively, tmp_path):
    model, processor = lively
    processor.image_mode = "pad"
    picture = noise((70, 64))
    picture.save(tmp_path / "image.png")
    folder = tmp_path / "tiled" / "end_of_training"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    batch = tiny.collate(processor, ragged()[:1])
    batch.pop("labels")
    (tmp_path / "batch").mkdir()
    torch.save(batch, tmp_path / "batch" / "tiled.pt")
    run_without_package(CHILD, tmp_path, json.dumps(["tiled/end_of_training"]), "[]")
    found = json.loads((tmp_path / "found.json").read_text())
    result = found["tiled/end_of_training"]
    assert "error" not in result, result.get("error")
    assert found["importable"] == [] and result["pipeline"] == result["expected"]
    with torch.no_grad():
        assert torch.allclose(torch.load(tmp_path / "tiled end_of_training.pt"), model(**batch).logits, atol=1e-5)
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
    inputs = encode(processor, [[{"role": "user", "content": question}]])
    assert inputs["image_grids"].tolist() == [[2, 2]]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert result["answer"] == ids.tolist()


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_grids_views_and_tokens_that_disagree_give_one_line(tiling):
    model, processor = tiling
    batch = tiny.collate(processor, [interleaved(2, seed=1)])
    grids = batch["image_grids"]
    for wrong in (grids[:1], torch.cat([grids, grids[:1]]), torch.ones_like(grids)):
        with pytest.raises(ValueError, match=r"image_grids name \d+ views of \d images, and pixel_") as caught:
            model(**{**batch, "image_grids": wrong})
        one_line(caught)
    without = {name: value for name, value in batch.items() if name != "image_grids"}
    fewer = {**batch, "input_ids": batch["input_ids"].clone()}
    fewer["input_ids"][0, (batch["input_ids"][0] == processor.image_token_id).nonzero()[-1]] = 5
    for wrong in (without, fewer):
        with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: ") as caught:
            model(**wrong)
        one_line(caught)


@pytest.mark.parametrize("number", [0, -1, 2.5, "4"])
def test_a_number_of_tiles_that_is_none_gives_one_line(number, folders):
    with pytest.raises(ValueError, match=f"max_tiles={number!r}: expected 1") as caught:
        tiny.processor_of("byte-level", "default", max_tiles=number)
    one_line(caught)
    with pytest.raises(ValueError, match=f"max_tiles={number!r}: expected 1") as caught:
        tiny.compose(*folders("vit-gpt2"), "cls", max_tiles=number)
    one_line(caught)


def test_a_processor_of_other_tiles_or_another_size_does_not_fit_the_model(folders):
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls", max_tiles=4)
    check_fit(model, processor)
    for options, line in (
        ({"max_tiles": 3}, "max_tiles is 3 in the processor and 4 in the model"),
        ({"max_tiles": 4, "image_size": 48}, r"image_size is \(48, 48\) in the processor and \(32, 32\) in the model"),
    ):
        _, other = tiny.compose(*folders("vit-gpt2"), "cls", **options)
        with pytest.raises(ValueError, match=line) as caught:
            check_fit(model, other)
        one_line(caught)


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of many sizes, their captions and dialogues about them."""
    folder, captions, dialogues = tmp_path_factory.mktemp("pictures"), [], []
    for number in range(8):
        noise(OF_IMAGES[number % 4], number).save(folder / f"{number}.png")
        captions.append({"image": f"{number}.png", "caption": f"a picture {number}"})
        names = [f"{n % 8}.png" for n in range(number, number + number % 3)]
        turns = [("user", "what is it?"), ("assistant", f"there are {number} objects")]
        dialogues.append({"images": names, "messages": [{"role": role, "content": text} for role, text in turns]})
    for name, rows in (("captions", captions), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_both_stages_train_on_tiles_and_the_inspector_shows_them(pictures, folders, tmp_path, capsys):
    backbones = [*zip(("--vision_model", "--text_model"), map(str, folders("siglip-llama")))]
    backbones = [word for pair in backbones for word in pair] + ["--max_tiles", "4", "--image_mode", "pad"]
    quick = [
        "--use_cpu", "--bf16", "False", "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_new_tokens",
        "3", "--save_strategy", "no", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--eval_share", "0",
    ]  # fmt: skip
    aligned, assistant = str(tmp_path / "aligned"), str(tmp_path / "assistant")
    train_pretrain.main([*backbones, *quick, "--dataset", str(pictures / "captions.jsonl"), "--output_dir", aligned])
    dialogues = ["--dataset", str(pictures / "dialogues.jsonl")]
    train_sft.main(["--model", aligned, *quick, *dialogues, "--test_split", "train[:4]", "--output_dir", assistant])
    assert "exactly right (4 questions" in capsys.readouterr().out
    saved = VLMProcessor.from_pretrained(assistant)
    assert (saved.max_tiles, saved.image_mode) == (4, "pad")
    report = json.loads((tmp_path / "assistant" / "data_report.json").read_text())["total"]
    samples = [(n, [OF_IMAGES[k % 4] for k in range(n, n + n % 3)]) for n in range(8)]
    counts = [sum(positions(size, 4, per_view=16) for size in of_sample) for _, of_sample in samples]
    assert report["samples"] == report["learned from"] == 8 and report["image_tokens"] == sum(counts)

    page = tmp_path / "page.html"
    inspect_data.main(["--dataset", str(pictures / "dialogues.jsonl"), "--model", assistant, "--eval_share", "0", "--n",
                       "8", "--html", str(page)])  # fmt: skip
    said = capsys.readouterr().out
    for count, (_, of_sample) in zip(counts, samples):
        images = "1 image" if len(of_sample) == 1 else f"{len(of_sample)} images"
        assert not of_sample or f"{count} for {images}" in said
    assert "An image takes 17 of them, or up to 85 where it is cut into up to 4 tiles as well, and is shown" in said
    for _, of_sample in samples:
        for size in of_sample:
            assert f"<image> x {positions(size, 4, per_view=16)}" in said
    grids = [llava_next(size, (32, 32), 4) for _, of_sample in samples for size in of_sample]
    html = page.read_text()
    assert html.count("<img ") == sum(1 + (r * c if r * c > 1 else 0) for r, c in grids)
    assert html.count('alt="image 1, tile in row 2, column 2"') == sum(
        llava_next(of_sample[0], (32, 32), 4) == (2, 2) for _, of_sample in samples if of_sample
    )
    assert html.count('alt="image 1"') == sum(bool(of_sample) for _, of_sample in samples)
