"""A stage of a run before it is one: the model's shape, how conversations are encoded, and a sample of them."""

import contextlib
import copy
import functools
import io
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import datasets
import torch
from PIL import Image

from processing.batching.account import number_of
from processing.batching.dataset import ConversationDataset, MixedDataset, StreamedDataset
from processing.batching.encoding import Encoder, encode_item
from processing.data_error_vlm import DuetError
from processing.reading.items import Reading

from .adapting import sketched
from .data import Data, Opened, TrainDataset, joined, load_data
from .flops import Costs, Work, costs_of
from .inspect_data.processor import lay_out
from .learning.adapters import composed
from .learning.originals import autocast_dtype
from .learning.sampling import order_seed
from .load import check_named, choose_max_length, choose_what_learns, weights_dtype
from .rehearsal import Rehearsed, rehearse
from .run import check_batch
from .settings import Arguments
from .stages import PRETRAIN, Stage
from .survey import SURVEYED, sources_of, survey_training


ROWS = 512  # that are read of the data, or as many as a few batches need


@dataclass(frozen=True)
class StandIn:
    """
    Conversations that stand for the data, of one image and one text each.

    Args:
        text: tokens of each, those of the template among them.
        supervised: how many of them are learned; of a caption all are.
    """

    SIZE = (480, 640)  # of an image

    text: int
    supervised: int

    def data(self, encoder: Encoder | None, asks: bool, rows: int) -> Data:
        """
        As many rows, whose texts have about so many tokens.

        Args:
            encoder: by which tokens are counted; without one words are.
            asks: whether answers are learned, and not captions.
        """
        question, answer = (self.text - self.supervised if asks else 0), self.supervised
        wanted = (self.text - self.supervised, self.supervised)
        words = [max(1, question), max(1, answer)]
        if encoder is not None:
            for _ in range(4):
                item = self._reading.items(next(self._rows(words, asks, encoder, 1)), 0)[0]
                _, record = encode_item(item, encoder)
                found = record.tokens - record.image_tokens - record.supervised, record.supervised
                for part, (now, then) in enumerate(zip(found, wanted)):
                    words[part] = max(1, words[part] + round((then - now) / max(1, now / words[part])))
        made = datasets.Dataset.from_list(list(self._rows(words, asks, encoder, rows)))
        return Data([Opened(made, self._reading)], [], None, None)

    _reading = Reading(source="a stand-in")

    def _rows(self, words, asks, encoder, rows) -> Iterator[dict[str, Any]]:
        rng = random.Random(0)
        question, answer = (" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=count)) for count in words)
        said = {"question": question, "answer": answer} if asks else {"caption": answer}
        tiled = encoder is not None and encoder.processor.max_tiles > 1
        picture = io.BytesIO()  # of the size of a photograph where its size matters
        Image.new("1", self.SIZE[::-1] if tiled else (1, 1)).save(picture, "PNG")
        for number in range(rows):
            content = picture.getvalue() + number.to_bytes(4)  # another image each, of a part that nobody reads
            yield {"image": {"bytes": content, "path": None}, **said}


class Sketch:
    """
    What a stage of a run takes, as far as it can be known without weights and without images.

    Args:
        stage: which.
        arguments: the run's settings.
        maker: those of the stage that makes its model, where that is not there yet.
        stand_in: in place of the data.
        samples: conversations of an epoch, where the data do not say.
        devices: that take a step together.

    Attributes:
        model: its shape, on the meta device, with what learns of it.

    Raises:
        DuetError: what training would refuse of model and data.
    """

    def __init__(
        self,
        stage: Stage,
        arguments: Arguments,
        maker: Arguments | None = None,
        stand_in: StandIn | None = None,
        samples: int | None = None,
        devices: int = 1,
    ):
        if stand_in is not None and not stage.asks:
            stand_in = replace(stand_in, supervised=stand_in.text)
        self.stage, self.arguments, self.stand_in, self.samples = stage, arguments, stand_in, samples
        self.devices, model_args = devices, arguments.model
        check_named(model_args)
        dtype = weights_dtype(model_args)
        self.model, processor = self._laid_out(arguments if maker is None else maker, PRETRAIN if maker else stage)
        self.model.to(dtype)
        inner = self.model
        self.model = sketched(inner, arguments)
        choose_what_learns(stage, self.model, arguments)
        for side, backbone in (("vision", inner.model.vision_tower), ("text", inner.model.language_model)):
            if getattr(model_args, f"{side}_attn_implementation") == "eager":
                backbone.set_attn_implementation("eager")
        max_length = choose_max_length(self.model, arguments.data.max_length)
        self.encoder = stage.encoder(processor, arguments.data, max_length)
        self._tried: dict[int, Rehearsed] = {}
        if stand_in is not None:
            room = max_length - processor.image_tokens(*StandIn.SIZE)
            if stand_in.text > room:
                raise DuetError(
                    f"--tokens_per_sample {stand_in.text}: beside an image a sequence of {max_length:,} positions has "
                    f"room for {room:,} tokens of text."
                )
        else:
            sample = self.sample(ROWS)
            survey_training(stage, sample, self.encoder, arguments.data, self._is_part(sample))
        if not self._is_stream and (samples is not None or stand_in is None):
            check_batch(arguments, samples or self._length(), devices)

    def _laid_out(self, arguments, stage):
        data_args = arguments.data
        if self.stand_in is None:
            data = load_data(stage, data_args, arguments.training)
        else:
            data_args = copy.copy(data_args)
            data_args.tokenizer_dataset_name = None
            data = self.stand_in.data(None, stage.asks, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            return lay_out(stage, arguments.model, data_args, data)

    @functools.cached_property
    def data(self) -> Data:
        """The rows of the run."""
        if self.stand_in is None:
            return load_data(self.stage, self.arguments.data, self.arguments.training)
        return self.stand_in.data(self.encoder, self.stage.asks, self.samples or 4 * ROWS)

    # --- a batch

    @property
    def option(self) -> str:
        """The setting that says how large a batch is."""
        by_tokens = self.arguments.efficiency.max_tokens_per_batch is not None
        return "max_tokens_per_batch" if by_tokens else "per_device_train_batch_size"

    @property
    def unit(self) -> str:
        """What it counts."""
        return "position" if self.option == "max_tokens_per_batch" else "conversation"

    @property
    def batch(self) -> int:
        """How large a batch of the run is."""
        part = self.arguments.efficiency if self.unit == "position" else self.arguments.training
        return getattr(part, self.option)

    def least_batch(self) -> int:
        """The smallest that can be."""
        if self.unit == "conversation":
            return 1
        multiple = self.arguments.data.pad_to_multiple_of or 1
        return -(-max(self._lengths(4 * ROWS)) // multiple) * multiple

    def most_batch(self) -> int:
        """The largest that the data have conversations for."""
        whole = self.samples or (ROWS if self._is_stream else self._length())
        if self.unit == "conversation":
            dropping = self.arguments.training.dataloader_drop_last and not self._is_stream
            return whole // self.devices if dropping else whole
        lengths = self._lengths(ROWS)
        return sum(lengths) * whole // len(lengths)

    def with_batch(self, number: int) -> Rehearsed:
        """What was found of steps with batches of that size."""
        if number not in self._tried:
            arguments = self.arguments
            if self.unit == "position":
                efficiency = replace(arguments.efficiency, max_tokens_per_batch=number)
                arguments = arguments._replace(efficiency=efficiency)
                rows = max(4 * ROWS, 4 * number // max(1, min(self._lengths(ROWS))))
            else:
                training = copy.copy(arguments.training)
                training.per_device_train_batch_size = number
                arguments, rows = arguments._replace(training=training), 4 * number
            data = self.sample(max(ROWS, rows))
            self._tried[number] = rehearse(arguments, self.model, self.encoder, data, self.devices)
        return self._tried[number]

    @property
    def rehearsed(self) -> Rehearsed:
        """What was found of the run's steps."""
        return self.with_batch(self.batch)

    def sample(self, rows: int) -> TrainDataset:
        """Conversations of so many rows, from all over the data, encoded; of a stream its first, as many as a run's."""
        rows = max(rows, SURVEYED) if self._is_stream else rows
        return self._sampled(1 << (rows - 1).bit_length())  # not another one for each size

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _sampled(self, rows):
        each, parts = -(-rows // len(self.data.train)), []
        for found, reading in self.data.train:
            if isinstance(found, datasets.IterableDataset):
                parts.append(Opened(found.take(each), reading))
            else:
                count = min(each, len(found))
                parts.append(Opened(found.select([n * len(found) // count for n in range(count)]), reading))
        data_args, seed = self.arguments.data, order_seed(self.arguments.training)
        settings = {"encoder": self.encoder, "on_bad_sample": data_args.on_bad_sample}
        return joined(parts, self.data.weights, seed, settings, data_args.shuffle_buffer)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _lengths(self, rows: int) -> list[int]:
        """Positions of conversations of so many rows; of each stream of its first that are learned."""
        sample = self.sample(rows)
        if not isinstance(sample, StreamedDataset):
            return sample.lengths
        sources = sources_of(sample)
        lengths: list[int] = []
        for source in sources:
            records = (encode_item(item, self.encoder)[1] for item in source.once())
            learned = (record.tokens for record in records if record.dropped is None)
            lengths += itertools.islice(learned, -(-rows // len(sources)))
        return lengths

    def _is_part(self, sample):
        found = [] if self._is_stream else zip(self.data.train, sources_of(sample))
        return any(len(rows) > len(source.rows) for (rows, _), source in found)

    @property
    def _is_stream(self):
        return any(isinstance(rows, datasets.IterableDataset) for rows, _ in self.data.train)

    # --- the run

    @functools.cache  # noqa: B019
    def _whole(self) -> int:
        """Conversations of an epoch; of a stream nobody asks."""
        return self._conversations_of(self.data.train)

    def _length(self) -> int:
        """Those of which something is learned, by the share that the sample has of them."""
        sample = self.sample(ROWS)
        read = self._conversations_of([Opened(source.rows, source.reading) for source in sources_of(sample)])
        return round(self._whole() * len(cast(ConversationDataset | MixedDataset, sample)) / max(1, read))

    def _conversations_of(self, sources) -> int:
        whole = joined(sources, self.data.weights, order_seed(self.arguments.training))
        return len(cast(ConversationDataset | MixedDataset, whole))

    @functools.cached_property
    def costs(self) -> Costs:
        """What a step's work costs."""
        return costs_of(composed(self.model))

    @property
    def conversations(self) -> int | None:
        """Of the whole run, as often as they are learned from; `None` where nobody knows."""
        args = self.arguments.training
        if args.max_steps > 0:
            each = self.rehearsed.conversations / max(1, self.rehearsed.batches)
            return round(args.max_steps * args.gradient_accumulation_steps * self.devices * each)
        if self.samples is None and self.stand_in is not None:
            return None
        return round(args.num_train_epochs * (self.samples or self._length()))

    @property
    def flops(self) -> int | None:
        """Operations of the run, those of filling a cache among them."""
        if self.conversations is None:
            return None
        found = self.rehearsed
        needed = self.costs.of(found.work.times(self.conversations / max(1, found.conversations)))
        if self.arguments.efficiency.cache_vision_features is not None and self._views is not None:
            needed += self.costs.of(Work(encoded=self._views))
        return needed

    @property
    def cache_bytes(self) -> int | None:
        """What the features of all images of the training data take, where the encoder is frozen."""
        if self._views is None or any(p.requires_grad for p in composed(self.model).model.vision_tower.parameters()):
            return None
        tokens, width = self.rehearsed.features
        number = torch.finfo(autocast_dtype(self.arguments.training) or torch.float32).bits // 8
        return self._views * tokens * width * number

    @functools.cached_property
    def _views(self) -> int | None:
        """Views of all images of the training data, those of a file that several rows name more than once."""
        sample = self.sample(ROWS)
        if isinstance(sample, StreamedDataset) or (self.stand_in is not None and self.samples is None):
            return None
        images = {name for index in range(len(sample)) for name in _names(sample[index])}
        return round(len(images) * self.rehearsed.views_an_image * (self.samples or self._length()) / len(sample))

    @property
    def described(self) -> str:
        """What was looked at, in a line."""
        if self.stand_in is not None:
            mean = self.rehearsed.work.predicted / max(1, self.rehearsed.conversations)
            return (
                f"No data were read: each sample is taken to be an image and {self.stand_in.text:,} tokens of text, "
                f"of which {mean:,.0f} are supervised."
            )
        sample = self.sample(ROWS)
        if isinstance(sample, StreamedDataset):
            return f"{self.data.name}: a stream, of which the first rows of each source were read."
        whole = number_of(self._whole(), "conversation")
        return f"{self.data.name}: {whole}, of which a sample of {len(sample):,} was read."


def _names(item) -> Iterator[Any]:
    for number, image in enumerate(item.get("images") or ()):
        yield os.fspath(image) if isinstance(image, (str, os.PathLike)) else (item["source"], item["row"], number)


__all__ = ["ROWS", "Sketch", "StandIn"]
