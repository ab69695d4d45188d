"""What gets an adapter, in any backbone: found from its modules, in the parts that are meant, reached by gradients."""

import pytest
import torch
from torch import nn

from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.matrix import LANGUAGE_MODELS
from tests.segments import model_of
from training_vlm.learning.adapters import composed
from training_vlm.learning.lora import adapt, find_targets
from training_vlm.learning.tuning import make_plan
from training_vlm.policy import TuningArguments


TEXT = TuningArguments(tune_text="lora")
SOME = ["GPT-2", "Mixtral"]
IDS = torch.arange(1, 41).view(1, -1)


def adapted(name, tuning=TEXT, sides=("text",)):
    torch.manual_seed(0)
    model = model_of(name)
    model.requires_grad_(False)
    found = adapt(model, tuning, list(sides), "base", None)
    torch.manual_seed(1)
    for key, parameter in found.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.05)
    return found.eval()


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS).logits


def check_family(name, folder):
    """Every adapter is reached, and the folder loads and merges to the same."""
    model_of(name).save_pretrained(folder / "base")
    model = adapted(name)
    model(input_ids=IDS, labels=IDS).loss.backward()
    unreached = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unreached
    model.save_pretrained(folder / "adapter")
    expected, scale = logits_of(model), logits_of(model).abs().max()
    assert (logits_of(composed(model_of(name))) - expected).abs().max() > 1e-3 * scale
    for merge in (False, True):
        found = VLMForConditionalGeneration.from_pretrained(folder / "adapter", merge_adapter=merge)
        assert (logits_of(found) - expected).abs().max() < 1e-5 * scale
    found.save_pretrained(folder / "merged")
    again = VLMForConditionalGeneration.from_pretrained(folder / "merged")
    assert (logits_of(again) - expected).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("name", SOME)
def test_adapters_of_any_language_model_are_reached_saved_and_merged(name, tmp_path):
    check_family(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in SOME])
def test_adapters_of_every_other_family_too(name, tmp_path):
    check_family(name, tmp_path)


def test_every_linear_layer_of_the_blocks_is_meant_and_no_other(composed):
    model, _ = composed
    for side, backbone in (("vision", model.model.vision_tower), ("text", model.model.language_model)):
        found = find_targets(model, [side])
        assert found.modules and not found.parameters
        modules = dict(model.named_modules())
        meant = {id(modules[name]) for name in found.modules}
        kinds = {"Linear", "Conv1D"}
        inside = {id(m) for block in blocks_of(backbone) for m in block.modules() if type(m).__name__ in kinds}
        assert meant == inside


def blocks_of(backbone):
    return max((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), key=len)


def test_a_name_means_the_declared_backbone_alone(folders):
    model, _ = tiny.compose(*folders("siglip-llama"))  # both have a q_proj
    found = find_targets(model, ["text"], ["q_proj", "layers.0.mlp.up_proj"])
    assert len(found.modules) == 4 and all(".language_model." in name for name in found.modules)
    model = adapt(model, TuningArguments(tune_text="lora", lora_target_modules=["q_proj"]), ["text"], "base", None)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 6 and all(".language_model." in name for name in names)
    with pytest.raises(DuetError, match="nothing is called c_attn in the vision encoder and language model; found lin"):
        find_targets(tiny.compose(*folders("siglip-llama"))[0], ["vision", "text"], ["q_proj", "c_attn"])


def test_a_pattern_and_all_linear_are_taken_as_peft_does(folders):
    model, _ = tiny.compose(*folders("siglip-llama"))
    found = find_targets(model, ["text"], [r"model\.language_model\.layers\.[02]\..*_proj"])
    assert len(found.modules) == 14 and not any("layers.1." in name for name in found.modules)
    everything = {n for n, module in model.named_modules() if isinstance(module, nn.Linear) and ".language_model." in n}
    assert set(find_targets(model, ["text"], ["all-linear"]).modules) == everything
    assert not find_targets(model_of("Mixtral"), ["text"], ["all-linear"]).parameters
    assert not find_targets(tiny.compose(*folders("vit-gpt2"), "cls")[0], ["vision"], [".*"]).parameters  # no experts
    for wrong in ("q_pro", "(", "layers.0"):
        with pytest.raises(DuetError, match="nothing is called"):
            find_targets(model, ["text"], [wrong])


def test_both_encoders_of_a_pair_are_adapted(folders):
    vision, text = folders("siglip-llama")
    model = VLMForConditionalGeneration.from_backbones((str(vision), str(folders("vit-gpt2")[0])), str(text))
    found = {model.get_submodule(name) for name in find_targets(model, ["vision"]).modules}
    first, second = (found & set(encoder.modules()) for encoder in model.model.vision_tower.encoders)
    assert len(first) == len(second) == 18 and found == first | second


def test_experts_in_one_tensor_are_adapted_without_dropout_and_what_cannot_be_is_a_line():
    model = model_of("Mixtral")
    found = find_targets(model, ["text"])
    assert len(found.parameters) == 6 and all(model.get_parameter(name).ndim == 3 for name in found.parameters)
    config = adapted("Mixtral").peft_config["default"]
    assert config.lora_dropout == 0 and adapted("Llama").peft_config["default"].lora_dropout == 0.05
    chosen = TuningArguments(tune_text="lora", lora_target_modules=["q_proj"], lora_dropout=0.1, use_dora=True)
    assert adapted("Mixtral", chosen).peft_config["default"].use_dora
    for settings, said in (({"use_dora": True}, "use_dora"), ({"lora_dropout": 0.1}, "lora_dropout=0.1")):
        with pytest.raises(DuetError, match=f"{said} cannot be: the experts .* lie in one tensor"):
            adapted("Mixtral", TuningArguments(tune_text="lora", **settings))
    only = TuningArguments(tune_text="lora", lora_target_modules=["gate_up_proj"])
    assert {name.rpartition(".")[2] for name in adapted("Mixtral", only).peft_config["default"].target_parameters} == {
        "gate_up_proj"
    }


def test_weights_that_their_owner_reads_itself_get_no_adapter():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.after = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    model = model_of("Llama")
    model.model.language_model.layers = nn.ModuleList([Block(), Block(), Block()])
    assert {name.rpartition(".")[2] for name in find_targets(model, ["text"]).modules} == {"after"}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral"])
def test_what_is_declared_with_adapters_moves_and_nothing_else(name, settings):
    if name == "Mixtral" and "use_dora" in settings:
        settings = {**settings, "lora_target_modules": ["q_proj"]}
    tuning = (
        TuningArguments(tune_vision="lora", tune_text="lora", **settings)
        if name != "Mixtral"
        else TuningArguments(tune_text="lora", **settings)
    )
    torch.manual_seed(0)
    model = adapt(model_of(name), tuning, ["vision", "text"], "base", None)
    plan = make_plan(model, tuning)
    plan.apply(model)
    before = {key: tensor.clone() for key, tensor in composed(model).named_parameters()}
    image = torch.randn(1, 3, 32, 32)
    ids = torch.cat([torch.full((1, model.config.image_seq_length), model.config.image_token_id), IDS], 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval()(input_ids=ids, pixel_values=image, labels=ids).loss.backward()
    optimizer.step()
    moved = {key for key, p in composed(model).named_parameters() if not torch.equal(p, before[key])}
    first_half = {key for key in plan.learning if ".lora_A." in key}  # moves once the second is no longer 0
    assert moved == plan.learning - first_half
    assert any(".lora_B." in key for key in moved) and any(".multi_modal_projector." in key for key in moved)
