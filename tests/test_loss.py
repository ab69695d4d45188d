"""The loss is the token-weighted mean of the two formulas, however the tokens are cut into batches and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments

from modeling_vlm.backbones_vlm import CACHE
from processing import VLMDataCollator, VLMProcessor
from processing.batching.encoding import IGNORE, encode_caption
from tests import matrix, tiny
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.training_arguments import VLMTrainingArguments


def captions(image):
    """Stage 1's conversations: an image and its caption."""
    texts = ["a cat", "two red squares and a large green triangle on a mat", "blue", "the sun is at the top left"]
    items = [tiny.dialogue("", text, image(index)) for index, text in enumerate(texts)]
    for item in items:
        del item["messages"][0]["content"][1]
    return items


def transcribed(model, ids, supervised, pixels):
    """-sum_i 1[y_i supervised] log F(y_i | y_<i, Z) of one sequence, and the number of its terms; Z = P(V(X))."""
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    if len(pixels):
        states = model.model.vision_tower(pixels).last_hidden_state
        states = {"cls": states[:, :1], "patch": states[:, model.config.num_prefix_tokens :]}[
            model.config.vision_feature_select_strategy
        ]
        z = model.model.multi_modal_projector(states)
        places = [i for i, id in enumerate(ids) if id == model.config.image_token_id]
        embeds = embeds.index_put((torch.tensor(places),), z.flatten(0, 1))
    states = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
    logs = log_softmax(states @ model.lm_head.weight.T, dim=-1)
    terms = [-logs[i - 1, ids[i]] for i in range(1, len(ids)) if supervised[i]]
    return torch.stack(terms).sum(), len(terms)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_is_the_formula(composed, image, stage):
    """Written from the formula in float64, sequence by sequence, with y_i found by hand."""
    model, processor = composed
    model = model.double()
    tokenizer, per_image = processor.tokenizer, model.config.image_seq_length
    items = captions(image) if stage == 1 else tiny.ragged_dialogues(image)
    total, count = 0.0, 0
    for item in items:
        ids, supervised = [], []

        def add(more, learn=False):
            ids.extend(more)  # noqa: B023
            supervised.extend([learn] * len(more))  # noqa: B023

        if stage == 1:
            caption = item["messages"][1]["content"][0]["text"]
            add([tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else [])
            add([model.config.image_token_id] * per_image)
            add(processor.encoder.text.encode(caption, "control") + [tokenizer.eos_token_id], True)
        else:
            short, flags = processor.encode_messages(item["messages"])
            for id, flag in zip(short, flags):
                add([id] * (per_image if id == model.config.image_token_id else 1), flag)
        pixels = (
            processor.image_processor(item["images"], return_tensors="pt")["pixel_values"] if item["images"] else []
        )
        loss, terms = transcribed(model, ids, supervised, pixels.double() if len(pixels) else [])
        total, count = total + loss.item(), count + terms
    encode = {"encode": encode_caption} if stage == 1 else {}
    batch = VLMDataCollator(processor, **encode)(items)
    batch["pixel_values"] = batch["pixel_values"].double()
    found = model(**batch).loss.item()
    assert abs(found - total / count) <= 1e-6 * abs(total / count)
    given = model(**batch, num_items_in_batch=torch.tensor(2 * count)).loss.item()
    assert abs(given - total / (2 * count)) <= 1e-6 * abs(total / count)


def test_a_message_weighs_what_it_says(composed, image):
    """The sum of the weighted terms over the number of all terms, with and without the logits nobody reads."""
    model, processor = composed
    model = model.double()
    items = tiny.ragged_dialogues(image)[:4]
    items[0]["messages"][1]["weight"] = 0.5
    items[2]["messages"][3]["weight"] = 3.0
    total, count = 0.0, 0
    for item in items:
        ids, weights = processor.expand_images(*processor.encode_messages(item["messages"]))
        pixels = item["images"] and processor.image_processor(item["images"], return_tensors="pt")["pixel_values"]
        for weight in set(weights) - {0.0}:
            learn = [w == weight for w in weights]
            loss, terms = transcribed(model, ids, learn, pixels.double() if len(pixels) else [])
            total, count = total + weight * loss.item(), count + terms
    batch = VLMDataCollator(processor)(items)
    batch["pixel_values"] = batch["pixel_values"].double()
    for keep in ({}, {"logits_to_keep": batch["shift_labels"] != IGNORE}):
        assert abs(model(**batch, **keep).loss.item() - total / count) <= 1e-6 * total / count
    batch["loss_weights"] = (batch["shift_labels"] != IGNORE).double()
    weighted = model(**batch).loss.item()
    del batch["loss_weights"]
    assert abs(model(**batch).loss.item() - weighted) <= 1e-6 * weighted


def test_a_batch_without_images_gives_every_learning_parameter_a_gradient(composed, image):
    """Or a distributed run would wait for those of the projector forever, and a frozen language model has none."""
    model, processor = composed
    apply_tuning(model, "last:1", "frozen")
    model.train()
    batch = tiny.collate(processor, [tiny.ragged_dialogues(image)[3]])
    assert "pixel_values" not in batch
    loss = model(**batch).loss
    loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all((p.grad == 0).all() for p in learning)
    assert loss.item() == model.eval()(**batch).loss.item()


def test_a_batch_with_nothing_supervised_has_loss_zero_with_a_graph(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:2])
    batch["labels"].fill_(IGNORE), batch["shift_labels"].fill_(IGNORE)
    for keep in ({}, {"logits_to_keep": batch["shift_labels"] != IGNORE}):
        model.zero_grad()
        loss = model(**batch, **keep).loss
        assert loss.item() == 0.0
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all((gradient == 0).all() for gradient in gradients)


