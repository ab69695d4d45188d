"""The composed model behind whatever wraps it while it trains: adapters, processes, a compiler."""

from typing import Any

from accelerate.utils import extract_model_from_parallel


def composed(model: Any) -> Any:
    """
    The `VLMForConditionalGeneration` in a model.

    Adapters lie in its modules, so that it computes with them.

    Args:
        model: itself, or what peft, accelerate or torch put around it.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["composed"]
