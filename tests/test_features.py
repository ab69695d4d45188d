"""Features of a frozen tower, computed once and read from a cache; weights that lie on disk while others learn."""

import base64
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from modeling_vlm import VLMModel
from processing import VLMDataCollator
from processing.batching.dataset import ConversationDataset, MixedDataset
from processing.batching.encoding import Encoder, encode_caption
from processing.batching.features import FeatureCache, ShardWriter
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import ImagePolicy
from processing.reading.items import Reading
from tests import tiny
from tests.test_trainer import SETTINGS, Stream, same, weights
from training_vlm.cache_features import train_on_features
from training_vlm.learning.originals import Originals, hold_frozen
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.training_arguments import VLMTrainingArguments


WAYS = ["vit-gpt2", "siglip-llama", "tiles", "two encoders", "layer -2"]


@pytest.fixture
def compose(folders):
    """`compose(way)` is `(model, processor)` of one of the `WAYS` in which images become features; no dropout."""

    def composed(way):
        vit, _ = folders("vit-gpt2")
        siglip, llama = folders("siglip-llama")
        if way == "two encoders":
            model, processor = compose_two(vit, siglip, llama)
        elif way in tiny.PAIRS:
            model, processor = tiny.compose(*folders(way), tiny.PAIRS[way][2])
        else:
            options = {"max_tiles": 4} if way == "tiles" else {"vision_feature_layer": -2}
            model, processor = tiny.compose(vit, llama, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, processor

    return composed


@pytest.fixture(params=WAYS)
def seeing(request, compose):
    """`(model, processor)` of each way."""
    return compose(request.param)


def compose_two(first, second, text):
    """A model with two encoders side by side, and its processor."""
    torch.manual_seed(0)
    vision = str(first), str(second)
    model = tiny.VLMForConditionalGeneration.from_backbones(vision, str(text))
    return model, tiny.VLMProcessor.from_backbones(vision, str(text), model.config)


def test_features_of_the_tower_stand_in_for_pixels(seeing, image):
    model, processor = seeing
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:5])
    model.train()
    expected = model(**batch)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        _, features = model.model.encode_views(batch.pop("pixel_values"))
    found = model(**batch, vision_features=features)
    found.loss.backward()
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None or not parameter.grad.any()
        elif parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_pixels_and_features_are_not_both_taken(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:1])
    with pytest.raises(ValueError, match="both pixel_values and vision_features"):
        model(**batch, vision_features=torch.zeros(1, 1, 32))


# --- the cache


@pytest.fixture
def pictures(tmp_path, image):
    """`pictures(4)` are paths of images, two of them with the same bytes."""

    def saved(count):
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for number in range(count):
            image(number, size=(40 + 30 * (number % 3), 28)).save(folder / f"{number}.png")
        (folder / "same.png").write_bytes((folder / "0.png").read_bytes())
        return [*(folder / f"{number}.png" for number in range(count)), folder / "same.png"]

    return saved


def items_of(paths):
    """Conversations that show each image, some two, one none."""
    shown = [tiny.dialogue("what is it?", f"the {path.stem}", str(path)) for path in paths]
    return [
        *shown,
        tiny.dialogue("and these?", "two", str(paths[0]), str(paths[1])),
        tiny.dialogue("no picture?", "none"),
    ]


def trainer_of(made, items, folder, **changes):
    """A Trainer that saves at the steps 2, 4 and 6; the encoder is frozen."""
    model, processor = made
    apply_tuning(model, "frozen", "full")
    settings = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3, train_sampling_strategy="sequential"
    )
    return VLMTrainer(
        model=model,
        args=VLMTrainingArguments(**{**SETTINGS, **settings, "output_dir": str(folder), **changes}),
        processing_class=processor,
        data_collator=VLMDataCollator(processor),
        train_dataset=items,
        eval_dataset=[items[index] for index in range(min(3, len(items)))],
    )


def cached(trainer, folder):
    """The trainer, its features in a cache and its encoder out of memory while it trains; `None` for no cache."""
    originals = hold_frozen(trainer.model, None, trainer.args)
    cache = train_on_features(trainer, [trainer.train_dataset, trainer.eval_dataset], folder, originals)
    trainer.add_callback(originals)
    return cache


