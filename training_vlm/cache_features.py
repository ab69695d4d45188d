"""The features of a frozen encoder, computed once for all epochs and all runs, before the first step.

A cache belongs to one encoder (its weights, its config, what is read of it), one way of making pixels of images and one
precision: all of it names the folder, so that a stale entry is never found. Every process computes its share and writes
files of its own; what is there when a run is killed is not computed again. Training then reads features in place of
images, and the encoder leaves memory until training ends.
"""

import errno
import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object
from datasets.utils import tqdm
from PIL import Image
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.views_vlm import views_of
from modeling_vlm.vision_vlm import blank_image
from processing.batching.account import number_of
from processing.batching.collator import VLMDataCollator
from processing.batching.dataset import ConversationDataset
from processing.batching.features import FeatureCache, ShardWriter
from processing.batching.images import BatchImages, Seen
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import (
    BadImage,
    ImagePolicy,
    ImageReference,
    image_content,
    image_name,
    image_size,
    image_stamp,
    is_url,
)
from processing.processing_vlm import VLMProcessor
from processing.reading.items import Reading, is_item

from .learning.adapters import composed
from .learning.originals import Originals, autocast_dtype, shown_size
from .learning.trainer import VLMTrainer


OPTION = "--cache_vision_features"
_VERSION = 1  # of the files
_VIEWS = 32  # that the encoder is given at a time
_SHARD_BYTES, _SHARD_SECONDS = 2**30, 60  # after which what was computed is put in place
_STALE_SECONDS = 3_600  # after which a file that no process goes on with is what a kill left


def train_on_features(
    trainer: VLMTrainer, datasets: Iterable[Any], folder: str | Path, originals: Originals
) -> FeatureCache:
    """
    Have a trainer read features in place of images, and its encoder out of memory while it trains.

    Args:
        trainer, datasets, folder: see `cache_features`.
        originals: of the trainer's model.

    Raises:
        DuetError: see `cache_features`.
    """
    cache = cache_features(trainer, datasets, folder)
    model = composed(trainer.model)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        originals.release(model.model.vision_tower)
        return cache
    model.model.cached_shape = cache.shape
    if trainer.is_world_process_zero():
        print("the vision encoder stays in memory, though nothing runs it: FSDP and DeepSpeed hold its weights")
    return cache


def cache_features(trainer: VLMTrainer, datasets: Iterable[Any], folder: str | Path) -> FeatureCache:
    """
    Have a trainer's collator read the encoder's features from a cache, with all images of the data in it.

    Args:
        trainer: whose collator, model and processes are taken.
        datasets: all data that the collator will be given: data sets, or lists, of items or rows; `None` is none.
        folder: where caches lie, each in a folder of its own.

    Raises:
        DuetError: the encoder trains, its features are not the same twice, the data have no end or lie behind URLs, or
            the disk has no room.
    """
    datasets = [dataset for dataset in datasets if dataset is not None]
    model, collator = composed(trainer.model), cast(VLMDataCollator, trainer.data_collator)
    refuse_uncacheable(model, datasets)
    encoder = _Encoder(trainer, model)
    settings = cache_settings(model, collator.processor, encoder.dtype)
    place = Path(folder) / name_of(settings)
    _together(lambda: _make(place, settings))
    cache = FeatureCache(place, encoder.shape, encoder.dtype)
    sources = [_Rows(part) for dataset in datasets for part in getattr(dataset, "sources", [dataset])]
    missing = _together(lambda: _missing(trainer, sources, cache))
    _together(lambda: _check_room(trainer, cache, missing))
    _together(lambda: _fill(trainer, sources, cache, missing, encoder))
    cache.refresh()
    if len(set(gather_object([len(cache)]))) > 1:
        raise DuetError(f"{OPTION} {folder}: the processes see different files there; name a folder that all share.")
    collator.features = cache
    trainer.add_callback(_SameEncoder(model, settings["weights"]))
    return cache


