"""The library's own common tests of models and configs, run on Duet's classes as on LLaVA's.

They are in the library's source distribution (a checkout of its repository has those of generation and export as well):

    pip install parameterized
    pip download --no-deps --no-binary :all: transformers==5.24.0 && tar xf transformers-5.24.0.tar.gz
    DUET_TRANSFORMERS_TESTS=transformers-5.24.0 python -m pytest tests/test_common.py -m slow

The version must be the installed one. Skipped where `DUET_TRANSFORMERS_TESTS` names no such folder.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig, SiglipVisionConfig, ViTConfig
from transformers.models.auto import modeling_auto

from modeling_vlm import VLMConfig, VLMForConditionalGeneration, VLMModel, VLMPreTrainedModel


FOLDER = Path(os.environ.get("DUET_TRANSFORMERS_TESTS", "nowhere")).resolve() / "tests"

pytestmark = pytest.mark.slow
if not (FOLDER / "test_modeling_common.py").exists():
    pytest.skip("DUET_TRANSFORMERS_TESTS names no folder with tests/test_modeling_common.py", allow_module_level=True)
pytest.importorskip("parameterized", reason="the library's tests need the package parameterized")

STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False, "output_hidden_states": True, "output_attentions": True, "dtype": "float16",
            "chunk_size_feed_forward": 5, "problem_type": "regression", "id2label": {0: "a"}, "label2id": {"a": "0"},
        }
    },
}  # fmt: skip
"""Modules that the common tests import and a source distribution lacks."""


def load_common_tests() -> tuple[ModuleType, ModuleType]:
    """The common tests of models and of configs, with stand-ins for what lacks, under a name that is not ours."""
    package = sys.modules["library_tests"] = ModuleType("library_tests")
    package.__path__ = [str(FOLDER)]
    for name, content in STAND_INS.items():
        if not FOLDER.joinpath(*name.split(".")).with_suffix(".py").exists():
            parent = f"library_tests.{name.split('.')[0]}"
            sys.modules[parent], module = ModuleType(parent), ModuleType(f"library_tests.{name}")
            sys.modules[f"library_tests.{name}"] = module
            vars(module).update(content)
    # The library finds itself through an `__init__.py` beside its tests, which lacks too.
    with patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        names = "test_modeling_common", "test_configuration_common"
        return tuple(importlib.import_module(f"library_tests.{name}") for name in names)


common, common_of_configs = load_common_tests()


class ModelTester:
    """What the common tests ask for: a tiny config, and a batch in which an image stands before each text."""

    batch_size = 7  # as large as the tests of attention make every batch: they would add texts without images
    text_length = 7
    num_image_tokens = 4
    image_token_id = 1
    is_training = True

    def __init__(self, vision, text, options):
        self.vision, self.text, self.options = vision, text, options
        self.seq_length = self.num_image_tokens + self.text_length
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(text, name))

    def get_config(self):
        vision, text = (type(config)(**config.to_dict()) for config in (self.vision, self.text))
        options = {"image_token_id": self.image_token_id, **self.options}
        return VLMConfig(vision_config=vision, text_config=text, **options)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = torch.randint(self.image_token_id + 1, self.vocab_size, (self.batch_size, self.seq_length))
        ids[:, : self.num_image_tokens] = self.image_token_id
        pixels = torch.rand(self.batch_size, 3, *config.image_size)
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class CommonTests(common.ModelTesterMixin, common.GenerationTesterMixin):
    """Every test of the mixins; those that need a GPU, DeepSpeed or Flash Attention skip themselves without one."""

    all_model_classes = (VLMModel, VLMForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    # Poolers and heads of encoders are not read: `training_vlm` freezes them. LLaVA's tests leave the whole test out.
    test_all_params_have_gradient = False
    # By its file's first lines the config is of no year, and the library then leaves the test out.
    test_can_init_all_missing_weights_before_2023 = True

    vision, text, options = None, None, {}

    def setUp(self):
        # By these the tests know which class is headless and which has labels; they hold the library's classes only.
        for mapping, model in (
            (modeling_auto.MODEL_MAPPING_NAMES, "VLMModel"),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "VLMForConditionalGeneration"),
        ):
            known = patch.dict(mapping, {VLMConfig.model_type: model})
            known.start()
            self.addCleanup(known.stop)
        self.model_tester = ModelTester(self.vision, self.text, self.options)

    def test_can_init_all_missing_weights(self):
        # As for a class of the library.
        with patch.object(VLMPreTrainedModel, "is_custom_code", classmethod(lambda cls: False)):
            super().test_can_init_all_missing_weights()

    def test_config(self):
        common_of_configs.ConfigTester(
            self,
            config_class=VLMConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "image_seq_length", "vision_feature_layer"],
        ).run_common_tests()

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model(**inputs)
            one = {name: tensor[:1] for name, tensor in inputs.items()}
            two = {name: torch.cat([tensor, tensor]) for name, tensor in one.items()}
            for several in (inputs, two):
                with self.assertRaises(ValueError):
                    model(**{**several, "pixel_values": one["pixel_values"]})
            model(**two)


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 37}
VISION = {**LAYERS, "image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
GPT2 = GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=128, **TEXT)
LLAMA = LlamaConfig(**LAYERS, num_key_value_heads=2, **TEXT)


class TestViTWithGPT2(CommonTests, unittest.TestCase):
    vision, text = ViTConfig(**VISION), GPT2


class TestSiglipWithLlama(CommonTests, unittest.TestCase):
    vision, text = SiglipVisionConfig(**VISION), LLAMA


class TestCLIPWithLlama(CommonTests, unittest.TestCase):
    vision, text, options = CLIPVisionConfig(**VISION), LLAMA, {"vision_feature_layer": -1}


class TestCLIPWithGPT2(CommonTests, unittest.TestCase):
    vision, text = CLIPVisionConfig(**VISION), GPT2
