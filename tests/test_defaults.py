"""A run of which nothing is said does what published recipes do, by stage and policy; what is said is left as it is."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig

import train_pretrain
import train_sft
from modeling_vlm import VLMForConditionalGeneration
from training_vlm import defaults
from training_vlm.defaults import FULL, decided, default_layer, rate_of_language_model
from training_vlm.load import choose_what_learns
from training_vlm.settings import parse_arguments
from training_vlm.stages import PRETRAIN, SFT
from training_vlm.training_arguments import VLMTrainingArguments


NEW = ["--vision_model", "vision", "--text_model", "text"]
GOES_ON = ["--model", "aligned"]
REST = ["--dataset", "data.json", "--output_dir", "out", "--use_cpu", "--bf16", "False"]

# stage, model, what is said -> words of encoder and language model; rate of the run, of projector, of encoder
EXPECTED = {
    "alignment": (PRETRAIN, NEW, [], ("frozen", "frozen"), (1e-3, None, None)),
    "alignment, partial": (PRETRAIN, NEW, ["--tune_text", "last:1"], ("frozen", "last:1"), (3e-4, 1e-3, None)),
    "alignment, encoder too": (PRETRAIN, NEW, ["--tune_vision", "full"], ("full", "frozen"), (1e-3, None, 5e-5)),
    "instruction tuning": (SFT, GOES_ON, [], ("frozen", "full"), (3e-4, None, None)),
    "instruction tuning of a new model": (SFT, NEW, [], ("frozen", "full"), (3e-4, 1e-3, None)),
    "projector alone": (SFT, GOES_ON, ["--tune_text", "frozen"], ("frozen", "frozen"), (1e-3, None, None)),
    "a rate that is said": (SFT, NEW, ["--learning_rate", "7e-5"], ("frozen", "full"), (7e-5, None, None)),
    "a rate of a part": (
        SFT, NEW, ["--projector_learning_rate", "4e-3"], ("frozen", "full"), (3e-4, 4e-3, None)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPECTED)
def test_each_stage_and_policy_has_its_published_rates(composed, case):
    stage, model, said, words, rates = EXPECTED[case]
    arguments = parse_arguments(stage, [*model, *said, *REST])
    choose_what_learns(stage, composed[0], arguments)
    tuning, training = arguments.tuning, arguments.training
    assert (tuning.tune_vision, tuning.tune_text) == words
    assert (training.learning_rate, tuning.projector_learning_rate, tuning.vision_learning_rate) == rates
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 0.03)
    for name in ("tune_vision", "tune_text", "learning_rate", "lr_scheduler_type"):
        assert tuning.sources[name] == "command line" if f"--{name}" in said else "default (" in tuning.sources[name]


def test_no_rate_is_announced_that_no_part_has(composed):
    said = ["--tune_text", "frozen", "--projector_learning_rate", "4e-3"]
    arguments = parse_arguments(SFT, [*GOES_ON, *said, *REST])
    choose_what_learns(SFT, composed[0], arguments)
    assert "learning_rate" not in " ".join(
        line for line in decided(arguments, composed[0].config) if not line.startswith("command line")
    )
    arguments = parse_arguments(SFT, [*GOES_ON, *said, "--tune_vision", "full", *REST])
    choose_what_learns(SFT, composed[0], arguments)
    assert (arguments.training.learning_rate, arguments.tuning.projector_learning_rate) == (5e-5, 4e-3)


def test_weights_in_few_bits_count_as_the_numbers_that_they_stand_for(composed, monkeypatch):
    class State:
        shape = torch.Size((40000, 2000))

    block = next(m for m in composed[0].model.language_model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    monkeypatch.setattr(block.weight, "quant_state", State(), raising=False)
    seen = []
    monkeypatch.setattr(defaults, "rate_of_language_model", lambda *args: seen.append(args) or FULL[0][1])
    choose_what_learns(SFT, composed[0], parse_arguments(SFT, [*GOES_ON, *REST]))
    others = sum(p.numel() for p in composed[0].model.language_model.parameters()) - block.weight.numel()
    assert [weights for _, weights, _ in seen] == [others + 80_000_000]


def test_rates_follow_the_size_of_the_language_model():
    sizes = {7e9: 2e-5, 1.1e9: 2e-5, 135e6: 5e-5, 5e6: 3e-4}
    assert {size: rate_of_language_model("full", size, False).value for size in sizes} == sizes
    assert {w: rate_of_language_model("full", w, True).value for w in (1e6, 150e6, 7e9)} == {
        1e6: 1e-3,
        150e6: 6e-4,
        7e9: 1.2e-4,
    }
    assert {w: rate_of_language_model("lora", w, False).value for w in (1e6, 7e9)} == {1e6: 2e-4, 7e9: 2e-4}


def test_a_schedule_that_is_said_has_no_warm_up_but_its_own():
    args = parse_arguments(SFT, [*NEW, *REST, "--lr_scheduler_type", "constant"]).training
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant", 0)
    args = parse_arguments(SFT, [*NEW, *REST, "--warmup_steps", "7"]).training
    assert (args.lr_scheduler_type, args.warmup_steps) == ("cosine", 7)


def test_a_warm_up_of_less_than_a_step_is_none():
    args = VLMTrainingArguments(output_dir="out", use_cpu=True, warmup_steps=0.03)
    assert [args.get_warmup_steps(steps) for steps in (1, 33, 34, 100, 1000)] == [0, 0, 2, 3, 30]


def test_what_is_pretrained_and_ends_in_a_norm_is_read_where_llava_reads_it(pair, folders, tmp_path):
    vision = str(folders(pair)[0])
    assert default_layer(vision, {}, "patch") == default_layer(vision, {}, "full") == -2
    assert default_layer(vision, {}, "cls") is None  # which LLaVA's layout has no name for
    assert default_layer((vision, vision), {}, "patch") is None
    assert default_layer(ViTConfig(), {}, "patch") is None  # it starts from scratch
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=8)).save_pretrained(tmp_path)
    assert default_layer(str(tmp_path), {}, "patch") is None  # its last norm is the pooler's


def run_stages(folders, image, tmp_path, capsys, *said):
    """Stage 1, then the command that it prints, with data in the place of its capitals."""
    vision, text = folders("siglip-llama")
    (tmp_path / "images").mkdir()
    for number in range(6):
        image(number).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "captions.json").write_text(
        json.dumps([{"image": f"{number}.png", "caption": f"a small cat {number}"} for number in range(6)])
    )
    (tmp_path / "talk.json").write_text(
        json.dumps(
            [{"image": f"{number}.png", "question": "what?", "answer": f"it is {number}"} for number in range(6)]
        )
    )
    common = [
        "--image_dir",
        str(tmp_path / "images"),
        "--eval_share",
        "0",
        "--use_cpu",
        "--bf16",
        "False",
        "--max_steps",
        "2",
    ]
    train_pretrain.main([
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(tmp_path / "captions.json"),
        "--output_dir", str(tmp_path / "aligned"), *common,
    ])  # fmt: skip
    first = capsys.readouterr().out
    words = next(line for line in first.splitlines() if "-m train_sft" in line).split()[3:]
    places = {"DIALOGUES": str(tmp_path / "talk.json"), "FOLDER": str(tmp_path / "assistant")}
    train_sft.main([*(places.get(word, word) for word in words), *common])
    return first, capsys.readouterr().out


def test_the_next_command_that_stage_1_prints_has_the_language_model_learn(folders, image, tmp_path, capsys):
    first, second = run_stages(folders, image, tmp_path, capsys)
    assert "default (LLaVA-1.5's pretrain.sh): tune_vision frozen, tune_text frozen, " in first
    assert "learning_rate 0.001" in first and "vision_feature_layer -2" in first
    assert "default (LLaVA-1.5's finetune.sh): tune_vision frozen, tune_text full" in second
    before, after = (VLMForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("aligned", "assistant"))
    assert before.config.vision_feature_layer == -2
    was = dict(before.named_parameters())
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, was[name])}
    assert any("language_model" in name for name in moved) and any("projector" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_the_built_in_recipe_and_the_seeds_name_what_they_read():
    for recipe, stage in (("coco_vit_gpt2", PRETRAIN), ("flickr30k_vit_distilgpt2", SFT)):
        assert parse_arguments(stage, ["--config", recipe, "--use_cpu"]).model.vision_feature_layer == "last"
    shapes = parse_arguments(PRETRAIN, ["--config", "shapes", "--use_cpu"])
    assert shapes.model.composition()["vision_feature_layer"] is None
    assert shapes.training.learning_rate == 1e-3 and shapes.tuning.sources["learning_rate"] == "shapes"


@pytest.mark.parametrize("said", ["soon", "1.5", "-"])
def test_a_layer_that_is_none_is_one_line(said):
    with pytest.raises(ValueError, match="vision_feature_layer.*expected -1, -2 and so on, or last"):
        parse_arguments(PRETRAIN, [*NEW, *REST, f"--vision_feature_layer={said}"])
