"""Texts in one row are what they are alone, what they begin with is run once, and each image is opened once."""

import base64

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset
from processing.batching.encoding import IGNORE, encode_caption
from processing.batching.images import BatchImages
from processing.batching.packing import LEAST_SHARED, Text, pack, packed_length
from processing.image_files_vlm import ImagePolicy, NamedImage, load_image
from processing.reading.items import Reading
from tests import tiny
from tests.test_collator import conversation, unlearnable


PAD = 99


def text_of(ids, labels=None, weights=None, features=None):
    """A text of ids, supervised where labels are not -100."""
    ids = np.array(ids)
    labels = np.full(len(ids), IGNORE) if labels is None else np.array(labels)
    weights = (labels != IGNORE) if weights is None else weights
    features = np.full(len(ids), -1) if features is None else features
    return Text(ids, labels, np.array(weights, dtype=np.float32), np.array(features))


def captions(number, image=6, feature=0):
    """Texts of an image and two tokens of their own."""
    features = [*range(feature, feature + image), -1, -1]
    return [
        text_of([7] * image + [20 + n, 1], [IGNORE] * image + [20 + n, 1], features=features) for n in range(number)
    ]


def read(row):
    """Of every text what a model is given and asked at each of its positions, found by walking up from its leaf."""
    found = {}
    for start, end, parent, text in row.segments:
        if text < 0:
            continue
        places = list(range(start, end))
        while parent >= 0:
            first, last, parent, owner = row.segments[parent]
            assert owner == -1
            places = [*range(first, last), *places]
        assert text not in found
        found[text] = [
            (row.positions[p], row.ids[p], row.features[p], *_asked(row.labels, row.weights, p)) for p in places
        ]
    return found


def _asked(labels, weights, place):
    """What a position predicts and what that weighs, as labels that are shifted by one say it."""
    following = place + 1
    return (labels[following], weights[following]) if following < len(labels) else (IGNORE, 0)


def alone(text):
    """The same of a text that is alone."""
    return [(p, text.ids[p], text.features[p], *_asked(text.labels, text.weights, p)) for p in range(len(text.ids))]


@st.composite
def batches(draw):
    """Texts that begin alike or not: with images of several lengths, weights, ends inside each other, and doubles."""
    token = st.integers(0, 2)
    begin = st.lists(st.one_of(token, st.sampled_from(["a", "bb"])), max_size=5)
    begins = draw(st.lists(begin, min_size=1, max_size=3))
    texts = []
    for _ in range(draw(st.integers(1, 7))):
        parts = [*draw(st.sampled_from(begins)), *draw(st.lists(st.one_of(token, st.just("bb")), max_size=3))]
        parts += draw(st.sampled_from([[], [0] * LEAST_SHARED]))
        if draw(st.booleans()):
            parts = parts[::-1]
        ids, features, learned = [], [], []
        first_answer = draw(st.integers(0, len(parts) + 1))
        for place, part in enumerate([*parts, *draw(st.lists(token, min_size=1, max_size=3))]):
            if isinstance(part, str):
                begin, number = {"a": (0, 1), "bb": (1, 4)}[part]
                ids += [7] * number
                features += range(begin, begin + number)
                learned += [False] * number
            else:
                ids.append(part)
                features.append(-1)
                learned.append(place >= first_answer and draw(st.booleans()))
        labels = [id if is_learned else IGNORE for id, is_learned in zip(ids, learned)]
        weight = draw(st.sampled_from([1.0, 0.5]))
        texts.append(text_of(ids, labels, [weight * (label != IGNORE) for label in labels], features))
    return texts


@settings(max_examples=300, deadline=None)
@given(batches(), st.booleans(), st.sampled_from([1, 8]))
def test_every_text_of_a_row_is_what_it_is_alone(texts, share, multiple):
    row = pack(texts, share, PAD, multiple)
    assert read(row) == {number: alone(text) for number, text in enumerate(texts)}
    _check_whole(row, multiple)
    assert len(row.ids) - row.padding == packed_length(texts, share) <= sum(len(text.ids) for text in texts)


