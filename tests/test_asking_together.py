"""Two processes ask every question once, and answer as one would; with weights that are cut over both as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


ROOT = Path(__file__).parents[1]

RUN = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from evaluation_vlm.asking import answer_questions, questions_of
from evaluation_vlm.metrics import choose_metrics
from evaluation_vlm.while_training import WhileTraining
from inference_vlm.answering import answer, greedy
from processing.batching.encoding import Encoder, encode_dialogue
from tests import tiny
from tests.test_trainer import trainer_of

root, PAIR = Path(sys.argv[1]), "siglip-llama"
draw = lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 40, 3), dtype=np.uint8))
items = [tiny.dialogue("what is it?" * (n % 3 + 1), "a cat", draw(n % 4)) for n in range(9)]
items += [tiny.dialogue("no picture here.", "yes"), tiny.dialogue("left of it?", "no", draw(1), draw(5))]

def lively(model):
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model

trainer = trainer_of(PAIR, lambda pair: (root / "vision", root / "text"), items, root / "out", ddp_backend="gloo",
                     eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=0.0, weight_decay=0.0)
assert trainer.args.world_size == 2
processor = trainer.processing_class
lively(trainer.model)
questions = questions_of(items, Encoder(processor, encode_dialogue, 200))
assert len(questions) == 11
settings = greedy(trainer.model, processor, 5)
expected = answer(trainer.model, processor, [question.prompt for question in questions], 4, settings)
assert len(set(expected)) > 3
trainer.examine = WhileTraining(trainer, questions, choose_metrics(questions), settings)
mine = []
trainer.model.model.vision_tower.register_forward_pre_hook(lambda module, given: mine.append(len(given[0])))
trainer.train()
said = [prediction.answer for prediction in trainer.examine.judgement.predictions]
assert said == expected, (said, expected)
values = [entry["eval_exact_match"] for entry in trainer.state.log_history if "eval_exact_match" in entry]
assert len(values) == 1 and gather_object([values]) == [values] * 2
if trainer.is_world_process_zero():
    lines = (root / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["generated"] for line in lines] == expected

model, _ = tiny.compose(root / "vision", root / "text")
lively(model).eval()
mesh = init_device_mesh("cpu", (2,))
for part in [*model.model.vision_tower.modules(), *model.model.language_model.modules()]:
    if type(part).__name__.endswith(("Layer",)):
        fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
for few in (questions, questions[-2:-1], questions[:1]):  # one without an image; one for two processes
    found = [p.answer for p in answer_questions(model, processor, few, 2, settings, in_step=True)]
    assert found == [expected[questions.index(question)] for question in few], found
assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
(root / f"done-{trainer.args.process_index}").touch()
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""

JUDGE = """
import os, sys
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import gather_object
from evaluation_vlm.judgement import judge_together
from evaluation_vlm.metrics import choose_metrics, named_metrics
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.questions import Question
from inference_vlm.answering import Prompt
from processing.data_error_vlm import DuetError

root, state = Path(sys.argv[1]), PartialState(cpu=True)
assert state.num_processes == 2
question = Question(Prompt([1], []), ("a",), "all", "all")
metrics = named_metrics(f"exact_match,{root}/own.py:noted")
found = judge_together([Prediction(question, "a"), Prediction(question, "b")], metrics)
assert (root / "noted").read_text() == "called "
assert gather_object([(found.values, found.scores["noted"].each)]) == [
    ({"exact_match": 0.5, "noted": 1.5}, [1.0, 2.0])
] * 2
choose_metrics([question, question._replace(given=("a",) * 10)], "vqa_accuracy")
try:
    judge_together([Prediction(question, "a")], metrics)
except DuetError as error:
    assert "failed on 1 predictions: ZeroDivisionError" in str(error), error
    (root / f"done-{state.process_index}").touch()
"""

OWN = """
from pathlib import Path

def noted(predictions):
    with Path(__file__).with_name("noted").open("a") as file:
        file.write("called ")
    if len(predictions) < 2:
        return 1 / 0
    return [1.0, 2.0]
"""


def run_by_two(tmp_path, text):
    (tmp_path / "run.py").write_text(text)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()
    return done.stderr


@pytest.mark.slow
def test_values_are_computed_by_one_process_and_what_fails_there_ends_all(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    said = run_by_two(tmp_path, JUDGE)
    assert said.count("vqa_accuracy judges 1 of 2 questions") == 1


@pytest.mark.slow
def test_two_processes_answer_every_question_once_and_as_one_would(tmp_path):
    tiny.save_siglip(tmp_path / "vision")
    tiny.save_llama(tmp_path / "text")
    run_by_two(tmp_path, RUN)