def refuse_uncacheable(model: VLMForConditionalGeneration, datasets: Iterable[Any]) -> None:
    """
    Refuse a model or data of which nothing can be cached.

    Raises:
        DuetError: why.
    """
    learning = sum(p.numel() for p in model.model.vision_tower.parameters() if p.requires_grad)
    if learning:
        raise DuetError(
            f"{OPTION}: {learning:,} parameters of the vision encoder train, so that its features change at every "
            "step; leave this out, or freeze the encoder (--tune_vision frozen)."
        )
    if is_deepspeed_zero3_enabled():
        raise DuetError(f"{OPTION}: with DeepSpeed's stage 3 no process has the whole encoder; use stage 2, or FSDP.")
    if any(isinstance(dataset, torch.utils.data.IterableDataset) for dataset in datasets):
        raise DuetError(
            f"{OPTION}: a stream has no end, and its images are not known before; leave out --streaming, or the cache."
        )


def refuse_address(reference: ImageReference) -> None:
    """
    Refuse an image that lies somewhere else.

    Raises:
        DuetError: it is named by a URL.
    """
    if is_url(reference):
        raise DuetError(
            f"{OPTION}: {image_name(reference)} is a URL, and what lies there may change unseen; fetch the images and "
            "name their folder with --image_dir, or leave this out."
        )


# --- what names a cache


def cache_settings(model: PreTrainedModel, processor: VLMProcessor, dtype: torch.dtype) -> dict[str, Any]:
    """
    All that the features of an image depend on.

    The processor is told by its settings and by what it makes of three images, whatever code and libraries it is.
    """
    config = model.config
    images = BatchImages(processor)
    pixels = [images[{"bytes": content, "path": None}].tensors["pixel_values"] for content in _some_pictures()]
    return {
        "version": _VERSION,
        "weights": weights_hash(model),
        "encoder": _plain(config.vision_config.to_dict()),
        "left out": config.vision_modules_left_out,
        "layer": config.vision_feature_layer,
        "strategy": config.vision_feature_select_strategy,
        "prefix tokens": config.num_prefix_tokens,
        "precision": str(dtype).removeprefix("torch."),
        "image processor": _plain(processor.image_processor.to_dict()),
        "image mode": processor.image_mode,
        "tiles": processor.max_tiles,
        "pixels": hashlib.sha256(b"".join(_bytes_of(view) for view in pixels)).hexdigest(),
    }