def _check_whole(row, multiple=1):
    """Segments cover a row in its order, each behind the one it continues; a segment begins with no label."""
    assert len(row.ids) % multiple == 0
    assert [start for start, *_ in row.segments] == [0, *(end for _, end, *_ in row.segments[:-1])]
    assert row.segments[-1][1] == len(row.ids) == len(row.labels) == len(row.features) == len(row.positions)
    for number, (start, end, parent, _) in enumerate(row.segments):
        assert start < end and -1 <= parent < number and row.labels[start] == IGNORE and row.weights[start] == 0


def _common(one, other):
    """Positions before either predicts that two texts may run once, compared one by one."""
    length = 0
    for a, b in zip(_beginning(one), _beginning(other)):
        if a != b:
            break
        length += 1
    has_image = any(feature >= 0 for _, feature in _beginning(one)[:length])
    return length if has_image or length >= LEAST_SHARED else 0


def _beginning(text):
    count = next((p for p in range(len(text.ids) - 1) if text.labels[p + 1] != IGNORE), len(text.ids) - 1)
    return [(int(id), int(feature)) for id, feature in zip(text.ids[:count], text.features[:count])]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_all_that_is_worth_sharing_is_run_once(texts):
    total = 0
    for number, text in enumerate(texts):
        most = max((_common(text, other) for other in texts[:number]), default=0)
        total += len(text.ids) - most  # what no text before has run
    assert packed_length(texts, True) == total


def test_captions_of_an_image_begin_with_their_own_copy_of_its_last_position():
    row = pack(captions(5), True, PAD)
    assert row.segments == [(0, 5, -1, -1), *((5 + 3 * n, 8 + 3 * n, 0, n) for n in range(5))]
    assert row.features.tolist() == [0, 1, 2, 3, 4] + [5, -1, -1] * 5
    assert row.positions.tolist() == [0, 1, 2, 3, 4] + [5, 6, 7] * 5
    assert row.labels.tolist() == [IGNORE] * 5 + [v for n in range(5) for v in (IGNORE, 20 + n, 1)]
    assert packed_length(captions(5), True) == 20 and packed_length(captions(5), False) == 40


def test_images_are_told_apart_by_which_stands_there_and_not_by_their_token():
    row = pack([*captions(2), *captions(2, feature=6)], True, PAD)
    ends = [(-1, -1), (0, 0), (0, 1), (-1, -1), (3, 2), (3, 3)]
    assert [(parent, text) for _, _, parent, text in row.segments] == ends


def test_a_short_beginning_without_an_image_is_not_worth_sharing():
    def texts(common):
        return [text_of([*range(common), 50 + n, 1], [IGNORE] * (common + 1) + [1]) for n in range(3)]

    for common, length in ((1, 9), (LEAST_SHARED - 1, 3 * (LEAST_SHARED + 1)), (LEAST_SHARED, LEAST_SHARED + 6)):
        assert packed_length(texts(common), True) == length


def test_the_same_text_twice_is_learned_twice():
    row = pack([captions(1)[0]] * 3, True, PAD)
    assert [text for *_, text in row.segments] == [-1, 0, 1, 2] and len(row.ids) == 5 + 9
    silent = [text_of([7] * 4 + [3], features=[0, 1, 2, 3, -1])] * 2
    assert read(pack(silent, True, PAD)) == {n: alone(silent[0]) for n in range(2)}


def test_a_history_of_many_turns_is_run_once():
    """Each text goes on where the one before first predicts, so the row is a chain, however long."""
    image, turns = list(range(4)), 300
    texts = []
    for turn in range(1, turns + 1):
        ids = [7] * 4 + [1, 2, 3] * turn
        labels = [IGNORE] * (len(ids) - 1) + [3]
        texts.append(text_of(ids, labels, features=image + [-1] * 3 * turn))
    row = pack(texts[::-1], True, PAD)
    assert len(row.ids) == 4 + 3 * turns - 2 + 2 * turns
    assert read(row) == {n: alone(text) for n, text in enumerate(texts[::-1])}


