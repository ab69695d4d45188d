"""Pictures for the reporters of a Trainer that take some: TensorBoard, Weights & Biases, trackio.

What is special: nothing is started or imported here that the Trainer's own callbacks have not; where none of them is
on, nothing happens.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image


def report_image(trainer: Any, name: str, image: Image.Image) -> None:
    """
    Give a picture to every reporter of a trainer that takes one, under the step that was made.

    Args:
        trainer: a `Trainer`; its callbacks are those of the library.
        name: what the picture is called there.
    """
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback).__name__
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            writer.flush()
        elif kind in ("WandbCallback", "TrackioCallback"):
            _log(sys.modules.get("wandb" if kind == "WandbCallback" else "trackio"), name, image, step)


def _log(module: Any, name: str, image: Image.Image, step: int) -> None:
    """Log a picture to the run that the library's callback started, beside the numbers of its step."""
    if module is None or not _is_running(module):
        return
    module.log({name: module.Image(image), "train/global_step": step})


def _is_running(module: Any) -> bool:
    if hasattr(module, "context_vars"):  # trackio
        return module.context_vars.current_run.get() is not None
    return module.run is not None


__all__ = ["report_image"]
