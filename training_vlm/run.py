"""The story of a run, which both training scripts tell: prepare, build, report, train.

Everything that can be known to fail is checked before the first step, and each failure is one line that says how to
mend it.
"""

import functools
import os
import sys
from pathlib import Path

import datasets
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from inference_vlm.program import ended_by, show_any_text
from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.generation_vlm import savable
from processing import VLMDataCollator
from processing.batching.account import number_of
from processing.batching.dataset import StreamedDataset
from processing.batching.encoding import Encoder
from processing.data_error_vlm import DuetError, in_a_line

from .arguments import GenerationArguments
from .cache_features import train_on_features
from .defaults import decided
from .examine import examine
from .learning.adapters import composed
from .learning.checkpoints import find_checkpoint, is_auto, newest_whole
from .learning.disk import DiskFull
from .learning.lineage import note_run, read_run
from .learning.originals import hold_frozen
from .learning.probe import why_not_packed
from .learning.publishing import was_pushed
from .learning.record import record_of
from .learning.sampling import order_of
from .learning.savings import Probe, choose_savings, plan_batches
from .learning.sharding import cut_at_blocks
from .learning.trainer import VLMTrainer
from .learning.tuning import make_plan
from .machines import check_launch
from .settings import Arguments
from .stages import Stage
from .survey import Survey, report_data
from .training_arguments import VLMTrainingArguments, precision_of


def one_line_errors(main):
    """
    Print what a person did wrong as one line and exit with 1, and after Ctrl-C with 130.

    `DUET_TRACEBACK=1` shows where it was found.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        show_any_text()
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt as error:
            sys.exit(ended_by(error))
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
        DuetError: the folder holds something, there is nothing to resume, several devices without a launcher, or a
            launcher that did not do as it was told.
        SystemExit: the run has come to its end, and there is nothing to go on from.
    """
    check_launch(training_args)
    if training_args.n_gpu > 1:
        script = Path(sys.argv[0]).stem.replace("duet-", "train_")  # a launcher starts modules, not commands
        raise DuetError(
            f"{training_args.n_gpu} GPUs are visible to one process; run `accelerate launch -m {script} ...` to use "
            "them, or set CUDA_VISIBLE_DEVICES to one."
        )
    if training_args.output_dir == "trainer_output":
        raise DuetError("no output folder is named; add --output_dir FOLDER.")
    assert training_args.output_dir is not None  # where none is given, the library has a name
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise DuetError(f"the output folder {folder} is a file; name another.")
    training_args.is_restart = is_auto(training_args.resume_from_checkpoint)
    with training_args.main_process_first(desc="looking for a checkpoint"):
        found = find_checkpoint(training_args.resume_from_checkpoint, folder, training_args.process_index == 0)
    if found is None:
        _check_start(training_args, folder)
    training_args.resume_from_checkpoint = None if found is None else str(found)
    if training_args.process_index > 0 or training_args.disable_tqdm:
        datasets.disable_progress_bars()
    logging.disable_progress_bar()  # that of loading weights; the Trainer draws its own
    set_seed(training_args.seed)


def _check_start(training_args, folder):
    """See that a run may begin in a folder, and that it does not begin again what is done."""
    auto, main = training_args.is_restart, training_args.process_index == 0
    if training_args.overwrite_output_dir or not folder.is_dir() or not any(folder.iterdir()):
        return
    known = read_run(folder)
    if auto and known is not None and known.get("finished"):
        if not was_pushed(known, training_args):
            raise DuetError(
                f"push_to_hub: the run in {folder} has come to its end and kept no checkpoint to go on from; push its "
                "model and its processor with their own push_to_hub, in Python."
            )
        if main:
            print(
                f"the run in {folder} has come to its end, step {known['finished']}, and kept no checkpoint: nothing "
                f"is left to do. --model {folder} trains its model further."
            )
        sys.exit(0)
    if auto and known is not None and known.get("trained"):
        raise DuetError(
            f"the run in {folder} has made all its steps, {known['trained']}, and its model is there; what came after "
            f"them failed, and there is no checkpoint to go on from: use the model (--model {folder} trains it "
            "further), or add --overwrite_output_dir in place of --resume_from_checkpoint to train anew."
        )
    if auto and (known is not None or not (folder / "config.json").is_file()):
        return
    if auto:
        raise DuetError(
            f"the output folder {folder} holds a model, and nothing says that this run wrote it; name another, or add "
            "--overwrite_output_dir to have it replaced."
        )
    whole = newest_whole(folder)
    go_on = "" if whole is None else f", or --resume_from_checkpoint auto to go on from {whole.name}"
    raise DuetError(
        f"the output folder {folder} holds something already; name another, or add --overwrite_output_dir{go_on}."
    )


