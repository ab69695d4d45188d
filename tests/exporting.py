"""Which pairs of the matrix are exported as which class of the library's own, and the table of it.

`python -m tests.exporting` tries every pair, its logits too, and writes the tables of `docs/engines.md`; its prose is
left as it is. Encoders and language models do not know of each other, so a table of each says what holds of all pairs.
"""

import argparse
import datetime
from pathlib import Path

import torch
import transformers

from modeling_vlm.native_vlm import misfits, native_form
from tests import matrix
from tests.matrix import ENCODERS, LANGUAGE_MODELS, config_of, row


PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
BEGIN, END = "<!-- tables: python -m tests.exporting -->", "<!-- end of tables -->"

WAYS = [(layer, strategy) for strategy in ("patch", "full") for layer in matrix.LAYERS]
"""Where an encoder's features are read, and which of them; every pair is tried with the patches alone."""

SHORT = {"LlavaForConditionalGeneration": "LLaVA", "DeepseekVLForConditionalGeneration": "DeepSeek-VL"}


def compose(encoder: str, text: str, layer: int | None, strategy: str = "patch", **options):
    """A pair of the matrix, every weight shaken."""
    model = matrix.compose(
        encoder, config_of(*LANGUAGE_MODELS[text]), layer, vision_feature_select_strategy=strategy, **options
    )
    matrix.shake(model)
    return model


def native_of(model):
    """The library's own model that a composed one is exported as."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    form = native_form(model)
    native, found = getattr(transformers, form.architecture).from_pretrained(
        None, config=form.config, state_dict=model.native_weights(form), output_loading_info=True
    )
    transformers.logging.set_verbosity(verbosity)
    unread = {
        f"model.vision_{side}.{name}" for side in ("tower", "model") for name in model.config.vision_modules_left_out
    }
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    assert all(any(name.startswith(part) for part in unread) for name in found["missing_keys"]), found["missing_keys"]
    return native.eval()


@torch.no_grad()
def difference(model, native) -> float:
    """How far logits are apart, as a share of the greatest: rows alone, and together behind padding."""
    rows, greatest = matrix.rows_of(model), 0.0
    for inputs in (*rows, matrix.batch_of(rows)):
        kept = inputs["attention_mask"].bool()
        expected, found = (one(**inputs).logits[kept] for one in (model, native))
        greatest = max(greatest, ((found - expected).abs().max() / expected.abs().max()).item())
    return greatest


def outcome(model) -> str:
    """What the tables say of a model: the class, or the first reason for which there is none."""
    if found := misfits(model):
        return found[0].rpartition(" (")[0]
    return SHORT[native_form(model).architecture]


def encoder_row(encoder: str) -> str:
    """What holds of an encoder, with any language model that can be exported."""
    return row([encoder, *(outcome(compose(encoder, "Llama", *way)) for way in WAYS)])


def text_row(text: str) -> str:
    """What holds of a language model, with any encoder that can be exported."""
    said = outcome(compose("CLIP", text, None))
    return row([text, "yes" if said in SHORT.values() else f"no: {said}"])


def tables(tried: dict[tuple, float | None]) -> str:
    """The generated part of the page."""
    exact = [value for value in tried.values() if value is not None]
    pairs = len({(encoder, text) for encoder, text, *_ in tried})
    today = datetime.date.today().isoformat()
    return "\n".join([
        f"{today}, transformers {transformers.__version__}: of {pairs} pairs, each read at both layers by its patches, "
        f"{len(exact)} of {len(tried)} models were exported and the others refused; the largest difference of logits "
        f"was {max(exact):.1e}, as a share of the greatest.",
        "",
        row(["encoder", *(f"{'last output' if layer is None else f'layer {layer}'}, `{way}`" for layer, way in WAYS)]),
        row(["---"] * (1 + len(WAYS))),
        *map(encoder_row, ENCODERS),
        "",
        row(["language model", "exported"]),
        row(["---"] * 2),
        *map(text_row, LANGUAGE_MODELS),
    ])  # fmt: skip


def try_all(encoder: str) -> dict[tuple, float | None]:
    """Every pair of an encoder: how far the logits of what is exported are apart, `None` where it is refused."""
    tried = {}
    for text in LANGUAGE_MODELS:
        for layer in matrix.LAYERS:
            model = compose(encoder, text, layer)
            tried[encoder, text, layer] = None if misfits(model) else difference(model, native_of(model))
    return tried


def main() -> None:
    """Try every pair and write the page."""
    parser = argparse.ArgumentParser(description="Export every pair of the matrix and write its tables.")
    parser.add_argument("--write", type=Path, default=PAGE, help="the page; what is between its two marks is replaced")
    page = parser.parse_args().write
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    tried: dict[tuple, float | None] = {}
    for encoder in ENCODERS:
        tried |= try_all(encoder)
        print(f"{encoder}: {len(tried)} tried", flush=True)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(tried)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