def weights_hash(model: PreTrainedModel) -> str:
    """A name for the weights of the model's encoder, as they are saved."""
    prefix, digest = "model.vision_tower.", hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefix):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def name_of(settings: dict[str, Any]) -> str:
    """The folder of the cache of these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _plain(settings):
    """Settings as JSON has them, without what says where they came from or how they are computed."""
    left_out = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    if isinstance(settings, Mapping):
        return {str(key): _plain(value) for key, value in settings.items() if key not in left_out}
    if isinstance(settings, (list, tuple)):
        return [_plain(value) for value in settings]
    return settings if isinstance(settings, (str, int, float, bool, type(None))) else str(settings)


def _bytes_of(tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _some_pictures() -> Iterator[bytes]:
    """A JPEG that is decoded smaller, a PNG with transparency, a narrow one in grey."""
    slope = Image.linear_gradient("L")
    colours = Image.merge("RGB", [slope, slope.rotate(90), slope.rotate(180)])
    pictures = [
        (colours.resize((1280, 960)), "JPEG"),
        (Image.merge("RGBA", [*colours.split(), slope]).resize((70, 50)), "PNG"),
        (slope.resize((40, 300)), "PNG"),
    ]
    for picture, kind in pictures:
        stream = io.BytesIO()
        picture.save(stream, kind)
        yield stream.getvalue()


def _make(place, settings):
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in place.glob("unfinished-*"):
            if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink(missing_ok=True)
        described = place / "settings.json"
        if not described.exists():
            described.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    except OSError as error:
        raise DuetError(
            f"{OPTION} {place.parent}: {error.strerror or error}; name a folder that can be written."
        ) from error


# --- which images there are


class _Place(NamedTuple):
    """Where an image is named: the data set, the row in it, the number of the image in the row; and its views."""

    source: int
    row: int
    number: int
    views: int


class _Rows(torch.utils.data.Dataset):
    """The references of the images of each row, in order."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.rows: Sequence[int] = range(len(dataset))
        if isinstance(dataset, ConversationDataset):
            # By rows, because every caption of an image would name it.
            self.rows = range(len(dataset.rows))
            if dataset.encodings is not None:
                self.rows = sorted(set(dataset.encodings["position"]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> list[ImageReference]:
        row, dataset = self.rows[index], self.dataset
        if isinstance(dataset, ConversationDataset):
            items: list[Any] = dataset.reading.items(dataset.rows[row], row)
        else:
            item = dataset[row]
            own = Reading(source="the data", images=ImagePolicy(own_paths=True))
            items = [item] if is_item(item) else own.items(item, row)
        return [reference for item in items if "dropped" not in item for reference in item.get("images", ())]


class _Looked(torch.utils.data.Dataset):
    """What a row of all data sets names: for each image of this process its stamp and, where it is new, its views."""

    def __init__(self, sources, cache, processor, share):
        self.sources, self.cache, self.processor, self.share = sources, cache, processor, share
        self.places = [(source, row) for source, rows in enumerate(sources) for row in range(len(rows))]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        source, row = self.places[index]
        found = []
        for number, reference in enumerate(self.sources[source][row]):
            try:
                stamp = self._stamp_of_mine(reference, row)
                if stamp is not None and self.cache.find(stamp) is None:
                    tiled = self.processor.max_tiles > 1
                    grid = self.processor.tile_grid(*image_size(reference)) if tiled else (1, 1)
                    found.append((stamp, _Place(source, row, number, *views_of([grid]))))
            except BadImage:  # which is dropped and counted where its sample is
                continue
        return found

    def _stamp_of_mine(self, reference, row) -> bytes | None:
        """The stamp of an image that this process computes: by its name, or by its row where it is stored there."""
        process, processes = self.share
        if isinstance(reference, dict) and reference.get("bytes") is None:
            reference = reference.get("path")
        if isinstance(reference, (dict, Image.Image)):
            return image_stamp(reference) if row % processes == process else None
        refuse_address(reference)
        stamp = image_stamp(reference)
        return stamp if stamp[0] % processes == process else None


def _missing(trainer, sources, cache) -> dict[bytes, _Place]:
    """The images of this process that are not in the cache, by their stamps."""
    args = trainer.args
    looked = _Looked(sources, cache, trainer.data_collator.processor, (args.process_index, args.world_size))
    missing: dict[bytes, _Place] = {}
    for rows in _loaded(trainer, looked, 64, "Looking for images"):
        for found in rows:
            for stamp, place in found:
                missing.setdefault(stamp, place)
    return missing


def _loaded(trainer, dataset, batch_size, what):
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        collate_fn=list,
        num_workers=trainer.args.dataloader_num_workers,
        generator=torch.Generator(),  # the random numbers of the run stay what they are
    )
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    with tqdm(total=len(dataset), desc=what, disable=hidden, leave=False) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch))


def _check_room(trainer, cache, missing):
    views = sum(gather_object([sum(place.views for place in missing.values())]))
    images = sum(gather_object([len(missing)]))
    needed, free = views * cache.view_bytes, shutil.disk_usage(cache.folder).free
    if needed > free:
        raise DuetError(
            f"{OPTION} {cache.folder.parent}: the features of {number_of(images, 'image')} take "
            f"{shown_size(needed)}, and {shown_size(free)} are free there; free some, name another folder, or "
            "leave this out."
        )
    if trainer.is_world_process_zero():
        there = sum(file.stat().st_size for file in cache.folder.glob("*.features"))
        room = f"{shown_size(needed)} of the {shown_size(free)} that are free there"
        lacking = (
            f"{number_of(images, 'image is', 'images are')} to be computed, {room}" if images else "no image is lacking"
        )
        print(f"vision features: {shown_size(there)} are in {cache.folder}; {lacking}", flush=True)


# --- what is computed


