"""Reward what a saved Duet checkpoint says about pictures, with TRL's `GRPOTrainer`.

    pip install "trl>=1.16"
    python examples/trl_grpo.py                 # outputs/shapes/sft, as train_sft.py leaves it, on the built-in data
    accelerate launch examples/trl_grpo.py --model_name_or_path outputs/assistant --dataset_name tasks.jsonl \\
        --image_dir images --output_dir outputs/trl_grpo --max_completion_length 64 --max_steps -1

Rows have `images`, `prompt` as messages, and `answer`, the right one. What TRL needs: a batch (times the accumulated
steps and the processes) that `num_generations` divides, and rewards that differ between the answers to a question: from
equal ones nothing is learned.
"""

from dataclasses import dataclass, field
from difflib import SequenceMatcher

from rows import tasks
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "File, folder or Hub name; the shapes without."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})


def likeness(completions: list, answer: list[str], **others) -> list[float]:
    """How like the right answer each is, from 0 to 1 for the same words."""
    said = [completion[0]["content"].strip() for completion in completions]
    return [SequenceMatcher(None, *pair).ratio() for pair in zip(said, answer)]


def main(argv: list[str] | None = None) -> None:
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path="outputs/shapes/sft", output_dir="outputs/shapes/trl_grpo", max_steps=20,
        num_generations=4, max_completion_length=24, logging_steps=5, report_to="none",
    )  # fmt: skip
    data_args, training_args, model_args = parser.parse_args_and_config(argv)

    name = model_args.model_name_or_path
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=model_args.dtype)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=likeness,
        args=training_args,
        train_dataset=tasks(data_args.dataset_name, data_args.image_dir),
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)


if __name__ == "__main__":
    main()
