"""Projectors: each computes what its name says, learns, is saved whole; one of the user's own travels with its model.

A model with a class of the user's own is loaded by one fresh process, in which neither this package nor the user's file
can be imported, from folders and from a stand-in for the Hub.
"""

import copy
import importlib.util
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlamaConfig, ViTConfig

import train_pretrain
import train_sft
from modeling_vlm import VLMConfig, VLMForConditionalGeneration, VLMModel
from modeling_vlm.configuration_vlm import PROJECTOR_SETTINGS
from modeling_vlm.own_projector_vlm import find_own_projector
from modeling_vlm.projector_vlm import PROJECTORS, build_projector
from processing import VLMDataCollator
from tests import tiny
from tests.fake_hub import hub_environment, start_fake_hub
from tests.isolated import WITHOUT_PACKAGE
from tests.test_generation import answers, encode, prompts
from tests.test_scripts import QUICK, data, refused, source  # noqa: F401  (fixtures)
from training_vlm import load
from training_vlm.inspect_data.__main__ import main as inspect_data
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.settings import parse_arguments
from training_vlm.stages import PRETRAIN
from training_vlm.training_arguments import VLMTrainingArguments


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "projectors.md"
KINDS = list(PROJECTOR_SETTINGS)
WIDTH = {"vision": 16, "text": 128}


def vit_config(kind, **changes):
    """A ViT of 4x4 patches; as wide as the language model where nothing changes the width."""
    width = WIDTH["text" if kind == "identity" else "vision"]
    return ViTConfig(**{
        "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": 32, "patch_size": 8, **changes,
    })  # fmt: skip


def llama_config():
    return LlamaConfig(
        hidden_size=WIDTH["text"], num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50,
        max_position_embeddings=256,
    )  # fmt: skip


def config_of(kind, settings=None, **options):
    return VLMConfig(
        vision_config=vit_config(kind), text_config=llama_config(), projector_type=kind, projector_settings=settings,
        **options,
    )  # fmt: skip


def compose(projector, **options):
    torch.manual_seed(0)
    kind = projector if projector in KINDS else None
    return VLMForConditionalGeneration.from_backbones(
        vit_config(kind), llama_config(), projector_type=projector, **options
    )


