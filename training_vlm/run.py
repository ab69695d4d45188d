"""What both training scripts share: check, load, report, train, save.

Everything that can be known to fail is checked before the first step, and each failure is one line that says how to
mend it. The scripts read as the order of these functions.
"""

import functools
import itertools
import os
import shutil
import sys
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.utils import logging

from evaluation_vlm.questions import draw_samples, exact_match, find_questions, format_exact_match, generate_answers
from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from processing import VLMDataCollator, VLMProcessor
from processing.batching.dataset import encode_item
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage, load_image
from processing.tokenizer import train_tokenizer

from .arguments import Arguments, DataArguments, ModelArguments, VLMTrainingArguments, backbone_of
from .data import (
    PRETRAIN,
    SFT,
    Data,
    Stage,
    Survey,
    encode_data,
    encode_test,
    load_data,
    report_data,
    training_texts,
    write_data_report,
)
from .learning.trainer import VLMTrainer
from .learning.tuning import apply_tuning, describe_parts
from .model_card import read_base_models, write_model_card


SAMPLES_SHOWN = 8


def one_line_errors(main):
    """Print what a person did wrong as one line and exit with 1; `DUET_TRACEBACK=1` shows where it was found."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except Exception as error:
            if not getattr(error, "is_duet_error", False) or os.environ.get("DUET_TRACEBACK"):
                raise  # what is our own mistake keeps its stack trace
            # An error from a worker process carries that process's traceback; its last line is the message.
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            worker = "in DataLoader worker process" in lines[0]
            line = lines[-1].partition(": ")[2] if worker else " ".join(lines)
            print(f"error: {line}", file=sys.stderr)
            sys.exit(1)

    return wrapped


def prepare(training_args: VLMTrainingArguments) -> None:
    """
    Check the output folder and the devices, and seed everything.

    Raises:
        ValueError: the folder holds something, there is nothing to resume, or several devices without a launcher.
    """
    if training_args.n_gpu > 1:
        raise DuetError(
            f"{training_args.n_gpu} GPUs are visible to one process; run `accelerate launch {Path(sys.argv[0]).name} "
            "...` to use them, or set CUDA_VISIBLE_DEVICES to one."
        )
    if training_args.output_dir == "trainer_output":
        raise DuetError("no output folder is named; add --output_dir FOLDER.")
    folder = Path(training_args.output_dir)
    resume = training_args.resume_from_checkpoint
    if resume is not None:
        if str(resume).lower() in ("last", "true"):
            resume = _last_checkpoint(folder)
        if resume is None or not _is_complete(Path(resume)):
            raise DuetError(
                f"there is no checkpoint to resume from at {resume or folder}; expected a folder such as "
                f"{folder / 'checkpoint-500'}; leave out --resume_from_checkpoint to start anew."
            )
        training_args.resume_from_checkpoint = str(resume)
    elif folder.is_dir() and any(folder.iterdir()):
        if not training_args.overwrite_output_dir:
            raise DuetError(
                f"the output folder {folder} holds something already; name another, or add --overwrite_output_dir, or "
                "--resume_from_checkpoint last to go on with it."
            )
        with training_args.main_process_first(desc="removing old checkpoints"):
            for checkpoint in folder.glob("checkpoint-*"):  # or a later resume would take one of them for its own
                shutil.rmtree(checkpoint, ignore_errors=True)
    if training_args.process_index > 0:
        datasets.disable_progress_bars()
    logging.disable_progress_bar()  # of loading weights; the Trainer draws its own
    set_seed(training_args.seed)


def _last_checkpoint(folder: Path) -> Path | None:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in checkpoints if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    """Whether the saving of a checkpoint came to its end: the Trainer's state is what it writes last."""
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return True