class _Encoder:
    """The model's encoder, as a step of the run computes it."""

    def __init__(self, trainer: VLMTrainer, model: PreTrainedModel):
        self.trainer, self.model = trainer, model
        noise = blank_image(model.model.vision_tower, model.config.image_size)
        first, again = self(noise), self(noise)
        if not torch.equal(first, again):
            raise DuetError(
                f"{OPTION}: the vision encoder ({model.config.vision_config.model_type}) makes something else of the "
                "same image each time; leave this out."
            )
        self.shape = first.shape[1], first.shape[2]
        self.dtype = autocast_dtype(trainer.args) or first.dtype

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The features of views, `(views, tokens, width)`."""
        tower = self.model.model.vision_tower
        was_training = tower.training
        tower.eval()
        with self.trainer.accelerator.autocast():
            parts = [
                self.model.model.encode_views(part.to(self.trainer.args.device))[1]
                for part in pixel_values.split(_VIEWS)
            ]
        tower.train(was_training)
        return torch.cat(parts)


class _Images(torch.utils.data.Dataset):
    """Images that are to be computed: stamp, what their bytes are called, and what the encoder sees of them."""

    def __init__(self, sources: list[_Rows], missing: dict[bytes, _Place], processor: VLMProcessor):
        self.sources, self.missing, self.processor = sources, list(missing.items()), processor

    def __len__(self):
        return len(self.missing)

    def __getitem__(self, index) -> tuple[bytes, bytes, Seen] | None:
        stamp, place = self.missing[index]
        reference = self.sources[place.source][place.row][place.number]
        try:
            return stamp, image_content(reference), BatchImages(self.processor)[reference]
        except BadImage:
            return None


def _fill(trainer, sources, cache, missing, encoder):
    """Compute what is missing, this process's share."""
    if not missing:
        return
    images = _Images(sources, missing, trainer.data_collator.processor)
    writer, begun = ShardWriter(cache), time.monotonic()
    try:
        for batch in _loaded(trainer, images, _VIEWS, "Computing vision features"):
            new = {}
            for stamp, content, seen in filter(None, batch):
                if (found := writer.find(content)) is not None:
                    writer.name(stamp, found)
                else:
                    new.setdefault(content, (seen.tensors, []))[1].append(stamp)
            _add(writer, encoder, new)
            if writer.views * cache.view_bytes > _SHARD_BYTES or time.monotonic() - begun > _SHARD_SECONDS:
                writer.commit()
                begun = time.monotonic()
        writer.commit()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DuetError(
            f"{OPTION} {cache.folder.parent}: the disk is full; free some and start again, which goes on where this "
            "stopped."
        ) from error
    finally:
        writer.discard()


def _add(writer, encoder, new):
    if not new:
        return
    pixels = [tensors["pixel_values"] for tensors, _ in new.values()]
    features = encoder(torch.cat(pixels)).to("cpu", writer.cache.dtype).split([len(views) for views in pixels])
    for (content, (tensors, stamps)), of_image in zip(new.items(), features):
        grid = tuple(tensors["image_grids"][0].tolist()) if "image_grids" in tensors else (1, 1)
        writer.add(content, of_image, grid)
        for stamp in stamps:
            writer.name(stamp, writer.find(content))


def _together(work):
    """Do this process's share; what is wrong in one is told by all, so that none waits for it."""
    result, line = None, None
    try:
        result = work()
    except DuetError as error:
        *others, line = str(error).strip().splitlines()
        line = line.partition(": ")[2] if others else line  # a worker's comes with its stack trace before it
    if told := [one for one in gather_object([line]) if one]:
        raise DuetError(told[0])
    return result


class _SameEncoder(TrainerCallback):
    """Refuses to go on from a checkpoint with an encoder that is not the one whose features are read."""

    def __init__(self, model: PreTrainedModel, weights: str):
        self.model, self.weights = model, weights

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and weights_hash(self.model) != self.weights:
            raise DuetError(
                f"{OPTION}: the checkpoint has another vision encoder than the model that the run starts from; start "
                "from the model that the checkpoint came from, or leave the cache out."
            )


__all__ = [
    "cache_features", "cache_settings", "refuse_address", "refuse_uncacheable", "train_on_features", "weights_hash",
]  # fmt: skip