def inputs_of(model, images=2):
    config = model.config
    ids = torch.arange(5 + images * config.image_seq_length)[None] % 40
    ids[:, 1 : 1 + images * config.image_seq_length] = config.image_token_id
    pixels = torch.randn(images, 3, *config.image_size, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def logits_of(model):
    return model.eval()(**inputs_of(model)).logits


@pytest.fixture
def said():
    """What the libraries warn of while a test runs."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: lines + [str(one.message) for one in caught if one.category is not DeprecationWarning]
    for logger in loggers:
        logger.removeHandler(handler)


def in_one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


# -- what each computes -----------------------------------------------------------------------------------------------


def by_layer(layer, states):
    return torch.einsum("...i,oi->...o", states, layer.weight) + layer.bias


def gelu(states):
    return states * 0.5 * (1 + torch.erf(states / math.sqrt(2)))


def by_norm(norm, states):
    mean = states.mean(-1, keepdim=True)
    variance = (states - mean).square().mean(-1, keepdim=True)
    return (states - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def by_mlp(mlp, states):
    return by_layer(mlp.linear_2, gelu(by_layer(mlp.linear_1, states)))


def squares(features, grid, scale):
    """Of each square of patches its features, `(views, squares, rows in it, columns in it, hidden)`, row by row."""
    rows, columns = grid
    found = []
    for top in range(0, rows, scale):
        for left in range(0, columns, scale):
            places = [[(top + y) * columns + left + x for x in range(scale)] for y in range(scale)]
            found.append(features[:, places])
    return torch.stack(found, 1)


def by_pixel_shuffle(projector, features, grid):
    held = squares(features, grid, 2).permute(0, 1, 4, 2, 3)  # each feature with its rows and columns
    return by_layer(projector.linear, held.flatten(2))


def by_average_pool(projector, features, grid):
    return by_mlp(projector.mlp, squares(features, grid, 2).mean((2, 3)))


def by_resampler(projector, features, grid):
    tokens = by_norm(projector.norm, by_layer(projector.linear, features)).transpose(0, 1)
    queries = projector.queries[:, None].repeat(1, len(features), 1)
    for block in projector.blocks:
        weights = torch.cat([block.query.weight, block.key.weight, block.value.weight])
        biases = torch.cat([block.query.bias, block.key.bias, block.value.bias])
        read, _ = nn.functional.multi_head_attention_forward(
            by_norm(block.norm, queries), tokens, tokens, WIDTH["text"], WIDTH["text"] // 64, weights, biases, None,
            None, False, 0.0, block.output.weight, block.output.bias,
        )  # fmt: skip
        queries = queries + read
        queries = queries + by_mlp(block.mlp, by_norm(block.mlp_norm, queries))
    return by_norm(projector.final_norm, queries).transpose(0, 1)


def by_residual_block(block, patches):
    norm, narrow, _, around, _, widen = block.layers
    mean, variance = patches.mean((1, 2, 3), keepdim=True), patches.var((1, 2, 3), keepdim=True, unbiased=False)
    states = (patches - mean) / (variance + norm.eps).sqrt()
    states = states * norm.weight[:, None, None] + norm.bias[:, None, None]
    states = gelu(nn.functional.conv2d(states, narrow.weight, narrow.bias))
    rows, columns = states.shape[2:]
    padded, convolved = nn.functional.pad(states, (1, 1, 1, 1)), around.bias[:, None, None]
    for y in range(3):
        for x in range(3):
            moved = padded[:, :, y : y + rows, x : x + columns]
            convolved = convolved + torch.einsum("vchw,oc->vohw", moved, around.weight[:, :, y, x])
    return patches + nn.functional.conv2d(gelu(convolved), widen.weight, widen.bias)


def by_c_abstractor(projector, features, grid):
    enter = projector.enter
    patches = torch.einsum("vpi,oi->vop", features, enter.weight[:, :, 0, 0]) + enter.bias[:, None]
    patches = patches.unflatten(2, grid)
    for block in projector.before:
        patches = by_residual_block(block, patches)
    patches = squares(patches.flatten(2).transpose(1, 2), grid, 2).mean((2, 3)).transpose(1, 2)
    patches = patches.unflatten(2, (grid[0] // 2, grid[1] // 2))
    for block in projector.after:
        patches = by_residual_block(block, patches)
    return by_mlp(projector.readout, patches.flatten(2).transpose(1, 2))


REFERENCES = {
    "linear": lambda projector, features, grid: by_layer(projector.linear_1, features),
    "gelu_norm": lambda projector, features, grid: by_norm(
        projector.norm, gelu(by_layer(projector.linear_1, features))
    ),
    "mlp": lambda projector, features, grid: by_mlp(projector, features),
    "identity": lambda projector, features, grid: features,
    "pixel_shuffle": by_pixel_shuffle,
    "average_pool": by_average_pool,
    "resampler": by_resampler,
    "c_abstractor": by_c_abstractor,
}


def made(kind, settings=None, **options):
    """A projector alone, with weights that are nowhere 0 or 1, and features for it."""
    torch.manual_seed(3)
    config = config_of(kind, settings, **options)
    width = config.vision_config.hidden_size
    projector = build_projector(config, width, WIDTH["text"])
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    return projector, torch.randn(2, math.prod(config.patch_grid), width), config.patch_grid


def test_every_projector_has_its_settings_and_its_reference():
    assert list(PROJECTORS) == KINDS == list(REFERENCES)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_projector_computes_what_its_name_says(kind):
    """On a grid of 4 rows and 6 columns, so that one taken for the other would show."""
    projector, features, grid = made(kind, {"depth": 2} if kind == "resampler" else None, image_size=[32, 48])
    assert grid == (4, 6)
    expected = REFERENCES[kind](projector, features, grid)
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, settings, image_size, tokens",
    [
        *((kind, None, None, 16) for kind in ("linear", "gelu_norm", "mlp", "identity")),
        *((kind, None, [32, 48], 24) for kind in ("linear", "gelu_norm", "mlp", "identity")),
        *((kind, None, None, 4) for kind in ("pixel_shuffle", "average_pool", "c_abstractor")),
        *((kind, {"scale": 4}, None, 1) for kind in ("pixel_shuffle", "average_pool", "c_abstractor")),
        *((kind, {"scale": 1}, None, 16) for kind in ("pixel_shuffle", "average_pool", "c_abstractor")),
        *((kind, None, [32, 48], 6) for kind in ("pixel_shuffle", "average_pool", "c_abstractor")),
        ("resampler", None, None, 64),
        ("resampler", {"num_queries": 5}, None, 5),
        ("resampler", {"num_queries": 5, "depth": 2}, [32, 48], 5),
    ],
)
def test_the_tokens_of_a_view_follow_from_the_config(kind, settings, image_size, tokens):
    model = compose(kind, projector_settings=settings, image_size=image_size)
    assert model.config.image_seq_length == tokens
    with torch.no_grad():
        features = model.get_image_features(inputs_of(model)["pixel_values"]).pooler_output
    assert [tuple(view.shape) for view in features] == [(tokens, WIDTH["text"])] * 2


@torch.no_grad()
def test_a_token_of_the_c_abstractor_is_about_its_place():
    """Without what its blocks add, a token depends on its own square alone; with it, on what lies around."""
    projector, features, _ = made("c_abstractor")
    changed = features.clone()
    changed[:, 5] += 1.0  # row 1, column 1: the first square
    differs = (projector(changed) - projector(features)).abs().amax((0, 2))
    assert (differs > 0).all() and differs.argmax() == 0
    for block in (*projector.before, *projector.after):
        block.layers[-1].weight.zero_(), block.layers[-1].bias.zero_()
    differs = (projector(changed) - projector(features)).abs().amax((0, 2))
    assert differs[0] > 0 and not differs[1:].any()


@torch.no_grad()
def test_a_depth_is_a_number_of_blocks():
    for kind, blocks in (("resampler", lambda p: [p.blocks]), ("c_abstractor", lambda p: [p.before, p.after])):
        for depth in (1, 3):
            projector, _, _ = made(kind, {"depth": depth})
            assert [len(part) for part in blocks(projector)] == [depth] * len(blocks(projector))


@torch.no_grad()
def test_the_resampler_reads_tokens_in_any_order_and_number():
    projector, features, _ = made("resampler")
    order = torch.randperm(features.shape[1])
    torch.testing.assert_close(projector(features[:, order]), projector(features), rtol=1e-4, atol=1e-4)
    assert projector(features[:, :3]).shape == projector(features).shape


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_the_same_within_its_precision(kind, said):
    projector, features, _ = made(kind)
    expected = projector(features)
    with torch.autocast("cpu", torch.bfloat16):
        cast = projector(features).float()
    found = projector.to(torch.bfloat16)(features.bfloat16())
    assert found.dtype == torch.bfloat16
    for one in (cast, found.float()):
        assert (one - expected).abs().max() < 0.05 * expected.abs().max()
    model = compose(kind, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16} and logits_of(model).isfinite().all()
    assert said() == []


# -- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_projector_learns_beside_frozen_backbones(kind):
    model = compose(kind)
    apply_tuning(model, "frozen", "frozen")
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    projector = model.model.multi_modal_projector
    assert learning.keys() == {f"model.multi_modal_projector.{name}" for name, _ in projector.named_parameters()}
    assert bool(learning) == (kind != "identity")
    if learning:
        inputs = inputs_of(model)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learning.values())
        # A bias shared by all keys changes no attention.
        still = {name for name, parameter in learning.items() if not parameter.grad.any()}
        assert {name for name in still if not name.endswith("key.bias")} == set()


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_projector_is_loaded_as_it_was(kind, size, tmp_path, said):
    model = compose(kind, image_size=[32, 48])
    expected = logits_of(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or size != "5GB"
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or size == "5GB"
    again, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.projector_settings == model.config.projector_settings
    assert torch.equal(logits_of(again), expected)
    assert said() == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_a_projector_that_a_checkpoint_lacks_starts_as_a_new_one(kind, tmp_path):
    model = compose(kind)
    rest = {name: tensor for name, tensor in model.state_dict().items() if "multi_modal_projector" not in name}
    model.save_pretrained(tmp_path, state_dict=rest)
    torch.manual_seed(1)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, again):
        for name, tensor in one.model.multi_modal_projector.named_parameters():
            if tensor.ndim > 1:
                assert 0.018 < tensor.std() < 0.022 and tensor.mean().abs() < 0.002, name
            else:
                assert (tensor == (1.0 if name.endswith("weight") else 0.0)).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_each_prompt_writes_alone(kind, folders, image):
    settings = {"resampler": {"num_queries": 5}}.get(kind)
    model, processor = tiny.compose(*folders("siglip-llama"), projector_type=kind, projector_settings=settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    asked = prompts(image)[:3]
    alone = [answers(model, encode(processor, [one]))[0] for one in asked]
    assert len({tuple(row) for row in alone}) > 1
    assert answers(model, encode(processor, asked)) == alone


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_are_not_given_are_written_down(kind):
    assert config_of(kind).projector_settings == PROJECTOR_SETTINGS[kind]
    for name in PROJECTOR_SETTINGS[kind]:
        assert config_of(kind, {name: 7}).projector_settings == {**PROJECTOR_SETTINGS[kind], name: 7}


@pytest.mark.parametrize(
    "kind, settings, says",
    [
        ("mlp", {"scale": 2}, "'scale', which mlp does not take; it takes none"),
        ("resampler", {"scale": 2}, "it takes num_queries, depth"),
        ("c_abstractor", {"depht": 2}, "'depht', which c_abstractor does not take; it takes scale, depth"),
        ("resampler", {"depth": 0}, "depth=0; expected a whole number from 1"),
        ("resampler", {"depth": -1}, "depth=-1"),
        ("pixel_shuffle", {"scale": 1.5}, "scale=1.5"),
        ("pixel_shuffle", {"scale": "2"}, "scale='2'"),
        ("pixel_shuffle", {"scale": True}, "scale=True"),
        ("pixel_shuffle", {"scale": None}, "scale=None"),
        ("pixel_shuffle", ["scale"], "projector_settings=['scale']"),
        ("pixel_shuffle", 2, "projector_settings=2"),
        ("conv", None, "linear, gelu_norm, mlp, identity, pixel_shuffle, average_pool, resampler, c_abstractor"),
        ("my_projector.py", None, "FILE.py:CLASS"),
        ("path/my_projector.py:Mine", None, "FILE.py:CLASS"),
        (None, None, "None is not known"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(kind, settings, says):
    with pytest.raises(ValueError) as error:
        config_of(kind, settings)
    in_one_line(error, says)


@pytest.mark.parametrize(
    "kind, options, says",
    [
        ("identity", {}, "16 wide, the embeddings 128"),
        ("pixel_shuffle", {"settings": {"scale": 3}}, "scale=3 does not fit the encoder's grid of 4x4"),
        ("average_pool", {"image_size": [32, 24]}, "grid of 4x3"),
        ("c_abstractor", {"vision_feature_select_strategy": "full"}, "not 'full'"),
        ("pixel_shuffle", {"vision_feature_select_strategy": "cls"}, "not 'cls'"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused_in_one_line(kind, options, says):
    config = config_of(kind, **options)
    with pytest.raises(ValueError) as error:
        build_projector(config, WIDTH["vision"], WIDTH["text"])
    in_one_line(error, f"projector_type={kind}", says)


def parsed(*arguments):
    model_args, *_ = parse_arguments(PRETRAIN, [*arguments, "--output_dir", "somewhere", "--use_cpu"])
    return model_args


def test_settings_come_from_the_shell_and_from_yaml(tmp_path):
    given = parsed("--projector_type", "c_abstractor", "--projector_settings", "depth=1").composition()
    assert (given["projector_type"], given["projector_settings"]) == ("c_abstractor", {"depth": 1})
    given = parsed("--projector_type", "c_abstractor", "--projector_settings", " scale=2, depth=3")
    assert given.composition()["projector_settings"] == {"scale": 2, "depth": 3}
    (tmp_path / "run.yaml").write_text("projector_type: resampler\nprojector_settings: {num_queries: 8, depth: 2}\n")
    given = parsed("--config", str(tmp_path / "run.yaml"))
    assert given.composition()["projector_settings"] == {"num_queries": 8, "depth": 2}
    given = parsed("--config", str(tmp_path / "run.yaml"), "--projector_settings", "num_queries=3")
    assert given.composition()["projector_settings"] == {"num_queries": 3}
    assert parsed().composition()["projector_settings"] is None


@pytest.mark.parametrize("given", ["depth", "depth=", "depth=x", "depth=1.5", "depth=-1", "depth=1,", "depth=²", ""])
def test_settings_in_the_shell_that_are_no_numbers_are_refused_in_one_line(given):
    with pytest.raises(ValueError) as error:
        parsed("--projector_settings", given)
    in_one_line(error, repr(given), "scale=2,depth=3")


# -- one of the user's own --------------------------------------------------------------------------------------------


MINE = '''"""A projector of a user's own, that notes where it is run."""

import os

import torch
from torch import nn

from .my_layers import Gate

if "DUET_MARKER" in os.environ:
    with open(os.environ["DUET_MARKER"], "a") as file:
        file.write(__file__ + chr(10))


class MyProjector(nn.Module):
    def __init__(self, config, vision_size, text_size):
        super().__init__()
        self.linear = nn.Linear(vision_size, text_size)
        nn.init.eye_(self.linear.weight)
        self.gate = Gate(text_size, config.projector_settings.get("start", 3))
        self.register_buffer("shift", torch.arange(text_size) / 10.0)

    def forward(self, features):
        return self.gate(self.linear(features))[:, :6] + self.shift
'''

LAYERS = """import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self, size, start):
        super().__init__()
        self.factor = nn.Parameter(torch.full((size,), float(start)))

    def forward(self, states):
        return states * self.factor
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine()` is a user's file and the helper beside it; what it notes when it is run is in `mine.ran()`."""
    monkeypatch.setenv("DUET_MARKER", str(tmp_path / "marker"))
    own_code = f"{MINE}# {tmp_path}\n"  # code that no other test has run, so that it cannot be known already

    def write(folder="code", code=own_code, layers=LAYERS):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "my_layers.py").write_text(layers)
        file = tmp_path / folder / "my_projector.py"
        file.write_text(code)
        return file

    write.ran = lambda: (tmp_path / "marker").read_text().splitlines() if (tmp_path / "marker").exists() else []
    return write


def own(file, **options):
    return compose(f"{file}:MyProjector", **options)


def test_a_class_of_ones_own_is_used_as_it_is(mine):
    """Its settings reach it, and what it starts from is not drawn anew."""
    model = own(mine(), projector_settings={"start": 5, "anything": "else"})
    projector = model.model.multi_modal_projector
    assert type(projector).__name__ == "MyProjector" and model.config.projector_type == "my_projector.MyProjector"
    assert torch.equal(projector.linear.weight, torch.eye(WIDTH["text"], WIDTH["vision"]))
    assert (projector.gate.factor == 5).all()
    assert model.config.image_seq_length == 6
    apply_tuning(model, "frozen", "frozen")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = ("linear.weight", "linear.bias", "gate.factor")
    assert learning == {f"model.multi_modal_projector.{name}" for name in names}
    assert own(mine(), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("given", ["file", "class", "home"])
def test_a_class_of_ones_own_is_saved_with_its_files(given, mine, tmp_path, monkeypatch):
    file = mine()
    projector = f"{file}:MyProjector"
    if given == "home":
        monkeypatch.setenv("HOME", str(tmp_path))
        projector = "~/code/my_projector.py:MyProjector"
    if given == "class":
        monkeypatch.setitem(sys.modules, "code_of_a_user", types.ModuleType("code_of_a_user"))
        sys.modules["code_of_a_user"].__path__ = [str(file.parent)]
        spec = importlib.util.spec_from_file_location("code_of_a_user.my_projector", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        monkeypatch.delitem(sys.modules, "code_of_a_user.my_layers", raising=False)
        projector = module.MyProjector
    model = compose(projector)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "out")
    for name in ("my_projector.py", "my_layers.py"):
        assert (tmp_path / "out" / name).read_bytes() == (file.parent / name).read_bytes()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["projector_type"] == "my_projector.MyProjector" and not any(key.startswith("_proj") for key in saved)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits_of(again), expected)


def test_code_of_a_checkpoint_is_run_only_where_the_user_lets_it(mine, tmp_path, said):
    model = own(mine())
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "out")
    before = mine.ran()
    assert before
    loaders = (VLMForConditionalGeneration, VLMModel, AutoModel, AutoModelForImageTextToText)
    for loader in loaders:
        for consent in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
            with pytest.raises(ValueError) as error:
                loader.from_pretrained(tmp_path / "out", **consent)
            in_one_line(error, "my_projector.MyProjector", str(tmp_path / "out"), "trust_remote_code=True")
    for loader in (VLMConfig, AutoConfig):  # neither does reading and saving a config run anything
        loader.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "config")
    assert mine.ran() == before and said() == []
    for loader in loaders:
        again = loader.from_pretrained(tmp_path / "out", trust_remote_code=True)
        if loader is not VLMModel:
            assert torch.equal(logits_of(again), expected)
    assert len(mine.ran()) > len(before)
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # consent is for one loading
        VLMForConditionalGeneration(VLMConfig.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("inside", [False, True], ids=["outermost", "as an encoder"])
@pytest.mark.parametrize("how", ["its file", "its path"])
def test_a_config_cannot_name_code_that_is_run_without_asking(how, inside, mine, tmp_path):
    """Only the user can name a file of this machine; a checkpoint could guess where its own files end up."""
    model = own(mine())
    model.save_pretrained(tmp_path / "out")
    before = mine.ran()
    file, settings = tmp_path / "out" / "my_projector.py", json.loads((tmp_path / "out" / "config.json").read_text())
    named = {
        "its file": {"projector_type": "my_projector.MyProjector", "_projector_file": str(file)},
        "its path": {"projector_type": f"{file}:MyProjector"},
    }[how]
    if inside:
        settings["vision_config"] = {**settings, **named}
        settings["projector_type"] = "mlp"
    else:
        settings |= named
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        VLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    in_one_line(error, "my_projector")
    assert before and mine.ran() == before


def test_a_config_is_saved_alone_with_the_file(mine, tmp_path):
    file = mine()
    model, code = own(file), file.read_text()
    model.config.save_pretrained(tmp_path / "composed")
    VLMConfig.from_pretrained(tmp_path / "composed").save_pretrained(tmp_path / "loaded")
    VLMConfig.from_pretrained(tmp_path / "loaded").save_pretrained(tmp_path / "loaded")  # where it is already
    name, path = find_own_projector(f"{file}:MyProjector")
    config = VLMConfig(vision_config=vit_config(None), text_config=llama_config(), projector_type=name)
    config._projector_file = path
    config.save_pretrained(tmp_path / "made")
    config.save_pretrained(file.parent)  # beside the user's own file
    for folder in ("composed", "loaded", "made", "code"):
        assert (tmp_path / folder / "my_projector.py").read_text() == code, folder
        assert (tmp_path / folder / "my_layers.py").read_text() == LAYERS, folder


def test_configs_are_copied_pickled_and_shown_as_ever(mine):
    model = own(mine())
    config = model.config
    for one in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert one == config and one.to_dict() == config.to_dict()
        torch.manual_seed(0)
        assert VLMForConditionalGeneration(one).model.multi_modal_projector.gate.factor[0] == 3
    assert not [key for key in config.to_dict() if key.startswith("_proj")]
    assert not [key for key in config.to_diff_dict() if key.startswith("_proj")]
    assert '"_projector' not in config.to_json_string() + repr(config)
    assert VLMConfig._projector_file is None and config_of("mlp")._projector_file is None
    assert not any(str(mine().parent) in path for path in sys.path)


def test_two_classes_of_ones_own_live_side_by_side(mine, tmp_path):
    """Files of one name in two folders, and one file before and after it was edited, also where only its helper was."""
    one = own(mine())
    two = own(mine("other", code=MINE.replace("[:, :6]", "[:, :3]")))
    three = own(mine(code=MINE.replace("[:, :6]", "[:, 1:]")))
    four = own(mine(layers=LAYERS.replace("* self", "- self")))
    models, tokens = {"one": one, "two": two, "three": three, "four": four}, [6, 3, 15, 6]
    assert [model.config.image_seq_length for model in models.values()] == tokens
    expected = {name: logits_of(model) for name, model in models.items()}
    assert not torch.equal(expected["one"], expected["four"])
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name in models:
        again = VLMForConditionalGeneration.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(logits_of(again), expected[name])


def test_an_adapter_is_merged_into_a_model_with_a_class_of_ones_own(mine, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = own(mine())
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits_of(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "a file that does not exist": ("nowhere.py:MyProjector", None, "no such"),
    "a folder": ("code:MyProjector", None, "no such"),
    "no Python file": ("mine.txt:MyProjector", MINE, "no such"),
    "no class": ("mine.py:", MINE, "FILE.py:CLASS"),
    "a class in a class": ("mine.py:A.B", MINE, "FILE.py:CLASS"),
    "a name of Duet's": ("mine_vlm.py:MyProjector", MINE, "mine_vlm.py", "end in _vlm.py"),
    "no Python name": ("my-own.py:MyProjector", MINE, "my-own.py", "Python name"),
    "a package's file": ("__init__.py:MyProjector", MINE, "__init__.py"),
    "a class that is not in it": ("mine.py:Mine", MINE, "mine.Mine", "'Mine'"),
    "a class from elsewhere": ("mine.py:Gate", MINE, "mine.Gate", "itself defines"),
    "no module": ("mine.py:Odd", "class Odd:\n    pass\n", "mine.Odd", "torch.nn.Module"),
    "no class but a function": ("mine.py:odd", "def odd(*args):\n    pass\n", "mine.odd", "torch.nn.Module"),
    "a syntax error": ("mine.py:MyProjector", MINE + "\nclass:\n", "mine.py", "SyntaxError"),
    "no text": ("mine.py:MyProjector", "\x00", "mine.py"),
    "a missing import": ("mine.py:MyProjector", "import nothing_of_the_kind\n" + MINE, "nothing_of_the_kind"),
    "a missing helper": ("mine.py:MyProjector", MINE.replace("my_layers", "no_layers"), "no_layers.py"),
    "a helper that would not travel": ("mine.py:MyProjector", "import my_layers\n" + MINE, "my_layers", "from .FILE"),
    "an import of Duet": ("mine.py:MyProjector", "import modeling_vlm\n" + MINE, "modeling_vlm", "from .FILE"),
    "a fault when it is run": ("mine.py:MyProjector", MINE + "\nUNKNOWN\n", "mine.MyProjector", "NameError"),
    "another signature": (
        "mine.py:MyProjector", MINE.replace("config, vision_size, text_size", "vision_size, text_size"),
        "(config, vision_size, text_size)", "TypeError",
    ),
    "no __init__": (
        "mine.py:Bare", "from torch import nn\nclass Bare(nn.Module):\n    pass\n", "mine.Bare", "TypeError",
    ),
    "a fault of its own": (
        "mine.py:MyProjector", MINE.replace('.get("start", 3)', '["start"]'), "KeyError: 'start'",
    ),
    "another width": ("mine.py:MyProjector", MINE.replace("[:, :6] + self.shift", "[..., :5]"), "(2, 16, 5)", "128"),
    "another rank": ("mine.py:MyProjector", MINE.replace("[:, :6]", "[:, 0]"), "(2, 128)", "(views, tokens, 128)"),
    "views made one": ("mine.py:MyProjector", MINE.replace("[:, :6]", "[:1]"), "(1, 16, 128)"),
    "a tuple": ("mine.py:MyProjector", MINE.replace("+ self.shift", ", self.shift"), "tuple"),
    "a fault in forward": ("mine.py:MyProjector", MINE.replace("[:, :6]", ".nothing"), "(2, 16, 16)", "nothing"),
    "a plain tensor": (
        "mine.py:MyProjector", MINE.replace('self.register_buffer("shift", ', "self.shift = (").replace("10.0)", "10)"),
        "a tensor shift", "register_buffer",
    ),
    "a buffer that is not saved": (
        "mine.py:MyProjector", MINE.replace("/ 10.0)", "/ 10.0, persistent=False)"), "a tensor shift",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_class_that_cannot_be_used_is_refused_in_one_line(case, tmp_path, mine, monkeypatch):
    monkeypatch.chdir(mine().parent)
    given, code, *says = REFUSED[case]
    if code is not None:
        Path(given.rpartition(":")[0]).write_text(code)
    with pytest.raises(ValueError) as error:
        compose(given)
    in_one_line(error, *says)


def test_a_class_without_a_file_is_refused_in_one_line():
    class Nested(nn.Linear):
        pass

    script = type("InScript", (nn.Linear,), {"__module__": "__main__"})
    lost = type("Lost", (nn.Linear,), {"__module__": "a_module_that_is_gone"})
    for projector in (Nested, script, lost):
        with pytest.raises(ValueError) as error:
            compose(projector)
        in_one_line(error, projector.__name__, "file")
    for projector in (nn.Linear(2, 2), 3, None):
        with pytest.raises(ValueError) as error:
            compose(projector)
        in_one_line(error, repr(projector), "FILE.py:CLASS")


def test_a_name_alone_finds_no_file():
    with pytest.raises(ValueError) as error:
        compose("my_projector.MyProjector")
    in_one_line(error, "my_projector.MyProjector", "names no file", "FILE.py:CLASS")


# -- where neither the package nor the user's file is -----------------------------------------------------------------


CHILD = """
import json, traceback
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

work, names = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
found = {}
for name in names:
    try:
        place, revision = name.split("@") if "@" in name else (work / name, None)
        for generation in range(3 if revision is None else 2):
            options = {"revision": revision} if generation == 0 and revision else {}
            model = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True, **options).eval()
            batch = torch.load(work / "batch.pt")
            with torch.no_grad():
                torch.save(model(**batch).logits, work / f"{name.replace('/', ' ')} {generation}.pt")
            place = work / f"again {name.replace('/', ' ')} {generation}"
            model.save_pretrained(place)
            assert {"my_projector.py", "my_layers.py"} <= {path.name for path in place.iterdir()}
        found[name] = type(model.model.multi_modal_projector).__module__
    except Exception:
        found[name] = traceback.format_exc()
(work / "found.json").write_text(json.dumps(found))
"""
SAVED = ["composed", "checkpoint-1", "end_of_training", "me/own@v1"]


@pytest.fixture(scope="module")
def elsewhere(folders, tmp_path_factory):
    """What a fresh process made of folders and of a Hub repository: logits of each generation, and those expected."""
    work = tmp_path_factory.mktemp("own")
    code = work / "code"
    code.mkdir()
    (code / "my_projector.py").write_text(MINE)
    (code / "my_layers.py").write_text(LAYERS)
    picture = torch.zeros(40, 28, 3, dtype=torch.uint8).numpy()
    from PIL import Image

    items = [tiny.dialogue("what is it?", "a cat", Image.fromarray(picture))] * 2
    model, processor = tiny.compose(*folders("siglip-llama"), projector_type=f"{code / 'my_projector.py'}:MyProjector")
    batch = tiny.collate(processor, items)
    batch.pop("labels")
    torch.save(batch, work / "batch.pt")
    expected = {}

    def note(name):
        with torch.no_grad():
            expected[name] = model.eval()(**batch).logits

    model.save_pretrained(work / "composed")
    note("composed")
    hub = work / "hub" / "models" / "me"
    model.save_pretrained(hub / "own@v1")
    note("me/own@v1")
    model.save_pretrained(hub / "own")
    (hub / "own" / "my_projector.py").write_text("raise RuntimeError('not this revision')")
    apply_tuning(model, "frozen", "frozen")
    arguments = VLMTrainingArguments(
        output_dir=str(work), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=1,
        save_strategy="steps", save_steps=1, learning_rate=1e-2, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = VLMTrainer(
        model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor),
        train_dataset=items,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(work / "end_of_training"))
    note("checkpoint-1")
    note("end_of_training")
    for file in code.iterdir():
        file.unlink()
    (work / "child.py").write_text(WITHOUT_PACKAGE + CHILD)
    with start_fake_hub(work / "hub") as url:
        environment = hub_environment(url, work / "home") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", str(work / "child.py"), str(work), json.dumps(SAVED)]
        done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return work, expected, json.loads((work / "found.json").read_text())


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_loads_and_saves_again_where_neither_package_nor_file_is(name, elsewhere):
    work, expected, found = elsewhere
    assert found[name].startswith("transformers_modules.") and found[name].endswith(".my_projector"), found[name]
    for generation in range(2 if "@" in name else 3):
        logits = torch.load(work / f"{name.replace('/', ' ')} {generation}.pt")
        assert (logits - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()


def test_the_folders_are_different_models(elsewhere):
    _, expected, _ = elsewhere
    assert torch.equal(expected["composed"], expected["me/own@v1"])
    assert not torch.equal(expected["composed"], expected["checkpoint-1"])


# -- in the scripts ---------------------------------------------------------------------------------------------------


def test_both_stages_run_with_a_class_of_ones_own(mine, folders, source, tmp_path, capsys):  # noqa: F811
    """Stage 1 from the file, resumed from its checkpoint, then stage 2 from the folder alone."""
    file, (vision, text) = mine(), folders("siglip-llama")
    aligned, assistant = tmp_path / "aligned", tmp_path / "assistant"
    first = [
        "--vision_model", str(vision), "--text_model", str(text), *source("captions"), *QUICK, "--save_strategy",
        "steps", "--save_steps", "1", "--projector_type", f"{file}:MyProjector", "--projector_settings", "start=2",
        "--output_dir", str(aligned),
    ]  # fmt: skip
    train_pretrain.main(first)
    assert "my_projector.MyProjector" in capsys.readouterr().out
    train_pretrain.main([*first, "--max_steps", "3", "--resume_from_checkpoint", "last"])
    assert json.loads((aligned / "trainer_state.json").read_text())["global_step"] == 3
    code = file.read_text()
    file.unlink()
    train_sft.main(["--model", str(aligned), *source("dialogues"), *QUICK, "--output_dir", str(assistant)])
    assert (assistant / "my_projector.py").read_text() == code and (assistant / "my_layers.py").read_text() == LAYERS
    capsys.readouterr()
    inspect_data(["--model", str(aligned), *source("dialogues")])
    assert "6 for 1 image" in capsys.readouterr().out


def test_data_is_shown_for_a_class_of_ones_own_that_is_yet_to_be_composed(mine, folders, source, capsys):  # noqa: F811
    vision, text = map(str, folders("siglip-llama"))
    own_class = ["--projector_type", f"{mine()}:MyProjector"]
    inspect_data(["--vision_model", vision, "--text_model", text, *source("dialogues"), *own_class])
    assert "6 for 1 image" in capsys.readouterr().out


def test_scripts_trust_folders_and_ask_for_consent_to_the_hubs_code(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(VLMForConditionalGeneration, "from_pretrained", lambda name, **kwargs: asked.update(kwargs))
    monkeypatch.setattr(load.VLMProcessor, "from_pretrained", lambda *args, **kwargs: None)
    for name, arguments, trusted in (
        (str(tmp_path), [], True), ("me/own", [], False), ("me/own", ["--trust_remote_code"], True)
    ):  # fmt: skip
        load._load_composed(parsed("--model", name, *arguments), torch.float32, merge=False)
        assert asked["trust_remote_code"] is trusted


def test_a_run_in_which_nothing_would_learn_is_refused(folders, source, refused, tmp_path):  # noqa: F811
    vision, text = map(str, folders("siglip-llama"))
    common = [
        "--vision_model", vision, "--text_model", text, *source("captions"), *QUICK, "--projector_type", "identity",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    line = refused(train_pretrain.main, common)
    assert "nothing would learn" in line and "identity" in line and "--tune_text" in line
    train_pretrain.main([*common, "--tune_text", "last:1"])


# -- the page ---------------------------------------------------------------------------------------------------------


def table_row(kind):
    """What the page says of a projector in figures: settings, tokens of two grids, parameters."""
    settings = ", ".join(f"{name}={value}" for name, value in PROJECTOR_SETTINGS[kind].items())
    width, tokens = 576 if kind == "identity" else 768, []
    for side in (14, 24):
        vision = ViTConfig(hidden_size=width, image_size=side * 16, patch_size=16)
        config = VLMConfig(vision_config=vision, text_config=llama_config(), projector_type=kind)
        with torch.device("meta"):
            projector = build_projector(config, width, 576)
            tokens.append(str(projector(torch.empty(1, side * side, width)).shape[1]))
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    return settings, *tokens, f"{parameters:,}"


def test_the_table_says_what_the_code_does():
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = tuple(cells[3:])
    assert rows == {kind: table_row(kind) for kind in KINDS}


def test_the_readme_lists_every_projector_and_the_page():
    sentence = re.search(r"The projectors are (.+?);", (ROOT / "README.md").read_text(), re.S)[1]
    assert [name for name in re.findall(r"`(\w+)`", sentence)] == KINDS
    assert "(docs/projectors.md)" in (ROOT / "README.md").read_text()


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.S)
    example = next(block for block in blocks if "class MeanAndMax" in block)
    call = next(block for block in blocks if "from_backbones" in block)
    monkeypatch.chdir(tmp_path)
    Path("my_projector.py").write_text(example)
    names = {
        "VLMForConditionalGeneration": VLMForConditionalGeneration, "vision": vit_config(None), "text": llama_config()
    }  # fmt: skip
    exec(call, names)
    model, projector = names["model"], names["model"].model.multi_modal_projector
    assert model.config.image_seq_length == 4 and model.config.projector_type == "my_projector.MeanAndMax"
    features = torch.randn(2, 16, WIDTH["vision"])
    patches = squares(features, (4, 4), 2)
    expected = torch.cat([patches.mean((2, 3)), patches.amax((2, 3))], -1)
    torch.testing.assert_close(projector(features), by_layer(projector.linear, expected), rtol=1e-4, atol=1e-5)
    assert compose("my_projector.py:MeanAndMax", projector_settings={"scale": 4}).config.image_seq_length == 1
    model.save_pretrained("out")
    Path("my_projector.py").unlink()
    load = next(block for block in blocks if "AutoModelForImageTextToText" in block)
    names |= {"AutoModelForImageTextToText": AutoModelForImageTextToText, "folder": "out"}
    exec(load, names)
    assert torch.equal(logits_of(names["model"]), logits_of(model))
