"""The Hub card of a trained model, made from the run: what it is, how to load it, how it was trained, what it says."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from .stages import Stage


_CARD = """---
{metadata}
---

# {title}

A vision-language model made of two backbones with Duet: `{vision}` sees, `{text}` speaks, a `{projector}` projector
joins them. An image takes {image_tokens} of the language model's positions.

## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
{ask}
output = model.generate(**inputs)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
```

## Training

Stage {stage}. {trained}

| setting | value |
|---|---|
{settings}

{results}
{samples}
"""


def write_model_card(
    folder: Path,
    *,
    name: str,
    stage: Stage,
    config,
    base_models: list[str],
    dataset: str | None,
    components,
    settings: dict[str, Any],
    metrics: dict[str, float],
    exact: str | None,
    samples: list[tuple[str, str, str]],
) -> None:
    """
    Write `README.md` into a model's folder.

    Args:
        name: how the model will be loaded (Hub name or folder).
        stage: the last one, whose way of asking the card shows.
        components: lines of the tuning table, see `tuning.describe_components`.
        exact: the exact-match table, where there is one.
        samples: question, expected and generated answer.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        datasets=[dataset] if dataset and dataset.count("/") == 1 and not Path(dataset).exists() else None,
        tags=["duet", "vision-language", f"stage-{stage.number}"],
    )
    learned = [f"{c.name} ({c.trained:,} of {c.parameters:,} parameters)" for c in components if c.trained]
    results = "".join(f"- {key}: {value:.4g}\n" for key, value in metrics.items())
    if exact:
        results += f"\nAnswers exactly right, greedy decoding:\n\n```\n{exact}\n```\n"
    shown = "\n".join(f"| {_cell(q)} | {_cell(e)} | {_cell(g)} |" for q, e, g in samples)
    card = _CARD.format(
        metadata=data.to_yaml(),
        title=Path(name).name,
        name=name,
        vision=config.vision_config.model_type,
        text=config.text_config.model_type,
        projector=config.projector_type,
        image_tokens=config.image_seq_length,
        ask=stage.ask,
        stage=stage.number,
        trained=f"Learned: {', '.join(learned)}.",
        settings="\n".join(f"| {key} | {_cell(value)} |" for key, value in settings.items()),
        results=f"## Results\n\n{results}" if results else "",
        samples=f"## Samples\n\n| asked | expected | generated |\n|---|---|---|\n{shown}\n\n![samples](samples.png)"
        if samples
        else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_base_models(model: str) -> list[str]:
    """The backbones that the card of an earlier stage names; none where there is no card."""
    try:
        found = ModelCard.load(Path(model) / "README.md" if Path(model).is_dir() else model).data.base_model
    except (OSError, ValueError, EntryNotFoundError, RepositoryNotFoundError):
        return []
    return found if isinstance(found, list) else [found] if found else []


# Written as entities, which Markdown takes for the characters themselves and for no mark of its own.
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_{}[]()<>#|~$:@&\"'"}
_LONGEST = 600


def _cell(text: Any) -> str:
    """A text of the data, or a model's, as it can stand in a table: in one line, and nothing but text."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return line.translate(_MARKS).replace("www.", "www&#46;")