def losses(trainer):
    return [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]


def forbid_images(monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr("processing.batching.images.load_image", opened)


def test_a_run_on_cached_features_is_the_run_without(seeing, compose, request, pictures, tmp_path, monkeypatch):
    """Losses of training and evaluation, and weights; no image is opened, the encoder is never run nor in memory."""
    way = request.node.callspec.params["seeing"]
    items = items_of(pictures(4))
    plain = trainer_of(seeing, items, tmp_path / "plain")
    plain.train()
    trainer = trainer_of(compose(way), items, tmp_path / "cached")
    cache = cached(trainer, tmp_path / "cache")
    assert len(cache.entries["shard"]) == 5 + 4  # five paths and four contents
    with monkeypatch.context() as patched:
        forbid_images(patched)
        tower = trainer.model.model.vision_tower
        runs, held = [], []
        hook = tower.register_forward_hook(lambda *_: runs.append(1))
        step = trainer.training_step
        patched.setattr(
            trainer,
            "training_step",
            lambda *args: held.append(sum(p.untyped_storage().nbytes() for p in tower.parameters())) or step(*args),
        )
        trainer.train()
    hook.remove()
    assert not runs and len(held) == 6 and max(held) < 1000
    assert losses(trainer)[:-1] == pytest.approx(losses(plain)[:-1], rel=1e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[name], tensor, rtol=1e-4, atol=1e-6)
    for name, tensor in plain.model.model.vision_tower.state_dict().items():
        assert torch.equal(trainer.model.model.vision_tower.state_dict()[name], tensor)


def test_a_run_on_cached_features_goes_on_as_it_was(compose, pictures, tmp_path):
    items, where = items_of(pictures(4)), tmp_path / "cache"
    whole = trainer_of(compose("vit-gpt2"), items, tmp_path / "whole")
    cached(whole, where)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = trainer_of(compose("vit-gpt2"), items, tmp_path / "resumed")
    cached(resumed, where)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


def test_another_encoder_in_the_checkpoint_is_refused(compose, pictures, tmp_path):
    items = items_of(pictures(2))
    trainer_of(compose("vit-gpt2"), items, tmp_path / "run", max_steps=2).train()
    model, processor = compose("vit-gpt2")
    with torch.no_grad():
        model.model.vision_tower.embeddings.cls_token += 1
    trainer = trainer_of((model, processor), items, tmp_path / "run")
    cached(trainer, tmp_path / "cache")
    with pytest.raises(DuetError, match="the checkpoint has another vision encoder"):
        trainer.train(resume_from_checkpoint=True)


def test_what_is_saved_holds_the_encoder_whole_and_the_model_answers_afterwards(seeing, pictures, tmp_path):
    """Each checkpoint, and the model itself, also the best that is loaded at the end."""
    model, processor = seeing
    expected = {name: tensor.clone() for name, tensor in model.model.vision_tower.state_dict().items()}
    trainer = trainer_of(
        seeing, items_of(pictures(2)), tmp_path / "run", load_best_model_at_end=True, eval_steps=2, max_steps=4
    )
    cached(trainer, tmp_path / "cache")
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        again = tiny.VLMForConditionalGeneration.from_pretrained(folder)
        for name, tensor in expected.items():
            assert torch.equal(again.model.vision_tower.state_dict()[name], tensor), name
        assert again.dtype == torch.float32
    batch = tiny.collate(processor, items_of(pictures(2))[:1])
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "image_grids") if name in batch}
    again = tiny.VLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.equal(model.eval().generate(**inputs, max_new_tokens=3), again.generate(**inputs, max_new_tokens=3))
    assert not list((tmp_path / "run").glob("_originals*"))


