"""LoRA on a saved Duet checkpoint with peft and the library's own `Trainer`: what train_sft.py does, in the open.

    python examples/lora.py                     # outputs/shapes/sft, as train_sft.py leaves it, on the built-in data
    accelerate launch examples/lora.py --model outputs/assistant --dataset dialogues.jsonl --image_dir images \\
        --output_dir outputs/lora --max_steps -1

The language model's linear layers get adapters and the projector is trained in full; the folder holds these and the
processor, and `PeftModel.from_pretrained(model, folder)` puts them on the checkpoint again. Rows are of any layout that
Duet reads (docs/data.md). What peft needs: full names of the modules, because encoders have layers of the same names.
"""

from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from rows import dialogues
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from processing import VLMDataCollator


@dataclass
class LoraArguments:
    model: str = field(default="outputs/shapes/sft", metadata={"help": "A saved Duet checkpoint."})
    dataset: str | None = field(default=None, metadata={"help": "File, folder or Hub name; the shapes without."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((LoraArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/shapes/lora", max_steps=20, learning_rate=2e-4, logging_steps=5, report_to="none",
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    lora_args, training_args = parser.parse_args_into_dataclasses(argv)

    base = AutoModelForImageTextToText.from_pretrained(lora_args.model, trust_remote_code=True, dtype="float32")
    processor = AutoProcessor.from_pretrained(lora_args.model, trust_remote_code=True)
    text = "model.language_model."
    layers = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    config = LoraConfig(
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=[name for name in layers if name.startswith(text)],
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=VLMDataCollator(processor),
        train_dataset=dialogues(lora_args.dataset, lora_args.image_dir),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