def test_leaving_out_logits_changes_neither_loss_nor_gradients(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    results = []
    for keep in ({}, {"logits_to_keep": batch["shift_labels"] != IGNORE}):
        model.zero_grad()
        outputs = model(**batch, **keep)
        outputs.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((outputs.loss.item(), gradients, outputs.logits))
    (loss, gradients, everything), (found, again, kept) = results
    assert kept.shape[0] == (batch["labels"] != -100).sum() < everything[..., 0].numel()
    assert abs(found - loss) <= 1e-6 * loss and again.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(again[name], gradients[name], rtol=1e-5, atol=1e-7)


# -- through the Trainer ----------------------------------------------------------------------------------------------


def arguments(folder, **changes):
    settings = dict(
        output_dir=str(folder), use_cpu=True, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant",
        max_grad_norm=0.0, weight_decay=0.0, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_num_workers=0, logging_steps=1, bf16=False,
    )  # fmt: skip
    return VLMTrainingArguments(**{**settings, **changes})


def trainer_of(model, processor, items, folder, **changes):
    collator = VLMDataCollator(processor)
    return VLMTrainer(
        model=model, args=arguments(folder, **changes), processing_class=processor, data_collator=collator,
        train_dataset=items, eval_dataset=items,
    )  # fmt: skip


def one_step(pair, folders, items, folder, **changes):
    """Loss and weights after one step of plain gradient descent on all of the items, in float64."""
    model, processor = tiny.compose(*folders(pair), tiny.PAIRS[pair][2], dtype=torch.float64)
    apply_tuning(model, "last:1", "full")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = trainer_of(model, processor, items, folder, **changes)
    trainer.train()
    return trainer.state.log_history[0]["loss"], {n: p.detach().clone() for n, p in model.named_parameters()}


def test_targets_may_be_shifted_beforehand(composed, image):
    """Two shards of a sequence learn what the whole learns: the last token of the first shard has its target."""
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    labels, shifted = batch.pop("labels"), batch.pop("shift_labels")
    expected = model(**batch, labels=labels)
    found = model(**batch, shift_labels=shifted)
    assert torch.equal(found.loss, expected.loss) and found.get(CACHE) is None
    assert torch.equal(model(**batch, labels=torch.zeros_like(labels), shift_labels=shifted).loss, expected.loss)
    half, count = shifted.shape[1] // 2, (shifted != -100).sum()
    shards = shifted.clone(), shifted.clone()
    shards[0][:, half:], shards[1][:, :half] = -100, -100
    parts = [model(**batch, shift_labels=shard, num_items_in_batch=count).loss for shard in shards]
    torch.testing.assert_close(sum(parts), expected.loss)


def test_what_the_collator_shifts_costs_what_labels_alone_cost(composed, image):
    """Weights lie beside the targets that they belong to: those of the batch where they are predicted."""
    model, processor = composed
    items = tiny.ragged_dialogues(image)
    items[0]["messages"][1]["weight"], items[2]["messages"][3]["weight"] = 0.5, 3.0
    batch = VLMDataCollator(processor, pad_to_multiple_of=8)(items)
    labels, targets, weights = batch.pop("labels"), batch.pop("shift_labels"), batch.pop("loss_weights")
    assert torch.equal(targets[:, :-1], labels[:, 1:]) and (targets[:, -1] == IGNORE).all()
    assert torch.equal(weights > 0, targets != IGNORE) and {0.0, 0.5, 1.0, 3.0} == set(weights.unique().tolist())
    given = model(**batch, labels=labels, shift_labels=targets, loss_weights=weights).loss
    at_tokens = torch.nn.functional.pad(weights, (1, 0))[:, :-1]
    assert torch.equal(model(**batch, labels=labels, loss_weights=at_tokens).loss, given)
    assert not torch.equal(model(**batch, shift_labels=targets).loss, given)


@pytest.mark.parametrize("size, steps", [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_give_the_step_of_one_batch(pair, folders, image, tmp_path, size, steps):
    """The items have from one to twenty supervised tokens: a mean of means would be another number."""
    items = tiny.ragged_dialogues(image)
    whole = one_step(pair, folders, items, tmp_path, per_device_train_batch_size=8)
    parts = one_step(
        pair, folders, items, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
    )
    assert abs(parts[0] - whole[0]) <= 1e-5 * whole[0]
    for name, weight in whole[1].items():
        torch.testing.assert_close(parts[1][name], weight, rtol=1e-6, atol=1e-7)


def token_mean(model, processor, items):
    total, count = 0.0, 0
    for item in items:
        batch = tiny.collate(processor, [item])
        supervised = (batch["labels"][:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += model.eval()(**batch).loss.item() * supervised
        count += supervised
    return total / count


def test_the_evaluation_loss_is_the_mean_over_tokens_at_every_batch_size(composed, image, tmp_path):
    model, processor = composed
    items = tiny.ragged_dialogues(image)[:7]
    expected = token_mean(model, processor, items)
    for size in (1, 2, 3, 7):
        trainer = trainer_of(model, processor, items, tmp_path, per_device_eval_batch_size=size)
        found = trainer.evaluate()["eval_loss"]
        assert abs(found - expected) <= 1e-5 * expected, size
    assert abs(trainer.evaluate(metric_key_prefix="test")["test_loss"] - expected) <= 1e-5 * expected
    # The stock mean over batches is another number, so this was worth a test.
    means = [token_mean(model, processor, items[i : i + 2]) for i in (0, 2, 4, 6)]
    assert abs(sum(means) / 4 - expected) > 5e-5 * expected


def test_the_evaluation_loss_is_the_same_where_logits_are_read(composed, image, tmp_path):
    """With `compute_metrics` the logits of every position are computed and gathered."""
    model, processor = composed
    items = tiny.ragged_dialogues(image)[:5]
    expected = token_mean(model, processor, items)
    trainer = trainer_of(model, processor, items, tmp_path, per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda found: {"positions": found.predictions.shape[1]}
    metrics = trainer.evaluate()
    assert abs(metrics["eval_loss"] - expected) <= 1e-5 * expected
    assert metrics["eval_positions"] == max(tiny.collate(processor, [i])["input_ids"].shape[1] for i in items)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_label_smoothing_works_with_weights_too(composed, image, tmp_path, weight):
    """A tenth of each target is spread over the vocabulary, whatever the target weighs."""
    model, processor = composed
    items = tiny.ragged_dialogues(image)[:4]
    items[1]["messages"][1]["weight"] = weight
    batch = VLMDataCollator(processor)(items)
    with torch.no_grad():
        logs = log_softmax(model(**batch).logits, -1)
    targets, kept = batch["shift_labels"], batch["shift_labels"] != IGNORE
    plain = -logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    costs = (0.9 * plain + 0.1 * -logs.mean(-1)) * batch.get("loss_weights", 1.0)
    apply_tuning(model, "frozen", "frozen")
    trainer = trainer_of(model, processor, items, tmp_path, per_device_train_batch_size=4, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(costs[kept].mean().item(), rel=1e-5)


def test_smoothing_leaves_a_mixture_of_experts_its_balance_loss(folders, image, tmp_path):
    losses = {}
    for smoothing in (0.0, 1e-9):
        config = matrix.config_of(*matrix.LANGUAGE_MODELS["Mixtral"])
        config.output_router_logits, config.router_aux_loss_coef = True, 0.5
        tokenizer = tiny.byte_level_tokenizer(375)
        model = matrix.compose("ViT", config, None, tokenizer=tokenizer)
        processor = VLMProcessor.from_backbones(matrix.encoder_of("ViT"), config, model.config, tokenizer=tokenizer)
        apply_tuning(model, "frozen", "frozen")
        items = tiny.ragged_dialogues(image)[:4]
        trainer = trainer_of(
            model, processor, items, tmp_path, per_device_train_batch_size=4, label_smoothing_factor=smoothing
        )
        trainer.train()
        losses[smoothing] = trainer.state.log_history[0]["loss"]
        with torch.no_grad():
            plain = model.train()(**VLMDataCollator(processor)(items))
    assert losses[1e-9] == pytest.approx(losses[0.0], rel=1e-6)
    assert 0.5 * plain.aux_loss > 0.5  # what would be lost


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_batch_of_nothing_teaches_a_mixture_of_experts_nothing(padding_free):
    config = matrix.config_of(*matrix.LANGUAGE_MODELS["Mixtral"])
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    tokenizer = tiny.byte_level_tokenizer(375)
    model = matrix.compose("ViT", config, None, tokenizer=tokenizer).train()
    processor = VLMProcessor.from_backbones(matrix.encoder_of("ViT"), config, model.config, tokenizer=tokenizer)
    batch = VLMDataCollator(processor, padding_free=padding_free)([tiny.dialogue("a?", "b", "no such image.png")])
    loss = model(**batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert loss == 0 and gradients and not any(gradient.any() for gradient in gradients)


def test_the_smoothing_of_the_stock_trainer_which_does_not_shift_is_refused(composed, image, tmp_path):
    model, processor = composed
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "output_dir": str(tmp_path)}
    common = {"model": model, "data_collator": VLMDataCollator(processor)}
    common["train_dataset"] = tiny.ragged_dialogues(image)
    with pytest.raises(ValueError, match="use Duet's VLMTrainer, or leave out label_smoothing_factor"):
        Trainer(args=TrainingArguments(label_smoothing_factor=0.1, **settings), **common).train()
    Trainer(args=TrainingArguments(**settings), **common).train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_without_images_gives_every_learning_parameter_a_gradient(composed, image, tmp_path, smoothing):
    model, processor = composed
    apply_tuning(model, "last:1", "frozen")
    trainer = trainer_of(model, processor, [], tmp_path, label_smoothing_factor=smoothing)
    trainer.compute_loss(model.train(), tiny.collate(processor, [tiny.ragged_dialogues(image)[3]])).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


# -- over two processes -----------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
from tests import test_loss, tiny
from tests.test_loss import one_step, trainer_of
from PIL import Image
import numpy as np

def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 40, 3), dtype=np.uint8))

pair, vision, text, out = sys.argv[1:]
folders = lambda pair: (vision, text)
items = tiny.ragged_dialogues(image)
shared = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
loss, weights = one_step(pair, folders, items, Path(out) / "run", **shared)
model, processor = tiny.compose(vision, text, tiny.PAIRS[pair][2])
trainer = trainer_of(model, processor, items[:7], Path(out) / "run", ddp_backend="gloo", per_device_eval_batch_size=2)
evaluated = trainer.evaluate()["eval_loss"]
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    torch.save(weights, Path(out) / "weights.pt")
    (Path(out) / "losses.json").write_text(json.dumps([loss, evaluated]))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_give_the_step_and_the_evaluation_of_one(pair, folders, image, tmp_path):
    items = tiny.ragged_dialogues(image)
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*command, str(tmp_path / "two.py"), pair, *map(str, folders(pair)), str(tmp_path)],
        check=True, cwd=root, timeout=300, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    loss, weights = one_step(pair, folders, items, tmp_path / "one", per_device_train_batch_size=8)
    found, evaluated = json.loads((tmp_path / "losses.json").read_text())
    assert abs(found - loss) <= 1e-5 * loss
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-6, atol=1e-7)
    model, processor = tiny.compose(*folders(pair), tiny.PAIRS[pair][2])
    expected = token_mean(model, processor, items[:7])
    assert abs(evaluated - expected) <= 1e-5 * expected