def load_model(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, data: Data
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """
    The model and its processor: an earlier stage's folder, or two backbones composed.

    Raises:
        ValueError: neither or both are named, a checkpoint of another kind, or parts that do not fit together.
    """
    dtype = getattr(torch, model_args.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DuetError(f"dtype={model_args.dtype!r}: expected float32, bfloat16 or float16.")
    if model_args.model is not None:
        check_composed(model_args)
        model, processor = _load_composed(model_args, dtype)
        starts = {"vision": "frozen", "text": "frozen"}
    elif model_args.vision_model is not None and model_args.text_model is not None:
        model, processor = _compose(stage, model_args, data_args, data, dtype)
        scratch = {side: isinstance(getattr(model_args, f"{side}_model"), dict) for side in ("vision", "text")}
        starts = {side: "full" if scratch[side] else "frozen" for side in scratch}
    else:
        raise DuetError(
            "no model is named; add --model FOLDER (a composed model) or --vision_model NAME and --text_model NAME."
        )
    check_fit(model, processor)
    processor.update_generation_config(model.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # What the Trainer would do, with a warning: say in the config what the tokenizer says.
        if (value := getattr(processor.tokenizer, name)) is not None:
            setattr(model.config.text_config, name, value)
            if name == "bos_token_id":
                model.generation_config.bos_token_id = value
    apply_tuning(
        model,
        model_args.tune_vision or starts["vision"],
        model_args.tune_text or starts["text"],
        model_args.freeze_embeddings,
    )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DuetError(
            f"nothing would learn: both backbones are frozen, and the projector {model.config.projector_type} has "
            "no parameters; add --tune_text or --tune_vision, or choose another projector_type."
        )
    return model, processor


def check_composed(model_args: ModelArguments) -> None:
    """
    Refuse a `model` that is not there, or is none of Duet's, before anything large is read.

    Raises:
        ValueError: what it is, or that there is none.
    """
    name = model_args.model
    if others := model_args.composing_settings():
        raise DuetError(
            f"model and {others[0]} are both given, and {name} is composed already; leave out one of them."
        )
    if not Path(name).exists() and (Path(name).is_absolute() or name.count("/") != 1):
        raise DuetError(
            f"there is no model in {name}; expected the output folder of stage 1: run "
            f"`python train_pretrain.py --output_dir {name} ...` first."
        )
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=model_args.model_revision)
    except (OSError, ValueError) as error:
        raise DuetError(f"the model {name!r} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if settings.get("model_type") != VLMConfig.model_type:
        raise DuetError(
            f"{name} is a {settings.get('model_type')} checkpoint; expected a model composed by Duet (the output "
            "folder of train_pretrain.py). Backbones go into --vision_model and --text_model."
        )


def _load_composed(model_args, dtype):
    name = model_args.model
    attention = {f"{side}_config": getattr(model_args, f"{side}_attn_implementation") for side in ("vision", "text")}
    model = VLMForConditionalGeneration.from_pretrained(
        name,
        revision=model_args.model_revision,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=Path(name).is_dir() or model_args.trust_remote_code,
    )
    processor = VLMProcessor.from_pretrained(name, revision=model_args.model_revision)
    if model_args.chat_template is not None:
        processor.set_chat_template(model_args.chat_template)
    return model, processor


def _compose(stage, model_args, data_args, data, dtype):
    vision, text = model_args.vision_models(), backbone_of("text_model", model_args.text_model)
    tokenizer = model_args.tokenizer
    if tokenizer is None and isinstance(text, PreTrainedConfig):
        tokenizer = tokenizer_from_scratch(stage, data_args, data, text)
        text.pad_token_id, text.bos_token_id = tokenizer.pad_token_id, None
        text.eos_token_id = tokenizer.eos_token_id
    shared = {
        "tokenizer": tokenizer,
        "image_token": model_args.image_token,
        "vision_kwargs": model_args.backbone_kwargs("vision"),
        "text_kwargs": model_args.backbone_kwargs("text"),
    }
    model = VLMForConditionalGeneration.from_backbones(
        vision, text, dtype=dtype, **model_args.composition(), **shared
    )
    processor = VLMProcessor.from_backbones(
        vision,
        text,
        model.config,
        chat_template=model_args.chat_template,
        image_mode=model_args.image_mode,
        **shared,
    )
    return model, processor


def tokenizer_from_scratch(
    stage: Stage, data_args: DataArguments, data: Data, text_config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model from scratch, trained on the texts; one entry is left for the image token."""
    limit = getattr(text_config, "max_position_embeddings", None) or int(1e30)
    return train_tokenizer(training_texts(stage, data_args, data), text_config.vocab_size - 1, limit)


def check_fit(model: VLMForConditionalGeneration, processor: VLMProcessor) -> None:
    """
    Refuse a processor that does not belong to the model.

    Raises:
        ValueError: what differs, on both sides.
    """
    config = model.config
    for what, ours, theirs in (
        ("image_token_id", config.image_token_id, processor.image_token_id),
        ("image_seq_length", config.image_seq_length, processor.image_seq_length),
        ("max_tiles", config.max_tiles, processor.max_tiles),
        ("image_size", tuple(config.image_size), processor.view_size),
    ):
        if ours != theirs:
            raise DuetError(
                f"processor and model do not belong together: {what} is {theirs} in the processor and {ours} in the "
                "model; use the processor that was saved with the model."
            )
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        raise DuetError(
            f"processor and model do not belong together: the tokenizer has {len(processor.tokenizer)} entries, the "
            f"language model {model.get_input_embeddings().num_embeddings} embeddings; use the processor saved with it."
        )


def choose_max_length(model: VLMForConditionalGeneration, asked: int | None) -> int:
    """
    Positions a training sequence may have: those asked for, else all that the language model has.

    Raises:
        ValueError: more than were learned, or not even room for an image and a token.
    """
    learned = model.model.max_positions
    limit = learned or getattr(model.config.text_config, "max_position_embeddings", None) or 1 << 20
    if asked is not None and learned is not None and asked > learned:
        raise DuetError(
            f"max_length={asked} is more than the {learned} positions that the language model "
            f"({model.config.text_config.model_type}) has learned; set max_length to {learned} or less."
        )
    chosen = limit if asked is None else asked
    if chosen <= model.config.image_tokens():
        raise DuetError(
            f"max_length={chosen} leaves no room for text beside an image of {model.config.image_tokens()} tokens; set "
            "a larger max_length, or choose fewer visual tokens (projector_type: resampler, or "
            "vision_feature_select_strategy: cls)."
        )
    return chosen


def build_trainer(stage: Stage, arguments: Arguments, model, processor: VLMProcessor, train, evaluation) -> VLMTrainer:
    """The Trainer of a stage; its collator and its data agree on how a conversation is encoded."""
    _, data_args, _, training_args = arguments
    if not evaluation:
        evaluation = None
        training_args.eval_strategy = "no"
    return VLMTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        data_collator=VLMDataCollator(
            processor,
            choose_max_length(model, data_args.max_length),
            encode=stage.encoder(data_args),
            pad_to_multiple_of=data_args.pad_to_multiple_of,
            on_bad_sample=data_args.on_bad_sample,
            account=True,
        ),
        train_dataset=train,
        eval_dataset=evaluation,
    )


def report(stage: Stage, trainer: VLMTrainer, surveys: dict[str, Survey]) -> None:
    """Say what will learn, at which rate, and from what; in one process."""
    if not trainer.is_world_process_zero():
        return
    args, rate = trainer.args, f"{trainer.args.learning_rate:g}"
    print(f"\nStage {stage.number}, {stage.name}\n")
    print(f"{'part':<18}{'parameters':>14}{'learn':>14}   rate")
    for part in describe_parts(trainer.model):
        print(f"{part.name:<18}{part.parameters:>14,}{part.trained:>14,}   {rate if part.trained else '-'}")
    print(f"\n{report_data(surveys)}")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    print(
        f"{batch} conversations a step ({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x "
        f"{args.world_size} processes), {precision}, {args.device}, to {args.output_dir}\n",
        flush=True,
    )


def train(trainer: VLMTrainer) -> dict[str, float]:
    """Train, from the checkpoint that `prepare` found where one was asked for; then evaluate. Gives the losses."""
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    losses = {"train_loss": result.training_loss}
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        losses["eval_loss"] = metrics["eval_loss"]
    return losses


def finish(stage: Stage, arguments: Arguments, trainer: VLMTrainer, data: Data, losses: dict[str, float]) -> None:
    """
    Leave a folder that needs nothing else: model, processor, card, samples; and say how to go on.

    The test questions are answered by greedy decoding; the samples as `GenerationArguments` say.
    """
    model_args, data_args, generation_args, args = arguments
    processor, folder = trainer.processing_class, Path(args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    for key, value in generation_args.to_generate().items():
        setattr(model.generation_config, key, value)
    trainer.save_model()
    account = trainer.gathered_account()
    if trainer.is_world_process_zero():
        print(f"\nconsumed\n{write_data_report(folder, account, trainer.train_dataset).table()}")
        shown, exact = _answer(stage, trainer, model, processor, data, data_args, generation_args)
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
            stage=stage.number,
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


def _answer(stage, trainer, model, processor, data, data_args, generation_args):
    """Questions to show, and the exact-match table of the test split where there is one."""
    if data.test is None:
        dataset = trainer.eval_dataset or trainer.train_dataset
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = map(dataset.__getitem__, range(len(dataset)))
        settings = (processor, stage.encoder(data_args), choose_max_length(model, data_args.max_length))
        encoded = (item for item, _ in (encode_item(item, *settings) for item in dataset) if item is not None)
        return find_questions(itertools.islice(_readable(encoded), SAMPLES_SHOWN), processor)[:SAMPLES_SHOWN], None
    items = encode_test(stage, data.test, processor, choose_max_length(model, data_args.max_length))
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
    if stage is PRETRAIN:
        print("Next, teach it to answer:\n")
        print(f"    python train_sft.py --model {folder} --dataset DIALOGUES --output_dir FOLDER\n")
    else:
        print("Next, ask it about an image:\n")
        print(f'    python -m inference_vlm.ask {folder} IMAGE "What is in the picture?"\n')


__all__ = [
    "PRETRAIN",
    "SFT",
    "build_trainer",
    "choose_max_length",
    "encode_data",
    "finish",
    "load_data",
    "load_model",
    "one_line_errors",
    "prepare",
    "report",
    "train",
]
