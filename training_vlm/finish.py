"""What happens after training: the folder is saved, questions are answered, and the card says what came of it."""

import functools
import itertools
from pathlib import Path

import torch

from evaluation_vlm.questions import draw_samples, exact_match, find_questions, format_exact_match, generate_answers
from processing.batching.encoding import encode_item
from processing.image_files_vlm import BadImage, load_image

from .data import Data, encode_test
from .learning.trainer import VLMTrainer
from .learning.tuning import describe_parts
from .model_card import read_base_models, write_model_card
from .settings import Arguments
from .stages import Stage
from .survey import write_data_report


SAMPLES_SHOWN = 8


def finish(stage: Stage, arguments: Arguments, trainer: VLMTrainer, data: Data, losses: dict[str, float]) -> None:
    """
    Leave a folder that needs nothing else: model, processor, card, samples; and say how to go on.

    The test questions are answered by greedy decoding; the samples as `GenerationArguments` say.
    """
    model_args, _, generation_args, args = arguments
    processor, folder = trainer.processing_class, Path(args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    for key, value in generation_args.to_generate().items():
        setattr(model.generation_config, key, value)
    trainer.save_model()
    account = trainer.gathered_account()
    if trainer.is_world_process_zero():
        print(f"\nconsumed\n{write_data_report(folder, account, trainer.train_dataset).table()}")
        shown, exact = _answer(trainer, model, processor, data, generation_args)
        answers = generate_answers(
            model, processor, shown, args.per_device_eval_batch_size, **generation_args.to_generate()
        )
        draw_samples(processor, shown, answers, folder / "samples.png")
        asked = [processor.tokenizer.decode([i for i in q.ids if i != processor.image_token_id]) for q in shown]
        dataset = ", ".join(part.reading.source for part in data.train)
        trainer.card = functools.partial(
            write_model_card,
            folder,
            name=args.hub_model_id or args.output_dir,
            stage=stage,
            config=model.config,
            base_models=_base_models(model_args),
            dataset=dataset,
            parts=describe_parts(model),
            settings=_settings(dataset, args),
            metrics=losses,
            exact=exact,
            samples=[(a, q.expected, g) for a, q, g in zip(asked, shown, answers)],
        )
        trainer.card()
        _say_goodbye(stage, args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    # A process that exits with its process group open may be aborted, and the launcher then calls the run failed.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _answer(trainer, model, processor, data, generation_args):
    """Questions to show, and the exact-match table of the test split where there is one."""
    if data.test is None:
        dataset = trainer.eval_dataset or trainer.train_dataset
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = map(dataset.__getitem__, range(len(dataset)))
        encoder = trainer.data_collator.encoder
        encoded = (item for item, _ in (encode_item(item, encoder) for item in dataset) if item is not None)
        return find_questions(itertools.islice(_readable(encoded), SAMPLES_SHOWN), processor)[:SAMPLES_SHOWN], None
    items = encode_test(data.test, trainer.data_collator.encoder)
    items = list(_readable(map(items.__getitem__, range(len(items)))))
    kinds = None
    if {"kind", "subset"} <= set(data.test.rows.column_names):
        labels = data.test.rows.select_columns(["kind", "subset"]).with_format(None)
        labels = list(zip(labels["kind"], labels["subset"]))
        kinds = [labels[item["position"]] for item in items]
    questions = find_questions(items, processor, kinds)
    answers = generate_answers(
        model,
        processor,
        questions,
        trainer.args.per_device_eval_batch_size,
        do_sample=False,
        max_new_tokens=generation_args.max_new_tokens,
    )
    shares = exact_match(questions, answers)
    table = format_exact_match(shares)
    print(f"\nTest answers exactly right ({len(questions):,} questions, greedy decoding)\n{table}\n")
    trainer.save_metrics("test", {f"{subset}/{kind}": v for subset, by in shares.items() for kind, v in by.items()})
    return questions[:SAMPLES_SHOWN], table


def _readable(items):
    """Those of encoded items whose images can be read: one that cannot must not end a run that is trained."""
    for item in items:
        try:
            for reference in item["images"]:
                load_image(reference)
        except BadImage as error:
            print(f"left out of the questions: {error}")
        else:
            yield item


def _base_models(model_args):
    if model_args.model is not None:
        return read_base_models(model_args.model)
    names = (model_args.vision_model, model_args.text_model)
    return [name for name in names if isinstance(name, str) and not Path(name).exists()]


def _settings(dataset, args):
    return {
        "data": dataset,
        "epochs": f"{args.num_train_epochs:g}" if args.max_steps < 0 else f"{args.max_steps} steps",
        "conversations a step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "weight decay": args.weight_decay,
        "gradient clipping": args.max_grad_norm,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
    }


def _say_goodbye(stage, folder):
    print(f"The model, its processor, its card and samples.png are in {folder}. Load them with\n")
    print(f'    AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)')
    print(f'    AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)\n')
    sentence, command = stage.next
    print(f"{sentence}:\n")
    print(f"    {command.format(folder=folder)}\n")


__all__ = ["finish"]
