"""What the two models give: the library's outputs, and what images and mixtures of experts add.

The file travels with every checkpoint.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)


@dataclass
class VLMModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of `VLMModel`.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden)`, *optional*):
            The projected image features in the order in which they were put into the sequence.
        image_outputs (`BaseModelOutputWithPooling`, *optional*): output of `get_image_features`.
        router_logits (`tuple(torch.Tensor)`, *optional*): those of each layer of a mixture of experts, where asked for.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class VLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of `VLMForConditionalGeneration`.

    Args:
        loss (`torch.Tensor`, *optional*, returned when `labels` is given):
            Next-token loss, the mean over the supervised tokens.
        logits (`torch.Tensor` of shape `(batch, tokens, vocab)`, or `(kept, vocab)` for a mask in `logits_to_keep`):
            Scores of every vocabulary entry before the softmax; none with `skip_logits`.
        cache (`Cache`, *optional*): keys and values of the language model (before transformers 5.24 `past_key_values`).
        hidden_states (`tuple(torch.Tensor)`, *optional*): the language model's, each `(batch, tokens, hidden)`.
        attentions (`tuple(torch.Tensor)`, *optional*): the language model's.
        image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden)`, *optional*):
            The projected image features.
        image_outputs (`BaseModelOutputWithPooling`, *optional*): output of `get_image_features`.
        aux_loss (`torch.Tensor`, *optional*): the load balancing loss of a mixture of experts, in `loss` by its weight.
        router_logits (`tuple(torch.Tensor)`, *optional*): those of each layer of a mixture of experts.
        token_costs (`torch.Tensor` of shape `(batch, tokens)`, *optional*, returned with `skip_logits`):
            What each (kept) position's prediction costs, by its weight, in float32; 0 where nothing is predicted. No
            gradient goes through it.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    token_costs: torch.Tensor | None = None


__all__ = ["VLMCausalLMOutputWithPast", "VLMModelOutputWithPast"]