def build_trainer(
    arguments: Arguments, model, encoder: Encoder, train, evaluation, test=None, probe: Probe = why_not_packed
) -> VLMTrainer:
    """The Trainer of a stage; its collator and its data agree on how a conversation is encoded."""
    data_args, training_args = arguments.data, arguments.training
    settle_generation(model, arguments.generation)
    if not evaluation:
        evaluation = None
        training_args.eval_strategy = "no"
    collator = VLMDataCollator(
        encoder,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
        on_bad_sample=data_args.on_bad_sample,
        account=True,
    )
    if not isinstance(train, StreamedDataset):
        check_batch(arguments, len(train), training_args.world_size)
    originals = hold_frozen(model, arguments.efficiency.frozen_dtype, training_args)
    try:
        trainer = VLMTrainer(
            model=model,
            args=training_args,
            processing_class=encoder.processor,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=evaluation,
        )
    except DuetError:
        raise
    except (ValueError, OSError, ImportError) as error:  # such as fsdp in one process, or a Hub that cannot be reached
        raise DuetError(f"the Trainer cannot be made with these settings: {in_a_line(error)}") from error
    cut_at_blocks(trainer)
    trainer.plan = make_plan(model, arguments.tuning, training_args)
    if trainer.is_deepspeed_enabled and not trainer.plan.is_stock(training_args):
        plugin = trainer.accelerator.state.deepspeed_plugin
        if "optimizer" in plugin.deepspeed_config:
            raise DuetError(
                "DeepSpeed's config names an optimizer, which knows one rate and one decay; leave it out, so that "
                "the Trainer's is used, or give all parts the same."
            )
    if originals.is_holding and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise DuetError("--frozen_dtype: FSDP and DeepSpeed hold and save the weights themselves; leave it out.")
    if (folder := arguments.efficiency.cache_vision_features) is not None:
        train_on_features(trainer, [train, evaluation, test], folder, originals)
    trainer.add_callback(originals)
    savings = choose_savings(arguments.efficiency, trainer, probe)
    trainer.savings = savings._replace(is_cached=collator.features is not None)
    collator.padding_free, collator.share_prefix = trainer.savings.padding_free, trainer.savings.share_prefix
    if isinstance(train, StreamedDataset):
        train.keeps_rows = collator.share_prefix
    trainer.planned = plan_batches(arguments.efficiency, trainer)
    trainer.order = order_of(trainer, data_args, arguments.efficiency)
    examine(trainer, arguments, encoder, test)
    trainer.describe = functools.partial(record_of, trainer, arguments.model)
    return trainer


def check_batch(arguments: Arguments, conversations: int, processes: int) -> None:
    """
    See that `dataloader_drop_last` leaves something; batches that are planned by positions are never dropped.

    Raises:
        DuetError: it does not.
    """
    args = arguments.training
    if not args.dataloader_drop_last or arguments.efficiency.max_tokens_per_batch is not None:
        return
    batch = args.per_device_train_batch_size * processes
    if 0 < conversations < batch:
        raise DuetError(
            f"dataloader_drop_last leaves nothing to learn from: {number_of(conversations, 'conversation')} of a batch "
            f"of {batch}; lower per_device_train_batch_size, or leave it out."
        )


def settle_generation(model: VLMForConditionalGeneration, generation_args: GenerationArguments) -> None:
    """Put what was told of generation over what the language model brings: the defaults saved with the model."""
    model = composed(model)
    config = model.generation_config
    vars(config).update(generation_args.told(), max_length=None)  # which counted the prompt, and not its images
    model.generation_config, _ = savable(config)


def report(stage: Stage, arguments: Arguments, trainer: VLMTrainer, surveys: dict[str, Survey]) -> None:
    """Say what will learn, at which rate, and from what; in one process."""
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    print(f"\nStage {stage.number}, {stage.name}\n")
    print(f"{'part':<18}{'parameters':>16}{'learn':>16}   {'how':<8}  {'rate':<8}  decay")
    for part in trainer.declared().components():
        rate, decay = (f"{part.learning_rate:g}", f"{part.weight_decay:g}") if part.trained else ("-", "-")
        print(f"{part.name:<18}{part.parameters:>16,}{part.trained:>16,}   {part.policy:<8}  {rate:<8}  {decay}")
    print("", *decided(arguments, composed(trainer.model).config), sep="\n")
    print(f"\n{report_data(surveys)}")
    print(trainer.savings)
    print(f"{trainer.conversations_a_step()}, {precision_of(args)}, {args.device}, to {args.output_dir}\n", flush=True)


def train(trainer: VLMTrainer) -> TrainOutput:
    """Train, from the checkpoint that `prepare` found where one was asked for; the model is on disk afterwards."""
    if trainer.args.should_save:
        note_run(trainer.run_folder)  # what is begun here may be begun again
    first = WeightsFirst(trainer)
    trainer.add_callback(first)
    try:
        result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except Exception as error:
        if first.saved and trainer.is_world_process_zero():
            print(f"All steps are done, and the model is in {trainer.args.output_dir}; what failed came after them.")
        elif not first.saved and not isinstance(error, DiskFull):
            _rescue(trainer)
        raise
    trainer.remove_callback(first)
    if trainer.is_finished:
        return result
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    if best or not first.saved:
        trainer.save_model(_internal_call=True)
    return result


def _rescue(trainer):
    try:
        if (checkpoint := trainer.rescue()) is not None:
            print(f"What was learned until then is in {checkpoint}; go on with --resume_from_checkpoint auto.")
    except Exception as error:  # the one that ends the run tells more
        print(f"What was learned since the last checkpoint could not be saved: {error}")


class WeightsFirst(TrainerCallback):
    """
    Saves the model after the last step, before the evaluation and the checkpoint that follow it can fail.

    Attributes:
        saved (`bool`): whether it did.
    """

    def __init__(self, trainer: VLMTrainer):
        self.trainer, self.saved = trainer, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            self.trainer.save_model(_internal_call=True)  # which does not push it
            self.saved = True
            if args.should_save:  # and is not trained again where no checkpoint is kept
                note_run(self.trainer.run_folder, trained=state.global_step)


__all__ = ["build_trainer", "check_batch", "one_line_errors", "prepare", "report", "train"]