# -- the collator's batch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 4])
def processor(request):
    """Three positions a view, not tiled and tiled."""
    return tiny.processor_of("byte-level", "chatml", max_tiles=request.param)


@pytest.fixture
def shown_twice(image):
    """Dialogues of which several show one image, alone or with others; weights, doubles, texts, one to be left out."""
    one, other, wide = image(1), image(2), image(3, (200, 60))
    question = ["image", "what is it?"]
    weighed = conversation(question, "a red circle", images=[one])
    weighed["messages"][1]["weight"] = 0.25
    return [
        conversation(question, "a cat", "and?", "two", images=[one]),
        conversation(["image", "what is there?"], "a mat", images=[one]),
        conversation("hi", "hello"),
        conversation(["image", " and ", "image"], "no", images=[one, wide]),
        unlearnable(question, "a cat", images=[image(4)]),
        weighed,
        conversation(question, "a cat", images=[other]),
        conversation(["image", " and ", "image"], "yes", images=[one, other]),
        conversation(question, "a cat", "and?", "two", images=[one]),
    ]


def of_batch(batch):
    """Each text of a batch, as `read` and `alone` say it, with the very pixels of its features."""
    values = _features(batch)
    if "segments" not in batch:
        return [
            [
                (p, ids[p].item(), *_seen(values, index[p]), targets[p].item(), weights[p].item())
                for p in range(int(mask.sum()))
            ]
            for ids, mask, index, targets, weights in zip(
                batch["input_ids"], batch["attention_mask"], _index(batch), batch["shift_labels"], _weights(batch)
            )
        ]
    found = {}
    for start, end, parent, text in batch["segments"]:
        places = list(range(start, end))
        while parent >= 0:
            first, last, parent, _ = batch["segments"][parent]
            places = [*range(first, last), *places]
        if text >= 0:
            columns = [batch["position_ids"], batch["input_ids"], _index(batch), batch["shift_labels"], _weights(batch)]
            rows = zip(*(column[0, places].tolist() for column in columns))
            found[text] = [(p, id, *_seen(values, index), target, w) for p, id, index, target, w in rows]
    return [found[text] for text in range(len(found))]


def _weights(batch):
    return batch.get("loss_weights", batch["shift_labels"].ne(IGNORE).float())


def _index(batch):
    """The feature at each position; where it is not given, they stand in order."""
    if "feature_index" in batch:
        return batch["feature_index"]
    shown = batch["input_ids"].eq(_index.token)
    return torch.where(shown, (shown.flatten().cumsum(0) - 1).reshape(shown.shape), -1)


def _features(batch):
    """What stands at each feature: which image it is, by its pixels, and which of its positions."""
    found, view = [], 0
    for grid in batch.get("image_grids", [None] * len(batch.get("pixel_values", ()))):
        views = 1 if grid is None or int(grid.prod()) == 1 else 1 + int(grid.prod())
        number = 3 * views + (0 if grid is None else 1 if views == 1 else 1 + int(grid[0]))
        name = round(batch["pixel_values"][view : view + views].double().sum().item(), 6)
        found += [(name, place) for place in range(number)]
        view += views
    return found


def _seen(values, index):
    return values[int(index)] if index >= 0 else (None, -1)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("multiple", [None, 64])
def test_a_row_without_padding_holds_what_the_padded_batch_does(processor, shown_twice, share, multiple):
    _index.token = processor.image_token_id
    padded = VLMDataCollator(processor, account=True)(shown_twice)
    packed = VLMDataCollator(
        processor, account=True, padding_free=True, share_prefix=share, pad_to_multiple_of=multiple
    )(shown_twice)
    assert of_batch(packed) == of_batch(padded) and len(of_batch(packed)) == 8
    assert packed["account"].records == padded["account"].records
    tokens = sum(record.tokens for record in padded["account"].records)
    run, padding = packed["account"].positions, packed["account"].padding
    assert packed["input_ids"].shape == (1, run) and "attention_mask" not in packed
    assert run - padding < tokens if share else run - padding == tokens
    assert padding == (-(run - padding) % (multiple or 1))
    assert padded["account"].positions == tokens + padded["account"].padding == padded["labels"].numel()
    assert all(type(value) is int for segment in packed["segments"] for value in segment)
    targets = torch.cat([packed["labels"][:, 1:], torch.tensor([[IGNORE]])], 1)
    assert torch.equal(targets, packed["shift_labels"])
    assert {packed[name].dtype for name in ("input_ids", "labels", "position_ids", "feature_index")} == {torch.long}
    assert packed["loss_weights"].dtype == torch.float32


