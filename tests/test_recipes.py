"""Every recipe is what it names: parsed, composed in the published shape, trained for two steps on small stand-ins."""

import json

import pytest

import train_pretrain
import train_sft
from tests import recipes
from training_vlm.settings import RECIPES, parse_arguments, stages_of
from training_vlm.stages import PRETRAIN, SFT


MAINS = {PRETRAIN: train_pretrain.main, SFT: train_sft.main}
TESTED = sorted({recipe for recipe, _ in recipes.RUNS})
QUICK = ["coco_vit_gpt2", "nanovlm_222m"]
STEPS = [
    "--max_steps", "2", "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "2", "--logging_steps", "1",
    "--gradient_accumulation_steps", "2", "--max_new_tokens", "2", "--eval_share", "0", "--disable_tqdm", "True",
]  # fmt: skip
PARAMETERS = {  # of the published models, embeddings and head with them
    "openai-community/gpt2": 124_439_808,
    "distilbert/distilgpt2": 81_912_576,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "microsoft/phi-2": 2_779_683_840,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
}
TOKENS = {
    "coco_vit_gpt2": 1, "flickr30k_vit_distilgpt2": 1, "llava_15_7b": 576, "llava_15_7b_lora": 576,
    "llava_15_7b_qlora_24gb": 576, "nanovlm_222m": 49, "smolvlm_500m": 64, "tinyllava_3b": 729,
}  # fmt: skip


def slow_but(quick, values):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def stages(recipe):
    return [stage for name, stage in recipes.RUNS if name == recipe]


def test_every_recipe_but_the_built_in_one_is_tried_and_estimated():
    found = {path.stem for path in RECIPES.glob("*.yaml")} - {"shapes"}
    assert found == set(TESTED)
    for recipe in found:
        sections = stages_of(RECIPES / f"{recipe}.yaml")
        assert not sections or stages(recipe) == sections


@pytest.mark.parametrize("recipe", TESTED)
def test_a_recipe_is_composed_in_the_published_shape(recipe, tmp_path):
    stage = stages(recipe)[0]
    sketch = recipes.sketched(recipe, stage, tmp_path, samples=1_000)
    text = parse_arguments(stage, ["--config", recipe, "--use_cpu", "--bf16", "False"]).model.text_model
    parts = (sketch.model.model.language_model, sketch.model.get_output_embeddings())
    assert sum(p.numel() for p in {p for part in parts for p in part.parameters()}) == PARAMETERS[text]
    assert sketch.model.config.image_seq_length == TOKENS[recipe]
    assert {parameter.device.type for parameter in sketch.model.parameters()} == {"meta"}


@pytest.mark.parametrize("recipe", slow_but(QUICK, TESTED))
def test_a_recipe_trains_on_stand_ins_of_what_it_names(recipe, tmp_path):
    file = recipes.stand_in(recipe, tmp_path)
    for stage in stages(recipe):
        MAINS[stage](["--config", str(file), *STEPS])
        settings = parse_arguments(stage, ["--config", str(file), *STEPS])
        out = tmp_path / settings.training.output_dir
        state = json.loads((out / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
        account = json.loads((out / "data_report.json").read_text())
        assert account["total"]["learned from"] and not account["total"]["dropped"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe, stage", recipes.RUNS, ids=lambda value: getattr(value, "section", value))
def test_the_page_says_what_the_estimate_says(recipe, stage, tmp_path):
    page = recipes.PAGE.read_text(encoding="utf-8").splitlines()
    assert recipes.row_of(recipe, stage, tmp_path) in page


def test_the_readme_has_a_command_for_every_recipe():
    lines = (recipes.PAGE.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    for recipe in TESTED:
        (line,) = [line for line in lines if line.startswith("| ") and f"[{recipe}](recipes/{recipe}.yaml)" in line]
        assert f"train_{stages(recipe)[0].section}.py --config {recipe}" in line