def test_whoever_runs_the_encoder_while_it_is_out_of_memory_gets_it_back(compose, pictures, tmp_path):
    made = compose("siglip-llama")
    trainer = trainer_of(made, items_of(pictures(2)), tmp_path / "run", max_steps=2)
    pixels = torch.randn(1, 3, 32, 32)
    expected = made[0].model.encode_views(pixels)[1]
    cached(trainer, tmp_path / "cache")
    found, step = [], trainer.training_step
    trainer.training_step = lambda *args: found.append(made[0].model.encode_views(pixels)[1]) or step(*args)
    trainer.train()
    assert len(found) == 2 and all(torch.equal(one, expected) for one in found)


def encoded_views(monkeypatch):
    """How many views an encoder is given from now on, the two of noise that it is tried with aside."""
    seen, encode = [], VLMModel.encode_views

    def counted(self, pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return encode(self, pixel_values, **kwargs)

    monkeypatch.setattr(VLMModel, "encode_views", counted)
    return lambda: sum(seen) - 2


def test_a_later_run_computes_only_what_is_new_or_changed(compose, pictures, image, tmp_path, monkeypatch):
    paths, where = pictures(4), tmp_path / "cache"
    first = cached(trainer_of(compose("vit-gpt2"), items_of(paths), tmp_path / "a"), where)
    trainer = trainer_of(compose("vit-gpt2"), items_of(paths), tmp_path / "b")
    count = encoded_views(monkeypatch)
    assert cached(trainer, where).folder == first.folder and count() == 0
    image(50).save(paths[1])
    os.utime(paths[2])  # the same bytes
    trainer = trainer_of(compose("vit-gpt2"), items_of(paths), tmp_path / "c")
    count = encoded_views(monkeypatch)
    cache = cached(trainer, where)
    assert count() == 1
    batch = cache_batch(compose("vit-gpt2"), cache, items_of(paths)[:4])
    features = tiny.collate(compose("vit-gpt2")[1], items_of(paths)[:4])["pixel_values"]
    with torch.no_grad():
        expected = compose("vit-gpt2")[0].model.encode_views(features)[1]
    torch.testing.assert_close(batch["vision_features"], expected, rtol=1e-5, atol=1e-6)


def cache_batch(made, cache, items):
    collator = VLMDataCollator(made[1])
    collator.features = cache
    return collator(items)


def test_an_image_that_changes_while_a_run_learns_is_named(compose, image, tmp_path):
    paths = [tmp_path / "0.bmp", tmp_path / "1.bmp"]
    for number, path in enumerate(paths):
        image(number).save(path)
    made = compose("vit-gpt2")
    cache = cached(trainer_of(made, items_of(paths), tmp_path / "run"), tmp_path / "cache")
    image(50).save(paths[1])  # as many bytes as before
    with pytest.raises(DuetError, match="1.bmp is not among the cached features") as error:
        cache_batch(made, cache, items_of(paths))
    assert "\n" not in str(error.value)


def test_an_image_that_cannot_be_read_is_dropped_and_counted_as_without_a_cache(compose, pictures, tmp_path):
    paths = pictures(3)
    paths[1].write_bytes(b"no picture")
    paths[2].unlink()
    made, items = compose("vit-gpt2"), items_of(paths)
    plain, read = VLMDataCollator(made[1]), VLMDataCollator(made[1])
    read.features = cached(trainer_of(made, items, tmp_path / "run"), tmp_path / "cache")
    expected, batch = plain(items), read(items)
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and len(batch["vision_features"]) == 2
    assert read.dropped == plain.dropped == {"missing image file": 1, "unreadable image": 2}


def test_images_without_a_path_are_known_by_what_they_are(compose, image, pictures, tmp_path):
    """Bytes, a data: URI and PIL objects; the bytes of a file share its features."""
    made, (other, path, _) = compose("tiles"), pictures(2)
    written = base64.b64encode(path.read_bytes()).decode()
    references = [str(path), {"bytes": path.read_bytes(), "path": None}, f"data:image/png;base64,{written}", image(0)]
    items = [tiny.dialogue("what?", "that", reference) for reference in references]
    cache = cached(trainer_of(made, items, tmp_path / "run"), tmp_path / "cache")
    views = [len(made[1].process_images([Image.open(path)])["pixel_values"]) for path in (path, other)]
    assert sum(file.stat().st_size for file in cache.folder.glob("*.features")) == sum(views) * cache.view_bytes
    batch = cache_batch(made, cache, [tiny.dialogue("what?", "that", image(0)), *items])
    expected = tiny.collate(made[1], [tiny.dialogue("what?", "that", image(0)), *items])
    assert torch.equal(batch["image_grids"], expected["image_grids"])
    with torch.no_grad():
        features = made[0].model.encode_views(expected["pixel_values"])[1]
    torch.testing.assert_close(batch["vision_features"], features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_images_of_every_source_are_computed_once_a_row(compose, pictures, tmp_path, monkeypatch, ahead):
    """Rows with several captions, stored images and paths, of two sources; every item finds its image."""
    paths, made = pictures(4), compose("vit-gpt2")
    named = [{"image": path.name, "captions": ["a cat", "a mat", "two"]} for path in paths[:3]]
    stored = [{"image": {"bytes": path.read_bytes(), "path": None}, "caption": "three"} for path in paths[2:4]]
    sources = [
        ConversationDataset(datasets.Dataset.from_list(named), Reading("named", images=ImagePolicy(paths[0].parent))),
        ConversationDataset(
            datasets.Dataset.from_list(stored).cast_column("image", datasets.Image(decode=False)), Reading("stored")
        ),
    ]
    if ahead:
        for source in sources:
            source.encode_ahead(Encoder(made[1], encode_caption, None))
    trainer = trainer_of(made, MixedDataset(sources), tmp_path / "run")
    count = encoded_views(monkeypatch)
    trainer.eval_dataset = None
    cache = cached(trainer, tmp_path / "cache")
    assert count() == 4
    forbid_images(monkeypatch)
    batch = cache_batch(made, cache, [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    assert len(batch["vision_features"]) == 3 + 2  # by name, by content: a file and its bytes are two in a batch


def test_what_another_encoder_processor_or_precision_computed_is_not_read(compose, pictures, tmp_path):
    items, where = items_of(pictures(2)), tmp_path / "cache"
    caches = {}
    for what in ("as it is", "weights", "layer", "normalisation", "mode", "bf16", "code"):
        model, processor = compose("layer -2" if what == "layer" else "vit-gpt2")
        if what == "weights":
            with torch.no_grad():
                model.model.vision_tower.embeddings.cls_token[0, 0, 0] += 1e-3
        if what == "normalisation":
            processor.image_processor.image_std = [0.3, 0.3, 0.3]
        if what == "mode":
            processor.image_mode = "pad"
        if what == "code":
            pixels = processor.process_images
            processor.process_images = lambda images, pixels=pixels: {
                "pixel_values": pixels(images)["pixel_values"] / 2
            }
        changes = {"bf16": True} if what == "bf16" else {}
        caches[what] = cached(trainer_of((model, processor), items, tmp_path / what, **changes), where)
    assert len({cache.folder for cache in caches.values()}) == 7
    assert caches["bf16"].dtype == torch.bfloat16 and caches["as it is"].dtype == torch.float32


def test_frozen_weights_do_not_name_another_cache_when_they_are_held_smaller(compose, pictures, tmp_path):
    items, where = items_of(pictures(2)), tmp_path / "cache"
    plain = trainer_of(compose("vit-gpt2"), items, tmp_path / "a", bf16=True)
    held = trainer_of(compose("vit-gpt2"), items, tmp_path / "b", bf16=True)
    hold_frozen(held.model, "bfloat16", held.args)
    assert cached(plain, where).folder == cached(held, where).folder


# --- several processes, kills, full disks


def test_a_cache_goes_on_where_it_was_killed(compose, pictures, tmp_path, monkeypatch):
    """Killed in the middle of the second file; nothing half written is read, nothing whole is computed again."""
    items, where = items_of(pictures(6)), tmp_path / "cache"
    monkeypatch.setattr("training_vlm.cache_features._VIEWS", 2)
    monkeypatch.setattr("training_vlm.cache_features._SHARD_BYTES", 1)
    made = compose("vit-gpt2")
    if (child := os.fork()) == 0:
        commit = ShardWriter.commit

        def killed(self):
            if list(self.cache.folder.glob("*.index")):
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self)

        ShardWriter.commit = killed
        cached(trainer_of(made, items, tmp_path / "a"), where)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (place,) = where.iterdir()
    assert len(list(place.glob("*.features"))) == 1 and list(place.glob("unfinished-*"))
    count = encoded_views(monkeypatch)
    cache = cached(trainer_of(made, items, tmp_path / "b"), where)
    assert count() == 4 and len(cache.entries) == 7 + 6
    assert list(place.glob("unfinished-*"))  # another process may be at it
    os.utime(next(place.glob("unfinished-*")), (0, 0))
    cached(trainer_of(made, items, tmp_path / "c"), where)
    assert not list(place.glob("unfinished-*"))


def test_an_index_without_all_of_its_features_is_not_read(compose, pictures, tmp_path):
    cache = cached(trainer_of(compose("vit-gpt2"), items_of(pictures(3)), tmp_path / "run"), tmp_path / "cache")
    (shard,) = cache.folder.glob("*.features")
    shard.write_bytes(shard.read_bytes()[: -cache.view_bytes])
    again = FeatureCache(cache.folder, cache.shape, cache.dtype)
    assert len(again.entries) == 5


def test_a_disk_without_room_is_refused_before_anything_is_computed(compose, pictures, tmp_path, monkeypatch):
    trainer = trainer_of(compose("vit-gpt2"), items_of(pictures(3)), tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=400))
    with pytest.raises(DuetError, match=r"of 4 images take 0.5 kB, and 0.4 kB are free there; free some") as error:
        cached(trainer, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_disk_that_is_full_midway_is_one_line(compose, pictures, tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = trainer_of(compose("vit-gpt2"), items_of(pictures(3)), tmp_path / "run")
    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(DuetError, match="the disk is full; free some and start again, which goes on"):
        cached(trainer, tmp_path / "cache")


@pytest.mark.parametrize("what", ["trains", "random", "stream", "url", "no folder"])
def test_what_cannot_be_cached_is_refused_with_the_reason(compose, pictures, tmp_path, what):
    made, items, where = compose("vit-gpt2"), items_of(pictures(2)), tmp_path / "cache"
    if what == "url":
        items.append(tiny.dialogue("what?", "that", "https://example.com/1.png"))
    trainer = trainer_of(made, items, tmp_path / "run")
    if what == "trains":
        apply_tuning(made[0], "last:1", "full")
    if what == "random":
        made[0].model.vision_tower.register_forward_hook(
            lambda module, inputs, output: type(output)(last_hidden_state=torch.rand_like(output.last_hidden_state))
        )
    if what == "stream":
        trainer.train_dataset = Stream(items)
    if what == "no folder":
        where.write_text("")
    reason = {
        "trains": "parameters of the vision encoder train",
        "random": "makes something else of the same image each time",
        "stream": "a stream has no end",
        "url": "example.com/1.png is a URL",
        "no folder": "name a folder that can be written",
    }[what]
    with pytest.raises(DuetError, match=reason) as error:
        cached(trainer, where)
    assert "\n" not in str(error.value)


# --- frozen weights in another type


@pytest.mark.parametrize("way", ["vit-gpt2", "siglip-llama", "two encoders"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_held_smaller_change_no_result(compose, image, tmp_path, way, dtype):
    """Losses and gradients of steps under autocast are bit-identical, and the memory of the weights is less."""
    found = {}
    batch = tiny.collate(compose(way)[1], tiny.ragged_dialogues(image))
    for asked in (None, dtype):
        model, _ = compose(way)
        apply_tuning(model, "frozen", "last:1")
        narrow = Originals(model, tmp_path)
        if asked:
            narrow.narrow(getattr(torch, asked))
        model.train()
        with torch.autocast("cpu", getattr(torch, dtype)):
            loss = model(**batch).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found[asked] = loss.detach(), gradients, sum(p.nbytes for p in model.parameters())
    assert torch.equal(found[None][0], found[dtype][0])
    assert all(map(torch.equal, found[None][1], found[dtype][1]))
    assert found[dtype][2] < 0.8 * found[None][2]


def test_only_what_autocast_casts_anyway_is_held_smaller(compose, tmp_path):
    model, _ = compose("vit-gpt2")
    apply_tuning(model, "frozen", "last:1")
    shared = model.model.language_model.h[0].mlp.c_fc
    shared.also = torch.nn.Embedding(*shared.weight.shape)
    shared.also.weight = shared.weight
    Originals(model, tmp_path).narrow(torch.bfloat16)
    assert shared.weight.dtype == torch.float32 and shared.bias.dtype == torch.bfloat16
    held = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert any("vision_tower" in name for name in held) and any("h.0.attn.c_attn" in name for name in held)
    assert not any(
        word in name for name in held for word in ("norm", "ln_", "wte", "wpe", "lm_head", "h.2", "projector")
    )
    assert model.dtype == model.model.vision_tower.dtype == model.model.language_model.dtype == torch.float32


@pytest.mark.parametrize("way", ["vit-gpt2", pytest.param("siglip-llama", marks=pytest.mark.slow)])
def test_what_is_saved_of_weights_held_smaller_is_what_it_was(compose, pictures, tmp_path, way):
    """Through checkpoints, a resume, the best model loaded at the end, and after training."""
    made, items = compose(way), items_of(pictures(2))
    apply_tuning(made[0], "frozen", "last:1")
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    settings = dict(bf16=True, load_best_model_at_end=True, eval_steps=2)
    results = {}
    for asked in (None, "auto"):
        for resumed in (False, True):
            model, processor = compose(way)
            folder = tmp_path / f"{asked}-{resumed}"
            trainer = trainer_of((model, processor), items, folder, **settings)
            apply_tuning(model, "frozen", "last:1")
            trainer.add_callback(hold_frozen(model, asked, trainer.args))
            if resumed:
                shutil.copytree(tmp_path / f"{asked}-False" / "checkpoint-4", folder / "checkpoint-4")
            trainer.train(resume_from_checkpoint=resumed)
            trainer.save_model()
            results[asked, resumed] = weights(trainer)
            saved = tiny.VLMForConditionalGeneration.from_pretrained(folder)
            assert same(dict(saved.named_parameters()), weights(trainer)) and saved.dtype == torch.float32
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(torch.equal(results["auto", True][name], before[name]) for name in frozen)
    assert all(same(one, results[None, False]) for one in results.values())


@pytest.mark.parametrize(
    ("asked", "settings", "reason"),
    [
        ("bfloat16", {}, "this run computes in float32"),
        ("float16", {"bf16": True}, "this run casts to bfloat16"),
    ],
)
def test_another_type_than_that_of_autocast_is_refused(compose, tmp_path, asked, settings, reason):
    trainer = trainer_of(compose("vit-gpt2"), [], tmp_path, **settings)
    with pytest.raises(DuetError, match=reason) as error:
        hold_frozen(trainer.model, asked, trainer.args)
    assert "\n" not in str(error.value)
    assert not hold_frozen(trainer.model, "auto" if not settings else None, trainer.args).is_holding


@pytest.mark.parametrize(
    ("asked", "settings", "dtype", "says"),
    [
        ("auto", {}, "float32", "without --bf16 or --fp16 nothing is cast"),
        ("auto", {"bf16": True}, "bfloat16", "no frozen weight that autocast would cast is in float32"),
        ("bfloat16", {"bf16": True}, "bfloat16", "no frozen weight that autocast would cast is in float32"),
        (None, {}, "float32", ""),
    ],
)
def test_a_type_of_frozen_weights_that_changes_nothing_is_said_to(
    compose, tmp_path, capsys, asked, settings, dtype, says
):
    trainer = trainer_of(compose("vit-gpt2"), [], tmp_path, **settings)
    trainer.model.to(getattr(torch, dtype))
    capsys.readouterr()
    assert not hold_frozen(trainer.model, asked, trainer.args).is_holding
    assert capsys.readouterr().out == (f"--frozen_dtype {asked} changes nothing: {says}\n" if says else "")


@pytest.mark.parametrize("hidden", [True, False])
def test_bars_of_the_cache_are_drawn_where_those_of_training_are(compose, pictures, tmp_path, capsys, hidden):
    datasets.enable_progress_bars()
    try:
        cached(
            trainer_of(compose("vit-gpt2"), items_of(pictures(2)), tmp_path, disable_tqdm=hidden), tmp_path / "cache"
        )
    finally:
        datasets.disable_progress_bars()
    said = capsys.readouterr()
    assert ("Computing vision features" in said.err) != hidden
    assert "3 images are to be computed" in said.out


def test_one_image_to_be_computed_is_one(compose, pictures, tmp_path, capsys):
    cached(trainer_of(compose("vit-gpt2"), items_of(pictures(1))[:1], tmp_path), tmp_path / "cache")
    assert "; 1 image is to be computed" in capsys.readouterr().out


def test_a_model_whose_results_would_change_is_refused_and_left_as_it_was(compose, tmp_path):
    model, _ = compose("siglip-llama")
    apply_tuning(model, "frozen", "frozen")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    linear = model.model.language_model.layers[0].mlp.up_proj
    linear.forward = lambda states: states @ linear.weight.float().T.sin()
    with pytest.raises(DuetError, match="--frozen_dtype bfloat16 cannot be used with this model"):
        Originals(model, tmp_path).narrow(torch.bfloat16)
    assert same(before, dict(model.named_parameters()))


def test_a_row_of_many_texts_reads_features_as_it_reads_pixels(compose, pictures, tmp_path):
    """Packed, with shared prefixes and tiles: each image is there once, and stands where the row says."""
    made, paths = compose("tiles"), pictures(3)
    items = [tiny.dialogue("what is it?", answer, str(path)) for path in paths for answer in ("a cat", "two mats")]
    collators = [VLMDataCollator(made[1], padding_free=True, share_prefix=True) for _ in range(2)]
    collators[1].features = cached(trainer_of(made, items, tmp_path / "run"), tmp_path / "cache")
    pixels, features = (collator(items) for collator in collators)
    assert torch.equal(pixels["feature_index"], features["feature_index"])
    assert features["vision_features"].shape[:1] == pixels["pixel_values"].shape[:1] and "pixel_values" not in features
    made[0].eval()
    torch.testing.assert_close(made[0](**features).loss, made[0](**pixels).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("asked", [None, "auto"])
def test_under_autocast_losses_are_those_of_the_run_without(compose, pictures, tmp_path, asked):
    """In bfloat16, with the frozen weights held in it or not: a linear layer reads the features, so nothing is lost."""
    items, found = items_of(pictures(3)), []
    for where in (None, tmp_path / "cache"):
        trainer = trainer_of(compose("siglip-llama"), items, tmp_path / f"run {where is None}", bf16=True)
        if where is not None:
            apply_tuning(trainer.model, "frozen", "last:1")
            originals = hold_frozen(trainer.model, asked, trainer.args)
            train_on_features(trainer, [items], where, originals)
            trainer.add_callback(originals)
        else:
            apply_tuning(trainer.model, "frozen", "last:1")
        trainer.train()
        found.append(losses(trainer)[:-1])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)


def test_a_trainer_may_train_twice(compose, pictures, tmp_path):
    """What is out of memory comes back after each training, and goes again."""
    trainer = trainer_of(compose("vit-gpt2"), items_of(pictures(2)), tmp_path / "run", bf16=True, max_steps=2)
    originals = hold_frozen(trainer.model, "auto", trainer.args)
    train_on_features(trainer, [trainer.train_dataset, trainer.eval_dataset], tmp_path / "cache", originals)
    trainer.add_callback(originals)
    before = {name: tensor.clone() for name, tensor in trainer.model.model.vision_tower.state_dict().items()}
    for _ in range(2):
        trainer.train()
        assert not originals.is_holding
        assert same(before, trainer.model.model.vision_tower.state_dict())


def test_without_room_for_the_originals_the_model_answers_as_it_trained(compose, pictures, tmp_path, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError

    trainer = trainer_of(compose("siglip-llama"), items_of(pictures(2)), tmp_path / "run", bf16=True, max_steps=2)
    expected = {name: tensor.clone() for name, tensor in trainer.model.model.vision_tower.state_dict().items()}
    originals = hold_frozen(trainer.model, "auto", trainer.args)
    trainer.add_callback(originals)
    monkeypatch.setattr(Originals, "restore", full)
    trainer.train()
    trainer.save_model()
    assert originals.is_holding
    assert same(expected, trainer.model.model.vision_tower.state_dict())
    batch = tiny.collate(trainer.processing_class, items_of(pictures(2))[:1])
    trainer.model.eval().generate(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=2)


def test_a_cache_that_is_taken_away_is_one_line(compose, pictures, tmp_path):
    made, items = compose("vit-gpt2"), items_of(pictures(2))
    cache = cached(trainer_of(made, items, tmp_path / "run"), tmp_path / "cache")
    shutil.rmtree(cache.folder)
    with pytest.raises(DuetError, match="cannot be read: No such file or directory; start again"):
        cache_batch(made, cache, items)


TWO = """
import sys
from pathlib import Path
import torch
from tests import tiny
from tests.test_features import cached, compose_two, items_of, trainer_of
from tests.test_trainer import weights
from training_vlm.learning.originals import hold_frozen

root = Path(sys.argv[1])
items = items_of(sorted((root / "pictures").glob("*.png")))
made = tiny.compose(root / "vision", root / "text", "cls")
trainer = trainer_of(made, items, root / "run", ddp_backend="gloo", load_best_model_at_end=True, eval_steps=2)
cache = cached(trainer, root / "cache")
trainer.train()
trainer.save_model()
if trainer.args.process_index == 0:
    torch.save(weights(trainer), root / "weights.pt")
torch.save((len(cache), weights(trainer)), root / f"of-{trainer.args.process_index}.pt")
again = trainer_of(tiny.compose(root / "vision", root / "text", "cls"), items, root / "run", ddp_backend="gloo")
cached(again, root / "cache")
again.train(resume_from_checkpoint=str(root / "run" / "checkpoint-4"))
model = tiny.compose(root / "vision", root / "text", "cls")
held = trainer_of(model, items, root / "held", ddp_backend="gloo", bf16=True, max_steps=2)
originals = hold_frozen(held.model, "auto", held.args)
held.add_callback(originals)
assert originals.is_holding and not list((root / "held").glob("_originals*"))
held.train()
held.save_model()
made[0].model.vision_tower.requires_grad_(True)
try:
    cached(trainer, root / "cache")
except ValueError as error:
    (root / f"refused-{trainer.args.process_index}.txt").write_text(str(error))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_build_one_cache_and_train_on_it(pictures, tmp_path):
    pictures(20)
    vision = tiny.save_vit(tmp_path / "vision")
    tiny.save_gpt2(tmp_path / "text")
    (tmp_path / "run.py").write_text(TWO)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "run.py", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (place,) = (tmp_path / "cache").iterdir()
    shards = [file.stat().st_size for file in place.glob("*.features")]
    assert len(shards) == 2 and sum(shards) in (20 * 32 * 4, 21 * 32 * 4)  # a copy may be the other process's
    (count, first), (other, second) = (torch.load(tmp_path / f"of-{process}.pt") for process in (0, 1))
    assert count == other == 21 + sum(shards) // (32 * 4) and same(first, second)
    encoder = tiny.compose(vision, tmp_path / "text", "cls")[0].model.vision_tower
    for run in ("run", "held"):
        saved = tiny.VLMForConditionalGeneration.from_pretrained(tmp_path / run)
        assert same(dict(saved.model.vision_tower.named_parameters()), dict(encoder.named_parameters()))
    assert all("parameters of the vision encoder train" in (tmp_path / f"refused-{n}.txt").read_text() for n in (0, 1))