def test_five_captions_of_an_image_cost_the_image_once(processor, image):
    rows = [{"image": image(1), "caption": [f"a cat {n}" for n in range(5)]}]
    batch = VLMDataCollator(processor, encode=encode_caption, padding_free=True, share_prefix=True)(rows)
    (prefix, *leaves) = batch["segments"]
    assert prefix[2:] == (-1, -1) and [leaf[2:] for leaf in leaves] == [(0, n) for n in range(5)]
    assert len(_features(batch)) == prefix[1] + 1 == batch["feature_index"].max() + 1


@pytest.mark.parametrize("padding_free", [False, True])
def test_planned_batches_come_as_lists_of_items(processor, shown_twice, padding_free):
    collate = VLMDataCollator(processor, padding_free=padding_free)
    flat, nested = collate(shown_twice), collate([shown_twice[:3], shown_twice[3:]])
    assert flat.keys() == nested.keys()
    for name, value in flat.items():
        assert torch.equal(value, nested[name]) if isinstance(value, torch.Tensor) else value == nested[name]


def test_a_row_of_nothing_is_one_position_of_padding(processor):
    batch = VLMDataCollator(processor, padding_free=True, share_prefix=True, account=True)([unlearnable("a", "b")])
    assert batch["segments"] == [(0, 1, -1, -1)] and batch["labels"].tolist() == [[IGNORE]]
    assert (batch["account"].padding, batch["account"].positions) == (1, 1) and "feature_index" not in batch


def test_a_prefix_is_shared_in_a_row_alone(processor):
    with pytest.raises(ValueError, match="share_prefix=True: .* add padding_free=True"):
        VLMDataCollator(processor, share_prefix=True)


# -- each image once ---------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """What was opened, in that order."""
    found = []

    def load(reference, size=None):
        found.append(reference)
        return load_image(reference, size)

    monkeypatch.setattr("processing.batching.images.load_image", load)
    return found


def _rows_of_five(kind, folder, picture):
    """Ways in which five conversations of one image, and one of another, come to a collator."""
    other, path = folder / "other.png", folder / "one.png"
    picture(1).save(path), picture(2).save(other)
    questions = [{"question": f"is it {n}?", "answer": "a cat"} for n in range(5)]
    if kind == "parquet bytes":
        images = [{"bytes": path.read_bytes(), "path": "one.png"}] * 5 + [{"bytes": other.read_bytes(), "path": None}]
        rows = [{"image": image, **question} for image, question in zip(images, [*questions, questions[0]])]
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        rows = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))
        return [rows[n] for n in range(6)]
    if kind == "a folder":
        rows = [{"image": "one.png", **question} for question in questions] + [{"image": "other.png", **questions[0]}]
        dataset = ConversationDataset(datasets.Dataset.from_list(rows), Reading("f", images=ImagePolicy(str(folder))))
        return [dataset[n] for n in range(6)]
    if kind == "COCO":
        rows = [{"image": "one.png", "captions": [f"a cat {n}" for n in range(5)]}]
        rows.append({"image": "other.png", "captions": ["a mat"]})
        dataset = ConversationDataset(
            datasets.Dataset.from_list(rows), Reading("c", "Describe it.", images=ImagePolicy(str(folder)))
        )
        return [dataset[n] for n in range(6)]
    if kind == "PIL":
        one = picture(1)
        return [{"image": one, **question} for question in questions] + [{"image": picture(2), **questions[0]}]
    if kind == "data URI":
        uris = [
            f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in [path] * 5 + [other]
        ]
        return [{"image": uri, **question} for uri, question in zip(uris, [*questions, questions[0]])]
    return [{"image": str(path), **question} for question in questions] + [{"image": str(other), **questions[0]}]


