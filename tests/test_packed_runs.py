"""Runs without padding are the runs with it: losses of training and evaluation, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.test_trainer import trainer_of


ROOT = Path(__file__).parents[1]
FORMS = {"padded": (False, False), "packed": (True, False), "shared": (True, True)}


def items_of(image):
    """Ragged dialogues, two of them about one image; one has a weight, and from one nothing can be learned."""
    items = tiny.ragged_dialogues(image)
    items[0]["messages"][1]["weight"] = 0.5
    items[3]["messages"][1]["train"] = False
    items[4]["images"] = items[0]["images"]
    return items


def in_form(trainer, form):
    collator = trainer.data_collator
    collator.padding_free, collator.share_prefix = FORMS[form]
    return trainer


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_twenty_steps_without_padding_have_the_losses_of_those_with_it(pair, folders, image, tmp_path):
    settings = dict(
        dropout=0.0, max_steps=20, label_smoothing_factor=0.1, gradient_accumulation_steps=2,
        per_device_train_batch_size=3, train_sampling_strategy="sequential",
    )  # fmt: skip
    found = {}
    for form in FORMS:
        found[form] = losses(in_form(trainer_of(pair, folders, items_of(image), tmp_path, **settings), form))
    assert found["padded"][-1] < found["padded"][0]
    for form in FORMS:
        assert found[form] == pytest.approx(found["padded"], abs=3e-6)


@pytest.mark.parametrize("batch", [1, 3, 7, 20])
def test_the_evaluation_loss_is_the_same_padded_and_packed_for_every_batch_size(folders, image, tmp_path, batch):
    found = {}
    for form in FORMS:
        settings = dict(per_device_eval_batch_size=batch, label_smoothing_factor=0.1)
        trainer = in_form(trainer_of("siglip-llama", folders, items_of(image), tmp_path, **settings), form)
        for trainer.data_collator.account in (False, True):
            found[form, trainer.data_collator.account] = trainer.evaluate()["eval_loss"]
    expected = trainer_of("siglip-llama", folders, items_of(image), tmp_path).evaluate()["eval_loss"]
    assert list(found.values()) == pytest.approx([expected] * 6, rel=1e-6)


def test_rows_of_several_texts_all_count_in_the_evaluation_loss(folders, image, tmp_path):
    rows = [{"image": image(n), "caption": ["a cat", "two red mats", "it"][: n % 4]} for n in range(5)]
    found = []
    for batch in (2, 4):
        for form in FORMS:
            trainer = in_form(
                trainer_of("siglip-llama", folders, rows, tmp_path, per_device_eval_batch_size=batch), form
            )
            found.append(trainer.evaluate()["eval_loss"])
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6)


TWO = """
import json, sys
from pathlib import Path
from PIL import Image
from tests.test_packed_runs import FORMS, in_form, items_of, losses
from tests.test_trainer import trainer_of

root, found = Path(sys.argv[1]), {}
items = items_of(lambda seed: Image.new("RGB", (40, 28), (seed * 20, 99, 50)))
settings = dict(dropout=0.0, max_steps=4, train_sampling_strategy="sequential", ddp_backend="gloo")
for form in FORMS:
    for batch in (1, 3, 8):
        made = trainer_of("vit-gpt2", lambda pair: (root / "vision", root / "text"), items, root / "run",
                          per_device_eval_batch_size=batch, **settings)
        made.data_collator.account = True  # so that a row that is dropped keeps its place
        found[f"{form} {batch}"] = in_form(made, form).evaluate()["eval_loss"]
    found[form] = losses(made)
if made.args.process_index == 0:
    (root / f"found-{made.args.world_size}.json").write_text(json.dumps(found))
made.accelerator.wait_for_everyone()
made.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_evaluate_and_train_as_one_whatever_is_dropped_in_one_of_them(tmp_path):
    tiny.save_vit(tmp_path / "vision")
    tiny.save_gpt2(tmp_path / "text")
    (tmp_path / "run.py").write_text(TWO)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*command, "run.py", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"found-{processes}.json").read_text()) for processes in (1, 2))
    for form in FORMS:
        for batch in (1, 3, 8):
            name = f"{form} {batch}"
            assert two[name] == pytest.approx(one["padded 3"], rel=1e-6) == one[name], name
        assert two[form] == pytest.approx(two["padded"], abs=3e-6)
