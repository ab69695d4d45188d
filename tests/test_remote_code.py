"""A saved folder is complete: it loads, answers, trains on and saves again where this package cannot be imported.

Everything is loaded by one fresh process (importing the library takes seconds), which writes down what it found; the
tests read that. What it must give are the logits that the folder's model gave here.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor
from tests import tiny
from tests.isolated import run_without_package
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.training_arguments import VLMTrainingArguments


ROOT = Path(__file__).parents[1]
SHIPPED = sorted(file.name for package in ("modeling_vlm", "processing") for file in (ROOT / package).glob("*_vlm.py"))
# What belongs to a run that can be resumed, not to the model.
OF_TRAINING = {
    "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "data_account_0.json",
    "checkpoint_manifest.json", "data_order.json", "run.json", "tuning.json",
}  # fmt: skip
KINDS = ["composed", "cut", "loaded", "checkpoint-1", "checkpoint-2", "end_of_training"]
AUTO_CLASSES = ["AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"]

CHILD = '''
import json, traceback
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

work, names, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {"importable": importable}
torch.set_num_threads(1)
image = Image.open(work / "image.png")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]


def ask(model, processor):
    inputs = processor.apply_chat_template(
        [messages], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def load(folder):
    """Everything a user does with a folder; the logits of the parent's batch, and the answer to a question."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(config).__name__ == "VLMConfig" and type(processor).__name__ == "VLMProcessor"
    for one in (config, processor, model):
        assert type(one).__module__.startswith("transformers_modules."), type(one)
    batch = torch.load(work / "batch" / f"{folder.parent.name}.pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return model, processor, logits


for name in names:
    folder, result = work / name, {}
    found[name] = result
    try:
        model, processor, logits = load(folder)
        torch.save(logits, work / f"{name.replace('/', ' ')}.pt")
        result["answer"] = ask(model, processor)
        again = work / (name + "_again")
        model.save_pretrained(again)
        processor.save_pretrained(again)
        second, processor, logits_again = load(again)
        assert torch.equal(logits_again, logits)
        assert ask(second, processor) == result["answer"]
        result["files again"] = sorted(path.name for path in again.iterdir())
        model.train()
        inputs = torch.load(work / "batch" / f"{folder.parent.name}.pt")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        result["trained"] = any(p.grad is not None for p in model.parameters())
        if name.endswith("end_of_training"):
            for auto in auto_classes:
                other = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
                result[auto] = ask(other, processor)
            transformers.logging.set_verbosity_error()  # 5.17's pipeline warns of the arguments that it passes itself
            pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
            written = pipe(text=messages, max_new_tokens=6, do_sample=False, return_full_text=False)
            transformers.logging.set_verbosity_warning()
            result["pipeline"] = written[0]["generated_text"]
            result["expected"] = processor.decode(result["answer"], skip_special_tokens=True)
    except Exception:
        result["error"] = traceback.format_exc()
(work / "found.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """Folders of every kind for both pairs, and the logits that their models gave when they were saved."""
    work = tmp_path_factory.mktemp("remote")
    (work / "batch").mkdir()
    expected = {}
    from PIL import Image

    picture = Image.effect_mandelbrot((40, 28), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    picture.save(work / "image.png")
    items = [tiny.dialogue("what is it?", "a cat", picture), tiny.dialogue("how many?", "two objects on a mat")]
    for pair in tiny.PAIRS:
        vision, text = folders(pair)
        strategy = tiny.PAIRS[pair][2]
        batch = None

        def save(kind, model, processor=None):
            if processor is not None:
                model.save_pretrained(work / pair / kind)  # noqa: B023
                processor.save_pretrained(work / pair / kind)  # noqa: B023
            with torch.no_grad():
                expected[f"{pair}/{kind}"] = model.eval()(**batch).logits  # noqa: B023

        model, processor = tiny.compose(vision, text, strategy)
        batch = tiny.collate(processor, items)
        batch.pop("labels")
        torch.save(batch, work / "batch" / f"{pair}.pt")
        save("composed", model, processor)
        save("cut", *tiny.compose(vision, text, strategy, vision_feature_layer=-2, projector_type="gelu_norm"))
        loaded = VLMForConditionalGeneration.from_pretrained(work / pair / "composed")
        save("loaded", loaded, VLMProcessor.from_pretrained(work / pair / "composed"))
        apply_tuning(model, "last:1", "full")
        arguments = VLMTrainingArguments(
            output_dir=str(work / pair), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=2,
            save_strategy="steps", save_steps=1, learning_rate=1e-2, dataloader_num_workers=0, logging_steps=1,
        )  # fmt: skip
        trainer = VLMTrainer(
            model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor),
            train_dataset=items,
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(work / pair / "end_of_training"))
        save("end_of_training", model)
        for step in (1, 2):
            save(f"checkpoint-{step}", VLMForConditionalGeneration.from_pretrained(work / pair / f"checkpoint-{step}"))
    return work, expected


@pytest.fixture(scope="module")
def found(saved):
    """What a fresh process made of those folders."""
    work, expected = saved
    output = run_without_package(CHILD, work, json.dumps(list(expected)), json.dumps(AUTO_CLASSES))
    return json.loads((work / "found.json").read_text()), output


def test_the_process_really_was_without_this_package(found):
    assert found[0]["importable"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_gives_the_same_logits_without_this_package(pair, saved, found, kind):
    work, expected = saved
    result = found[0][f"{pair}/{kind}"]
    assert "error" not in result, result.get("error")
    logits, wanted = torch.load(work / f"{pair} {kind}.pt"), expected[f"{pair}/{kind}"]
    assert (logits - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert len(result["answer"]) > 0 and result["trained"]


def test_the_folders_are_different_models(saved):
    """Or the test above would compare the same thing many times over."""
    _, expected = saved
    for pair in tiny.PAIRS:
        kinds = ["composed", "cut", "checkpoint-1", "checkpoint-2"]
        for index, one in enumerate(kinds):
            for other in kinds[:index]:
                assert not torch.equal(expected[f"{pair}/{one}"], expected[f"{pair}/{other}"])


@pytest.mark.parametrize("auto", AUTO_CLASSES)
def test_every_auto_class_gives_the_model_that_answers(pair, found, auto):
    result = found[0][f"{pair}/end_of_training"]
    assert result[auto] == result["answer"]


def test_the_pipeline_loads_the_folder(pair, found):
    result = found[0][f"{pair}/end_of_training"]
    assert result["pipeline"].strip() == result["expected"].strip()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_loaded_is_saved_again_with_all_files(pair, saved, found, kind):
    work, _ = saved
    first = {path.name for path in (work / pair / kind).iterdir() if path.is_file()}
    again = set(found[0][f"{pair}/{kind}"]["files again"])
    assert set(SHIPPED) <= again
    assert first - again <= OF_TRAINING


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_safetensors(pair, saved, kind):
    work, _ = saved
    names = {path.name for path in (work / pair / kind).iterdir()}
    assert "model.safetensors" in names and not any("pytorch_model" in name for name in names)


def test_the_fresh_process_warned_of_nothing(found):
    """A user who loads a folder sees progress bars and nothing to worry about."""
    worries = [line for line in found[1].splitlines() if "warning" in line.lower() or "[transformers]" in line]
    assert worries == []


OWN_CODE = {
    "text": """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_text"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
""",
    "vision": """
from transformers import ViTConfig, ViTModel

class OwnConfig(ViTConfig):
    model_type = "own_vision"

class OwnModel(ViTModel):
    config_class = OwnConfig
""",
}


@pytest.mark.parametrize("native_name", [False, True])
@pytest.mark.parametrize("side", ["vision", "text"])
def test_a_backbone_with_code_of_its_own_is_refused_before_it_trains(side, native_name, folders, tmp_path):
    """Its code would not travel with the composed model, so the saved folder could not be loaded."""
    vision, text = folders("vit-gpt2")[0], folders("siglip-llama")[1]
    source = {"vision": vision, "text": text}[side]
    own = tmp_path / "own"
    shutil.copytree(source, own)
    (own / "own.py").write_text(OWN_CODE[side])
    config = json.loads((own / "config.json").read_text())
    if not native_name:
        config["model_type"] = f"own_{side}"
    auto = {"vision": "AutoModel", "text": "AutoModelForCausalLM"}[side]
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", auto: "own.OwnModel"}
    (own / "config.json").write_text(json.dumps(config))
    chosen = {"vision": str(vision), "text": str(text), side: str(own)}
    with pytest.raises(ValueError, match=f"'{own}'.*code of its own") as error:
        VLMForConditionalGeneration.from_backbones(**chosen, **{f"{side}_kwargs": {"trust_remote_code": True}})
    assert "\n" not in str(error.value)
    if native_name:  # the library's own class reads it as well, without that code
        VLMForConditionalGeneration.from_backbones(**chosen).save_pretrained(tmp_path / "out")
        VLMForConditionalGeneration.from_pretrained(tmp_path / "out")
    else:
        with pytest.raises(ValueError, match=f"'{own}'") as error:
            VLMForConditionalGeneration.from_backbones(**chosen)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_library_accepts_each_shipped_file(name):
    """Its own checks: no import that a user would have to install, every file that another one needs beside it."""
    file = next(path for folder in ("modeling_vlm", "processing") for path in (ROOT / folder).glob(name))
    check_imports(file)
    needed = {Path(path).name for path in get_relative_import_files(file)}
    assert needed <= set(SHIPPED)
    assert all((file.parent / other).is_file() for other in needed)


def test_what_is_shipped_is_what_is_saved(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == sorted(SHIPPED)