@pytest.mark.parametrize("kind", ["parquet bytes", "a folder", "COCO", "PIL", "data URI", "rows in hand"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_an_image_is_opened_once_a_batch_however_many_show_it(processor, kind, padding_free, image, tmp_path, opened):
    items = _rows_of_five(kind, tmp_path, image)
    collate = VLMDataCollator(processor, padding_free=padding_free, account=True)
    batch = collate(items)
    assert len(opened) == 2
    counts = [processor.image_tokens(28, 40)] * 2
    assert batch["feature_index"].max() + 1 == sum(counts)
    assert [record.images for record in batch["account"].records] == [1] * 6
    if "image_grids" in batch:
        assert len(batch["image_grids"]) == 2
    _index.token = processor.image_token_id
    texts = [
        of_batch(part)[0] for part in (VLMDataCollator(processor)([item]) for item in items)
    ]  # each alone, opened anew
    assert of_batch(batch) == texts
    assert len(opened) == 8
    collate(items)  # and in the next batch anew
    assert len(opened) == 10


def test_where_each_image_is_shown_once_the_batch_says_no_more_than_before(processor, image):
    batch = VLMDataCollator(processor)([conversation(["image"], "a", images=[image(n)]) for n in range(2)])
    assert "feature_index" not in batch


def test_one_name_under_two_policies_is_two_images(processor, image, tmp_path, opened):
    """Where it may lead is part of what an image is called: what one source may not reach, another does not open."""
    (tmp_path / "inside").mkdir()
    image(1).save(tmp_path / "one.png")
    link = tmp_path / "inside" / "link.png"
    link.symlink_to(tmp_path / "one.png")
    folder = str(tmp_path / "inside")
    named = [NamedImage(str(link), ImagePolicy(folder, allow_links=allowed)) for allowed in (True, False)]
    collate = VLMDataCollator(processor)
    batch = collate([conversation(["image"], "a", images=[reference]) for reference in named])
    assert len(opened) == 2 and len(batch["input_ids"]) == 1 and collate.dropped == {"unreadable image": 1}


def test_a_bad_image_is_tried_once_and_drops_every_text_that_shows_it(processor, image, tmp_path, opened):
    gone = str(tmp_path / "gone.png")
    asked = [conversation(["image", f"is it {n}?"], "a cat", images=[gone], source="s", row=n) for n in range(3)]
    good = image(1)
    both = conversation(["image", " and ", "image"], "no", images=[good, gone], source="s", row=3)
    collate = VLMDataCollator(processor, account=True)
    batch = collate([*asked, both, conversation(["image"], "yes", images=[good], source="s", row=4)])
    records = batch["account"].records
    assert [record.dropped for record in records] == ["missing image file"] * 4 + [None]
    assert all(f"s, row {n}: {gone}" in record.detail for n, record in enumerate(records[:4]))
    assert collate.dropped == {"missing image file": 4}
    assert opened.count(gone) == 1 and opened.count(good) == 1
    assert len(batch["input_ids"]) == 1 and "feature_index" not in batch


def test_an_image_that_only_a_dropped_text_shows_is_not_in_the_batch(processor, image, tmp_path):
    lost, good = image(1), image(2)
    pair = conversation(["image", " and ", "image"], "no", images=[lost, str(tmp_path / "gone.png")])
    batch = VLMDataCollator(processor)([pair, conversation(["image"], "yes", images=[good])])
    alone = VLMDataCollator(processor)([conversation(["image"], "yes", images=[good])])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])


def test_an_object_that_is_gone_lends_its_identity_to_no_other(processor):
    """Objects that are made while a batch is may be given the id of one that is not needed any more."""
    images = BatchImages(processor)
    colours = {images[Image.new("RGB", (32, 32), (n, 0, 0))].tensors["pixel_values"].sum().item() for n in range(50)}
    assert len(colours) == 50
