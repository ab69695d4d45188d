"""Every projector on the built-in data set, both stages from scratch: tokens, parameters, and what is answered right.

    python benchmarks/projectors.py OUT [--steps 400 700]

The recipe is recipes/shapes.yaml with fewer steps, and with an encoder as wide as the language model, so that
`identity` fits.
"""

import argparse
from pathlib import Path

from stages import recipe, train_both

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.configuration_vlm import PROJECTOR_SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(400, 700), help="of stage 1 and of stage 2")
    parser.add_argument("--projectors", nargs="+", default=list(PROJECTOR_SETTINGS))
    args = parser.parse_args()
    settings = recipe()
    settings["lr_scheduler_kwargs"] = {"num_decay_steps": 250}
    settings["pretrain"]["vision_model"]["hidden_size"] = settings["pretrain"]["text_model"]["hidden_size"]
    settings["pretrain"] |= {"max_steps": args.steps[0], "output_dir": "pretrain"}
    settings["sft"] |= {"max_steps": args.steps[1], "output_dir": "sft", "model": "pretrain"}
    print("| projector | settings | tokens an image | parameters | mean, seen pairs | unseen pairs |")
    print("|---|---|---|---|---|---|", flush=True)
    for projector in args.projectors:
        more = {"num_queries": 16} if projector == "resampler" else {}
        settings["pretrain"] |= {"projector_type": projector, "projector_settings": more or None}
        shares = train_both(args.out / projector, settings)
        model = VLMForConditionalGeneration.from_pretrained(args.out / projector / "sft")
        config: VLMConfig = model.config
        given = ", ".join(f"{name} {value}" for name, value in config.projector_settings.items()) or "-"
        size = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
        print(
            f"| `{projector}` | {given} | {config.image_seq_length} | {size:,} | "
            f"{shares['exact_match/seen pairs/mean']:.1%} | {shares['exact_match/unseen pairs/mean']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
