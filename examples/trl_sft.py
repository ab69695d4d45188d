"""Go on with a saved Duet checkpoint in TRL's `SFTTrainer`.

    pip install "trl>=1.16"
    python examples/trl_sft.py                  # outputs/shapes/sft, as train_sft.py leaves it, on the built-in data
    accelerate launch examples/trl_sft.py --model_name_or_path outputs/assistant --dataset_name dialogues.jsonl \\
        --image_dir images --output_dir outputs/trl_sft --max_steps -1

Rows are of any layout that Duet reads (docs/data.md). What TRL needs: `max_length` None, as it would cut images too;
and for `assistant_only_loss` transformers 5.18 or newer, which mask answers about images, and a checkpoint whose chat
template marks the answers, as Duet's own does, or is one that TRL knows. LoRA goes by `--use_peft --lora_target_modules
".*language_model.*(q_proj|v_proj)"`, with the names of the model's own layers.
"""

from dataclasses import dataclass, field

from rows import dialogues, for_trl
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "File, folder or Hub name; the shapes without."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((DataArguments, SFTConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="outputs/shapes/sft", output_dir="outputs/shapes/trl_sft", max_steps=20,
        assistant_only_loss=True, max_length=None, logging_steps=5, report_to="none",
    )  # fmt: skip
    data_args, training_args, model_args = parser.parse_args_and_config(argv)

    name = model_args.model_name_or_path
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=model_args.dtype)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=for_trl(dialogues(data_args.dataset_name, data_args.image_dir)),
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)


if __name__ == "__main__":
    main()
