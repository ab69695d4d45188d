"""Teach a saved Duet checkpoint which of two answers is preferred, with TRL's `DPOTrainer`.

    pip install "trl>=1.16"
    python examples/trl_dpo.py                  # outputs/shapes/sft, as train_sft.py leaves it, on the built-in data
    accelerate launch examples/trl_dpo.py --model_name_or_path outputs/assistant --dataset_name preferences.jsonl \\
        --image_dir images --output_dir outputs/trl_dpo --max_steps -1

Rows have `images`, and `prompt`, `chosen` and `rejected` as messages. What TRL needs: the checkpoint's folder with
`trust_remote_code`, because it loads the model it starts from a second time, as the reference; and `max_length` None,
as it would cut images too.
"""

from dataclasses import dataclass, field

from rows import preferences
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "File, folder or Hub name; the shapes without."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((DataArguments, DPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="outputs/shapes/sft", output_dir="outputs/shapes/trl_dpo", max_steps=20,
        trust_remote_code=True, max_length=None, logging_steps=5, report_to="none",
    )  # fmt: skip
    data_args, training_args, model_args = parser.parse_args_and_config(argv)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, **(training_args.model_init_kwargs or {})}

    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=preferences(data_args.dataset_name, data_args.image_dir),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)


if __name__ == "__main__":
    main()
