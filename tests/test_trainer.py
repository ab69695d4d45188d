"""Training through the Trainer: the loss falls, a run can be stopped and resumed, and a checkpoint holds everything."""

import shutil

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor
from processing.batching.account import Account, Record
from tests import tiny
from training_vlm.learning.checkpoints import save_account, seal
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.training_arguments import VLMTrainingArguments


SETTINGS = dict(
    use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, dataloader_num_workers=0, learning_rate=1e-3,
    per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=6, save_strategy="no", logging_steps=1,
    seed=7, lr_scheduler_type="cosine",
)  # fmt: skip


def trainer_of(pair, folders, items, folder, kind=VLMTrainer, dropout=0.1, **changes):
    """A Trainer over a freshly composed model; dropout is on, so that its random numbers matter as well."""
    model, processor = tiny.compose(*folders(pair), tiny.PAIRS[pair][2])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    apply_tuning(model, "last:1", "full")
    settings = {**SETTINGS, "output_dir": str(folder), **changes}
    if kind is Trainer:
        arguments = TrainingArguments(**settings, remove_unused_columns=False)
    else:
        arguments = VLMTrainingArguments(**settings)
    return kind(
        model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor),
        train_dataset=items, eval_dataset=items,
    )  # fmt: skip


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [Trainer, VLMTrainer])
def test_the_loss_falls(pair, folders, image, tmp_path, kind):
    """The model and the collator need nothing of ours around them."""
    items = tiny.ragged_dialogues(image)
    trainer = trainer_of(pair, folders, items, tmp_path, kind, max_steps=30, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 30 and sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_both_trainers_take_the_same_steps(pair, folders, image, tmp_path):
    """What ours leaves out was never read: the weights are those of the stock Trainer."""
    items = tiny.ragged_dialogues(image)
    results = []
    for kind in (Trainer, VLMTrainer):
        trainer = trainer_of(pair, folders, items, tmp_path, kind, dropout=0.0, optim="sgd", learning_rate=0.1)
        trainer.train()
        results.append(weights(trainer))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_run(pair, folders, image, tmp_path):
    """Stopped after three of six steps, in the middle of an epoch of four."""
    items = tiny.ragged_dialogues(image)
    whole = trainer_of(pair, folders, items, tmp_path / "whole", save_strategy="steps", save_steps=3)
    start = weights(whole)
    whole.train()
    # Another process would start with another model and another state of the random numbers.
    torch.manual_seed(1234)
    resumed = trainer_of(pair, folders, items, tmp_path / "resumed", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert same(weights(resumed), weights(whole))
    halfway = VLMForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-3")
    halfway = {name: parameter.detach() for name, parameter in halfway.named_parameters()}
    assert not same(halfway, weights(whole)) and not same(halfway, start)
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again == [entry["loss"] for entry in whole.state.log_history if "loss" in entry]


def test_one_seed_gives_one_run(pair, folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    runs = []
    for seed in (7, 7, 8):
        trainer = trainer_of(pair, folders, items, tmp_path, seed=seed)
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_worker_processes_change_nothing(folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    runs = []
    for workers in (0, 2):
        trainer = trainer_of("vit-gpt2", folders, items, tmp_path, dataloader_num_workers=workers)
        trainer.train()
        runs.append(weights(trainer))
    assert same(*runs)


class Captions(torch.utils.data.Dataset):
    """Shows another conversation of each pair in every other epoch."""

    def __init__(self, items):
        self.items, self.epoch, self.shown = items, 0, []

    def __len__(self):
        return len(self.items) // 2

    def __getitem__(self, index):
        self.shown.append((self.epoch, index))
        return self.items[2 * index + self.epoch % 2]

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_a_data_set_is_told_its_epoch_after_resuming_too(folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    whole = trainer_of(
        "vit-gpt2",
        folders,
        Captions(items),
        tmp_path / "whole",
        save_strategy="steps",
        save_steps=3,
        eval_strategy="no",
    )
    whole.train()
    assert {epoch for epoch, _ in whole.train_dataset.shown} == {0, 1, 2}
    resumed = trainer_of("vit-gpt2", folders, Captions(items), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights(resumed), weights(whole))


class WithLengths(torch.utils.data.Dataset):
    """Knows its lengths without reading an item."""

    def __init__(self, items, lengths):
        self.items, self.lengths, self.read = items, lengths, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read += 1
        return self.items[index]


def test_grouping_by_length_reads_no_item_and_pads_less(folders, image, tmp_path):
    processor = tiny.compose(*folders("vit-gpt2"), "cls")[1]
    items = tiny.ragged_dialogues(image) * 8
    lengths = [tiny.collate(processor, [item])["input_ids"].shape[1] for item in items]
    padded = []
    for strategy in ("random", "group_by_length"):
        data = WithLengths(items, lengths)
        trainer = trainer_of("vit-gpt2", folders, data, tmp_path, train_sampling_strategy=strategy)
        loader = trainer.get_train_dataloader()
        assert data.read == 0
        padded.append(sum(batch["input_ids"].numel() for batch in loader))
        assert data.read == len(items)
    assert padded[1] < 0.9 * padded[0]


class Revolving(WithLengths):
    """Shows other items in each epoch."""

    def __init__(self, items, lengths):
        super().__init__(items, lengths)
        self.epoch, self.first = 0, lengths

    def __getitem__(self, index):
        return super().__getitem__((index + 5 * self.epoch) % len(self))

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.lengths = [self.first[(index + 5 * epoch) % len(self)] for index in range(len(self))]


def test_lengths_are_those_of_the_epoch(folders, image, tmp_path):
    data = Revolving(tiny.ragged_dialogues(image) * 8, [n * 37 % 64 for n in range(64)])
    trainer = trainer_of("vit-gpt2", folders, data, tmp_path, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert data.epoch == epoch and sorted(orders[-1]) == list(range(64)) == list(range(len(sampler)))
        for start in range(0, 64, 16):  # the first is exchanged, so that the longest of all is met early
            lengths = [data.lengths[index] for index in orders[-1][start + 1 : start + 16]]
            assert lengths == sorted(lengths, reverse=True)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_processes_agree_on_the_order_also_when_they_resume(folders, image, tmp_path):
    """Together they see every sample once; one that begins in the third epoch sees what it would have seen there."""
    items = tiny.ragged_dialogues(image) * 2
    lengths = [n * 7 % 16 for n in range(16)]

    def loader_of(process):
        data = Revolving(items, lengths)
        trainer = trainer_of("vit-gpt2", folders, data, tmp_path, train_sampling_strategy="group_by_length")
        loader = torch.utils.data.DataLoader(data, batch_size=2, sampler=trainer._get_train_sampler())
        torch.manual_seed(process)
        return trainer, prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)

    def begin(trainer, loader, epoch, skip=0):
        callbacks = trainer.callback_handler
        callbacks.train_dataloader = loader
        callbacks.on_epoch_begin(trainer.args, TrainerState(epoch=epoch + skip / 4), TrainerControl())
        if skip:
            loader = skip_first_batches(loader, skip)
        loader.set_epoch(epoch)
        assert loader.dataset.epoch == epoch
        return list(loader.batch_sampler)

    processes = [loader_of(process) for process in (0, 1)]
    epochs = [[begin(*process, epoch) for process in processes] for epoch in range(3)]
    for shown in epochs:
        assert sorted(index for batches in shown for batch in batches for index in batch) == list(range(16))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for process in (0, 1):
        for skip in (0, 1):
            assert begin(*loader_of(process), 2, skip) == epochs[2][process][skip:]


def test_a_resumed_run_grouped_by_length_is_the_run(folders, image, tmp_path):
    """Stopped in the third of three epochs; what is shown changes with the epoch."""
    processor = tiny.compose(*folders("vit-gpt2"), "cls")[1]
    items = tiny.ragged_dialogues(image)
    lengths = [tiny.collate(processor, [item])["input_ids"].shape[1] for item in items]
    runs = []
    for name in ("whole", "resumed"):
        torch.manual_seed(len(runs))
        trainer = trainer_of(
            "vit-gpt2", folders, Revolving(items, lengths), tmp_path / name, train_sampling_strategy="group_by_length",
            max_steps=12, save_strategy="steps", save_steps=3, eval_strategy="no",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9") if runs else None)
        assert trainer.state.epoch == 3
        runs.append(trainer)
    assert same(*map(weights, runs))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        while True:
            yield from self.items


def test_only_the_training_of_a_resumed_stream_skips(folders, image, tmp_path):
    """The last checkpoint is found by itself."""
    items = tiny.ragged_dialogues(image)
    settings = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=3)
    whole = trainer_of("vit-gpt2", folders, Stream(items), tmp_path, **settings)
    whole.eval_dataset = items
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = trainer_of("vit-gpt2", folders, Stream(items), tmp_path, **settings)
    resumed.eval_dataset = items
    made, encoder = [], resumed.data_collator.encoder
    encode = encoder.encode
    encoder.encode = lambda *args, **kwargs: made.append(args) or encode(*args, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert len(made) == (6 - 4 + 1) * 2 + len(items)  # one batch is fetched ahead
    assert same(weights(whole), weights(resumed)) and resumed.data_collator.skip_batches == 0
    expected, found = (
        [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in (whole, resumed)
    )
    assert len(expected) == 2 and found == expected
    anew = trainer_of("vit-gpt2", folders, Stream(items), tmp_path / "anew", ignore_data_skip=True)
    anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert anew.state.global_step == 6 and not same(weights(whole), weights(anew))


def test_fewer_processes_go_on_with_what_all_have_counted(folders, image, tmp_path, monkeypatch):
    items = tiny.ragged_dialogues(image)
    trainer_of("vit-gpt2", folders, items, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for process in range(3):
        account = Account()
        account.add([Record(f"source {process}", row, None) for row in range(process + 1)])
        save_account(account, tmp_path / "checkpoint-1", process)
    seal(tmp_path / "checkpoint-1")
    done = TrainOutput(1, 0.0, {"train_loss": 0.0})
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: done)
    everything = {"source 0": 1, "source 1": 2, "source 2": 3}
    for writes, expected in ((True, everything), (False, {})):
        trainer = trainer_of("vit-gpt2", folders, items, tmp_path)
        monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self, writes=writes: writes))
        trainer.account.add([Record("of before", 0, None)])
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert {source: counts["samples"] for source, counts in trainer.account.sources.items()} == expected


def test_a_checkpoint_holds_everything(pair, folders, image, tmp_path):
    """Model, processor and code; it goes on training as it is."""
    items = tiny.ragged_dialogues(image)
    trainer = trainer_of(pair, folders, items, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "optimizer.pt", "scheduler.pt", "trainer_state.json",
        "modeling_vlm.py", "configuration_vlm.py", "projector_vlm.py", "backbones_vlm.py", "processing_vlm.py",
    } <= names  # fmt: skip
    assert not any(name.endswith((".bin", ".pth")) and name.startswith("pytorch_model") for name in names)
    model = VLMForConditionalGeneration.from_pretrained(checkpoint)
    processor = VLMProcessor.from_pretrained(checkpoint)
    batch, again = (tiny.collate(one, items) for one in (trainer.processing_class, processor))
    assert batch.keys() == again.keys() and all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        assert torch.equal(model(**again).logits, trainer.model.eval()(**batch).logits)
    assert model.generation_config.suppress_tokens == trainer.model.generation_config.suppress_tokens
    assert model.generation_config.eos_token_id == trainer.model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_a_run_that_is_not_in_a_package_saves_the_code_all_the_same(composed, tmp_path):
    """`save_model` at the end of a run writes what a checkpoint has."""
    model, processor = composed
    arguments = VLMTrainingArguments(**SETTINGS, output_dir=str(tmp_path / "out"))
    trainer = VLMTrainer(
        model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor)
    )
    trainer.save_model()
    assert {"modeling_vlm.py", "processing_vlm.py", "model.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("prefix", ["eval", "test"])
def test_metrics_are_computed_from_logits_and_labels(composed, image, tmp_path, prefix):
    model, processor = composed
    items = tiny.ragged_dialogues(image)[:7]

    def accuracy(found):
        predicted, labels = found.predictions.argmax(-1)[:, :-1], found.label_ids[:, 1:]
        return {"accuracy": (predicted == labels)[labels != -100].mean(), "rows": len(labels)}

    trainer = VLMTrainer(
        model=model, args=VLMTrainingArguments(**SETTINGS, output_dir=str(tmp_path)), processing_class=processor,
        data_collator=VLMDataCollator(processor), eval_dataset=items, compute_metrics=accuracy,
    )  # fmt: skip
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    assert {f"{prefix}_loss", f"{prefix}_accuracy", f"{prefix}_rows"} <= metrics.keys()
    assert metrics[f"{prefix}_rows"] == 7
    right = total = 0
    for item in items:
        batch = tiny.collate(processor, [item])
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(-1)[:, :-1]
        kept = batch["labels"][:, 1:] != -100
        right, total = right + (predicted == batch["labels"][:, 1:])[kept].sum().item(), total + kept.sum().item()
    assert metrics[f"{prefix}_accuracy"] == pytest.approx(right / total)


def test_predictions_come_back(composed, image, tmp_path):
    model, processor = composed
    items = tiny.ragged_dialogues(image)[:5]
    trainer = VLMTrainer(
        model=model, args=VLMTrainingArguments(**SETTINGS, output_dir=str(tmp_path)), processing_class=processor,
        data_collator=VLMDataCollator(processor),
    )  # fmt: skip
    found = trainer.predict(items)
    # Logits alone: no cache, no image features.
    assert found.predictions.shape == (5, found.label_ids.shape[1], model.config.text_config.vocab_size)
    assert "test_loss" in found.metrics


def test_the_best_model_is_loaded_at_the_end(pair, folders, image, tmp_path):
    """The one with the highest loss here, so that it is not the last; there may be several evaluation sets."""
    items = tiny.ragged_dialogues(image)
    trainer = trainer_of(
        pair, folders, items, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, greater_is_better=True, metric_for_best_model="loss", max_steps=4,
    )  # fmt: skip
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and trainer.state.best_metric == evaluated[0] > evaluated[1]
    best = VLMForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    assert same(weights(trainer), {name: parameter.detach() for name, parameter in best.named_parameters()})
    metrics = trainer.evaluate({"short": items[:2], "long": items[2:]})
    assert {"eval_short_loss", "eval_long_loss"} <= metrics.keys()


def test_a_batch_of_nothing_to_learn_does_no_harm(folders, image, tmp_path):
    """A step whose every conversation was dropped or unsupervised has loss 0, and the weights stay numbers."""
    items = tiny.ragged_dialogues(image)[:4]
    for item in items[2:]:
        for message in item["messages"]:
            message["train"] = False
    trainer = trainer_of("siglip-llama", folders, items, tmp_path, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 0 and losses[1] == 0.0
    assert trainer.data_collator.dropped == {"no token of it is supervised": 2}
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())
    trainer.eval_dataset = items[2:]
    assert "eval_loss" not in trainer.evaluate()


def test_the_evaluation_loss_knows_weights_and_no_smoothing(pair, folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    items[0]["messages"][1]["weight"] = 0.5
    found = [
        trainer_of(pair, folders, items, tmp_path, label_smoothing_factor=smoothing).evaluate()["eval_loss"]
        for smoothing in (0.0, 0.1)
    ]
    trainer = trainer_of(pair, folders, items, tmp_path)
    batch = trainer.data_collator(items)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
        del batch["loss_weights"]
        assert abs(trainer.model(**batch).loss.item() - expected) > 1e-4
    assert found[0] == found[1] and abs(found[0] - expected) <= 1e-5 * expected


def test_weights_are_refused_where_another_loss_cannot_know_them(folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    trainer = trainer_of("vit-gpt2", folders, items, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs["logits"].float().mean()
    trainer.train()
    items[0]["messages"][1]["weight"] = 0.5
    with pytest.raises(ValueError, match="weights of messages cannot be combined with another loss"):
        trainer.train()
