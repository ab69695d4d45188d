"""The matrix: encoders and language models as data, what is tried on each pair, and the page that says what was found.

`python -m tests.matrix` runs every pair and writes the tables of `docs/backbones.md`; its prose is left as it is.
"""

import argparse
import contextlib
import copy
import datetime
import io
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.configuration_vlm import kind_of
from tests import tiny
from tests.isolated import run_without_package
from training_vlm.learning.probe import why_not_packed
from training_vlm.learning.tuning import apply_tuning


PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WORDS = {**SIZES, **IDS, "vocab_size": 376, "max_position_embeddings": 128}
GROUPED = {**WORDS, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 8}  # shorter than an image
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": 376, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **IDS}
OPT = {**WORDS, "ffn_dim": 48}
NO_WIDTH = {key: value for key, value in IMAGES.items() if key != "intermediate_size"}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

LANGUAGE_MODELS = {
    "GPT-2": ("GPT2", GPT),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 8}),
    "GPT-Neo": (
        "GPTNeo",
        {**IDS, "vocab_size": 376, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128,
         "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "GPT-NeoX": ("GPTNeoX", WORDS),
    "gpt-oss": ("GptOss", {**WINDOW, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "CodeGen": ("CodeGen", {**GPT, "rotary_dim": 8}),
    "OPT": ("OPT", {**OPT, "word_embed_proj_dim": 32}),
    "OPT, embeddings projected": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "BLOOM": ("Bloom", {**IDS, "vocab_size": 376, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "MPT": ("Mpt", {**IDS, "vocab_size": 376, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "Falcon": ("Falcon", WORDS),
    "Falcon-H1": (
        "FalconH1",
        {**GROUPED, **HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
         "mamba_n_groups": 1, "lm_head_multiplier": 0.5},
    ),
    "Llama": ("Llama", GROUPED),
    "Llama, tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", WINDOW),
    "Ministral": ("Ministral", {**WINDOW, **HEADS}),
    "Mixtral": ("Mixtral", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen2-MoE": (
        "Qwen2Moe", {**GROUPED, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    ),
    "Qwen3": ("Qwen3", {**GROUPED, **HEADS}),
    "Qwen3-MoE": ("Qwen3Moe", {**GROUPED, **EXPERTS, **HEADS, "moe_intermediate_size": 32}),
    "Qwen3-Next": (
        "Qwen3Next",
        {**GROUPED, **EXPERTS, **HEADS, **LINEAR, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "Qwen3.5 text": ("Qwen3_5Text", {**GROUPED, **HEADS, **LINEAR}),
    "Gemma": ("Gemma", {**GROUPED, **HEADS}),
    "Gemma 2": ("Gemma2", {**WINDOW, **HEADS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.0}),
    "Gemma 3 text": ("Gemma3Text", {**WINDOW, **HEADS, "query_pre_attn_scalar": 8}),
    "Gemma 4 text": (
        "Gemma4Text",
        {**WINDOW, **HEADS, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
         "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
         "vocab_size_per_layer_input": 376, "final_logit_softcapping": 1.0},
    ),
    "Phi": ("Phi", WORDS),
    "Phi-3": ("Phi3", GROUPED),
    "SmolLM3": ("SmolLM3", GROUPED),
    "StableLM": ("StableLm", GROUPED),
    "StarCoder 2": ("Starcoder2", GROUPED),
    "Granite": ("Granite", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "Granite 4": (
        "GraniteMoeHybrid",
        {**GROUPED, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 16,
         "mamba_d_state": 8, "mamba_n_groups": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
         "logits_scaling": 4.0},
    ),
    "OLMo 2": ("Olmo2", GROUPED),
    "OLMo 3": ("Olmo3", WINDOW),
    "OLMoE": ("Olmoe", {**GROUPED, **EXPERTS}),
    "Cohere": ("Cohere", {**GROUPED, "logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", {**WINDOW, "logit_scale": 0.25}),
    "GLM": ("Glm", {**GROUPED, **HEADS}),
    "GLM-4": ("Glm4", {**GROUPED, **HEADS}),
    "Helium": ("Helium", {**GROUPED, **HEADS}),
    "EXAONE 4": ("Exaone4", {**WINDOW, "sliding_window_pattern": 2}),
    "Nemotron": ("Nemotron", GROUPED),
    "Apertus": ("Apertus", GROUPED),
    "Seed-OSS": ("SeedOss", {**GROUPED, **HEADS}),
    "ERNIE 4.5": ("Ernie4_5", GROUPED),
    "LFM2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
    "Jamba": (
        "Jamba",
        {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8,
         "mamba_dt_rank": 4},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {**WORDS, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
}  # fmt: skip
"""Name -> class and settings of a language model's config."""

ENCODERS = {
    "ViT": ([("ViT", IMAGES)], 1),
    "DeiT": ([("DeiT", IMAGES)], 2),
    "BEiT": ([("Beit", {**IMAGES, "use_relative_position_bias": True})], 1),
    "CLIP": ([("CLIPVision", IMAGES)], 1),
    "SigLIP": ([("SiglipVision", IMAGES)], 0),
    "SigLIP 2": ([("Siglip2Vision", {**SIZES, "patch_size": 8, "num_patches": 16})], 0),
    "DINOv2": ([("Dinov2", NO_WIDTH)], 1),
    "DINOv2 with registers": ([("Dinov2WithRegisters", {**NO_WIDTH, "num_register_tokens": 4})], 5),
    "DINOv3 ViT": ([("DINOv3ViT", {**IMAGES, "num_register_tokens": 4})], 5),
    "AIMv2": ([("Aimv2Vision", IMAGES)], 0),
    "DINOv2 + SigLIP": (
        [("Dinov2", NO_WIDTH), ("SiglipVision", {**IMAGES, "hidden_size": 24, "image_size": 16, "patch_size": 4})], 0
    ),
}  # fmt: skip
"""Name -> classes and settings of one encoder's config or of a pair's, and the tokens before the patches."""

LAYERS = (None, -2)
"""Where an encoder's features are read."""


def config_of(kind: str, settings: dict):
    """A config of that class."""
    return getattr(transformers, f"{kind}Config")(**copy.deepcopy(settings))


def encoder_of(name: str):
    """What `from_backbones` takes as `vision`."""
    configs = tuple(config_of(*one) for one in ENCODERS[name][0])
    return configs if len(configs) > 1 else configs[0]


@torch.no_grad()
def shake(module: torch.nn.Module) -> None:
    """Biases and norms are born as zeros and ones, which hide mistakes."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


def save_language_model(name: str, folder: Path) -> torch.Tensor:
    """A checkpoint with its tokenizer; gives its logits for `words()`."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config_of(*LANGUAGE_MODELS[name])).eval()
    shake(causal_lm)
    causal_lm.save_pretrained(folder)
    tiny.byte_level_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return causal_lm(words()).logits


def words() -> torch.Tensor:
    """Ids of two texts."""
    return torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def compose(encoder: str, text, layer: int | None, **options):
    """A model of the matrix; `text` is a folder or a config."""
    torch.manual_seed(0)
    text = text if isinstance(text, transformers.PreTrainedConfig) else str(text)
    with contextlib.redirect_stdout(io.StringIO()):
        model = VLMForConditionalGeneration.from_backbones(
            encoder_of(encoder), text, vision_feature_layer=layer, **options
        )
    shake(model.model.vision_tower)
    return model


def rows_of(model) -> list[dict[str, torch.Tensor]]:
    """Three inputs of different length, two with an image and one of text alone."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for images, length in ((1, 7), (1, 3), (0, 9)):
        image = torch.full((images * model.config.image_seq_length,), model.config.image_token_id)
        ids = torch.cat([image, torch.randint(1, 300, (length,), generator=generator)]).unsqueeze(0)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            row["pixel_values"] = torch.randn(1, 3, *model.config.image_size, generator=generator)
        rows.append(row)
    return rows


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The rows as one batch, padded on the left."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=0) for row in rows]
        )
        for name in ("input_ids", "attention_mask")
    }
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
    return batch


def check_text(model, expected: torch.Tensor) -> None:
    """The logits of plain text are those of the language model alone, over its vocabulary."""
    with torch.no_grad():
        found = model(input_ids=words()).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check_gradients(model) -> None:
    """One backward pass reaches everything where everything trains, and the projector alone where that is declared."""
    batch = batch_of(rows_of(model))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    projector = {f"model.multi_modal_projector.{n}" for n, _ in model.model.multi_modal_projector.named_parameters()}
    for policy, expected in (("frozen", projector), ("full", {name for name, _ in model.named_parameters()})):
        apply_tuning(model, policy, policy)
        model.train().zero_grad()
        loss = model(**batch, labels=labels).loss
        assert loss.isfinite()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected, f"{policy}: {sorted(gradients.keys() ^ expected)}"
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    model.zero_grad()
    model.eval()


def check_generation(model) -> None:
    """What is written is the same with a cache and without, and in a batch and alone."""
    rows = rows_of(model)
    batch = batch_of(rows)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}

    def write(inputs, **more):
        output = model.generate(**inputs, **settings, **more, return_dict_in_generate=True)
        return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)

    ids, logits = write(batch)
    for what, (others, scores) in {
        "without a cache": write(batch, use_cache=False),
        "alone": [torch.cat(parts) for parts in zip(*(write(row) for row in rows))],
    }.items():
        difference = (scores - logits).abs().max() / logits.abs().max()
        assert difference <= 1e-4 and torch.equal(others, ids), f"{what}: {difference:.1e}"


def check_image(model) -> None:
    """Another image gives other words behind it."""
    row = rows_of(model)[0]
    with torch.no_grad():
        one, other = (model(**{**row, "pixel_values": row["pixel_values"] * sign}).logits for sign in (1, -1))
    assert (one - other)[:, model.config.image_seq_length :].abs().max() > 1e-5


def logits_of(model) -> torch.Tensor:
    """Those of the whole batch."""
    with torch.no_grad():
        return model(**batch_of(rows_of(model))).logits


def check_pair(encoder: str, text: Path, expected: torch.Tensor, layer: int | None, folder: Path):
    """Everything but the loading: composes the pair, saves it into `folder`, and gives it."""
    model = compose(encoder, text, layer)
    assert (model.config.num_prefix_tokens, model.config.image_seq_length) == (ENCODERS[encoder][1], 16)
    check_text(model, expected)
    check_image(model)
    check_gradients(model)
    check_generation(model)
    model.save_pretrained(folder)
    return model


LOAD = """
import json, traceback
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

torch.set_num_threads(1)
work, found = Path(sys.argv[1]), {"importable": importable}
for folder in sorted((work / "folders").iterdir()):
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        batch, expected = torch.load(folder / "batch.pt")
        with torch.no_grad():
            found[folder.name] = ((model(**batch).logits - expected).abs().max() / expected.abs().max()).item()
    except Exception:
        found[folder.name] = traceback.format_exc()
(work / "found.json").write_text(json.dumps(found))
"""


def load_without_package(work: Path) -> dict[str, float | str]:
    """
    Load every folder of `work / "folders"` where this package cannot be imported.

    Returns:
        `dict`: name of a folder -> how far its logits are from those beside it, relative, or the error.
    """
    run_without_package(LOAD, work)
    found = json.loads((work / "found.json").read_text())
    assert found.pop("importable") == []
    return found


def run_pairs(encoder: str, texts: dict[str, tuple[Path, torch.Tensor]], work: Path) -> dict[str, str]:
    """
    One encoder with many language models, read at each of `LAYERS`; every folder is loaded in one fresh process.

    Args:
        texts: name -> folder and logits, as `save_language_model` gives them.
        work: an empty folder for what is saved; gone afterwards.

    Returns:
        `dict`: name of each language model that failed -> why.
    """
    failed, folders = {}, {}
    (work / "folders").mkdir(parents=True)
    for name, (text, expected) in texts.items():
        for layer in LAYERS:
            folder = work / "folders" / f"{len(folders):03d}"
            try:
                model = check_pair(encoder, text, expected, layer, folder)
                torch.save((batch_of(rows_of(model)), logits_of(model)), folder / "batch.pt")
                folders[folder.name] = name
            except Exception as error:
                shutil.rmtree(folder, ignore_errors=True)
                failed[name] = f"layer {layer}: {type(error).__name__}: {error}"
    for folder, found in load_without_package(work).items():
        if not (isinstance(found, float) and found <= 1e-6):
            failed[folders[folder]] = f"loaded in a fresh process: {found}"
    shutil.rmtree(work)
    return failed


# -- the page ---------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- tables: python -m tests.matrix -->", "<!-- end of tables -->"


def row(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def language_model_row(name: str, model) -> str:
    """What the page says of a composed model's language model."""
    config = model.config.text_config
    facts = ["tied to the embeddings" if model.config.tie_word_embeddings else "of its own"]
    facts += ["with bias"] * (model.lm_head.bias is not None)
    scales = {
        "final_logit_softcapping": "soft cap", "logit_scale": "scaled", "logits_scaling": "scaled",
        "lm_head_multiplier": "scaled",
    }  # fmt: skip
    facts += [what for field, what in scales.items() if getattr(config, field, None) is not None]
    width, embedded = config.hidden_size, model.get_input_embeddings().embedding_dim
    facts += [f"embeddings {embedded} of {width} wide"] * (embedded != width)
    positions = "as many as were learned" if model.model.max_positions else "any number"
    return row([name, f"`{config.model_type}`", ", ".join(facts), positions, packed(model)])


def packed(model) -> str:
    """What the page says of texts in one row."""
    for share_prefix, kept in ((False, "no, they"), (True, "yes, but with no shared prefix: they")):
        if reason := why_not_packed(model, share_prefix):
            return f"{kept} {reason.partition(' in the language model')[0].removeprefix('texts in one row ')}"
    return "yes"


def encoder_row(name: str, models: list) -> str:
    """What the page says of an encoder, composed at each of `LAYERS`."""
    left_out = ["; ".join(f"`{part}`" for part in model.config.vision_modules_left_out) for model in models]
    try:
        compose(name, config_of(*LANGUAGE_MODELS["Llama"]), None, image_size=48)
        another = "yes"
    except ValueError as error:
        assert "cannot take images of 48x48 pixels" in str(error)
        another = "no"
    config = models[0].config
    types = f"`{kind_of(config.vision_config)}`".replace(" and ", "` and `")
    return row([name, types, str(config.num_prefix_tokens), *left_out, another])


def tables(failed: dict[tuple[str, str], str]) -> str:
    """The generated part of the page."""
    pairs = len(ENCODERS) * len(LANGUAGE_MODELS)
    today = datetime.date.today().isoformat()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    models = {name: compose("ViT", config_of(*LANGUAGE_MODELS[name]), None) for name in LANGUAGE_MODELS}
    towers = {
        name: [compose(name, config_of(*LANGUAGE_MODELS["Llama"]), layer) for layer in LAYERS] for name in ENCODERS
    }
    lines = [
        f"{pairs - len(failed)} of {pairs} pairs passed, {today}, {versions}; each pair twice, with the encoder's last "
        "output and with the layer before its last (`vision_feature_layer=-2`).",
        "",
        row(["", *ENCODERS]),
        row(["---", *[":-:"] * len(ENCODERS)]),
        *[row([text, *["" if (one, text) in failed else "✓" for one in ENCODERS]]) for text in LANGUAGE_MODELS],
        "",
        row(["encoder", "`model_type`", "tokens before the patches", "left out, last output", "left out, layer -2",
             "another `image_size`"]),
        row(["---"] * 6),
        *[encoder_row(name, towers[name]) for name in ENCODERS],
        "",
        row(["language model", "`model_type`", "head", "positions", "texts in one row"]),
        row(["---"] * 5),
        *[language_model_row(name, models[name]) for name in LANGUAGE_MODELS],
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Run every pair and write the page."""
    parser = argparse.ArgumentParser(description="Run every pair of the matrix and write its page.")
    parser.add_argument("--write", type=Path, default=PAGE, help="the page; what is between its two marks is replaced")
    page = parser.parse_args().write
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = {
            name: (work / str(index), save_language_model(name, work / str(index)))
            for index, name in enumerate(LANGUAGE_MODELS)
        }
        for encoder in ENCODERS:
            found = run_pairs(encoder, texts, work / "pairs")
            print(f"{encoder}: {len(texts) - len(found)} of {len(texts)} language models", flush=True)
            for text, why in found.items():
                print(f"  {text}: {why}")
                failed[encoder, text] = why
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(failed)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
