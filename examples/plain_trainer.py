"""Two backbones become one model, taught by the library's own `Trainer`: what the scripts do, in the open.

    python examples/plain_trainer.py            # SigLIP and SmolLM2 from the Hub, on the built-in data
    accelerate launch examples/plain_trainer.py --vision_model facebook/dinov2-small --text_model Qwen/Qwen3-0.6B \\
        --dataset dialogues.jsonl --image_dir images --output_dir outputs/mine --max_steps -1

Rows are of any layout that Duet reads (docs/data.md). What the scripts add to this: the tables and checks before the
first step, rates of published recipes, batches without padding, and the test questions at the end.
"""

from dataclasses import dataclass, field

from rows import dialogues
from transformers import HfArgumentParser, Trainer, TrainingArguments

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor


@dataclass
class JoinArguments:
    vision_model: str = field(default="google/siglip-base-patch16-224", metadata={"help": "Folder or Hub name."})
    text_model: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Folder or Hub name."})
    dataset: str | None = field(default=None, metadata={"help": "File, folder or Hub name; the shapes without."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser((JoinArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/plain", max_steps=20, learning_rate=1e-3, logging_steps=5, report_to="none",
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    join_args, training_args = parser.parse_args_into_dataclasses(argv)

    model = VLMForConditionalGeneration.from_backbones(join_args.vision_model, join_args.text_model)
    processor = VLMProcessor.from_backbones(join_args.vision_model, join_args.text_model, model.config)
    processor.update_generation_config(model.generation_config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)  # stage 1's rule: the rest waits until images mean something

    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=VLMDataCollator(processor),
        train_dataset=dialogues(join_args.dataset, join_args.image_dir),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
