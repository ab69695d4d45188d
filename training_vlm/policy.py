"""What learns, how fast and by which means: one declared policy for vision encoder, projector and language model.

Each part has its word, its rate and its decay; where none is said, the rate is `learning_rate` and the decay
`weight_decay`. A setting that nothing would read, such as a rate of what is frozen, is refused here or when the model
is there (`learning/tuning.py`).
"""

from dataclasses import dataclass, field, fields

from processing.data_error_vlm import DuetError


_OF_A_PART = ("vision_learning_rate", "projector_learning_rate", "vision_weight_decay", "projector_weight_decay")


@dataclass
class TuningArguments:
    """Which parts of the model learn, each at which rate, and by which means."""

    tune_vision: str | None = field(
        default=None,
        metadata={
            "help": "What learns of the vision encoder: frozen, full, last:N (its last N blocks), or lora. Frozen if "
            "not given, full where it starts from scratch."
        },
    )
    tune_projector: str | None = field(
        default=None, metadata={"help": "What learns of the projector: full, or frozen. Full if not given."}
    )
    tune_text: str | None = field(
        default=None, metadata={"help": "What learns of the language model, as of the vision encoder."}
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Keep the language model's token embeddings, whatever else learns."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the vision encoder; learning_rate if not given."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Rate of the projector; learning_rate if not given."}
    )
    vision_weight_decay: float | None = field(
        default=None, metadata={"help": "Decay of the vision encoder; weight_decay if not given."}
    )
    projector_weight_decay: float | None = field(
        default=None, metadata={"help": "Decay of the projector; weight_decay if not given."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters, where a part's policy is lora."})
    lora_alpha: int = field(default=32, metadata={"help": "What the adapters' output is scaled by, times the rank."})
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout of the adapters' inputs; 0.05 if not given, 0 where peft cannot (experts)."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter, by peft's rules: names or their ends, one pattern of whole names, or "
            "all-linear; every linear layer of the blocks, and experts, if not given."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "Adapters that learn magnitudes apart: DoRA."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapters by the root of their rank: rank-stabilised LoRA."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the language model in 4 bit (QLoRA); needs bitsandbytes."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the language model in 8 bit, likewise."})
    merge_first: bool = field(
        default=False, metadata={"help": "Merge the adapter of `model` into its base before anything learns."}
    )

    # Where each setting that decides what learns came from, by name; `None` where no command line was read.
    sources: dict[str, str] | None = field(default=None, init=False)

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise DuetError("load_in_4bit and load_in_8bit are both given; leave one out.")
        if isinstance(self.lora_target_modules, str):  # as yaml may have one name
            self.lora_target_modules = [self.lora_target_modules]
        for name in _OF_A_PART:
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise DuetError(f"{name}={value}: expected 0 or more.")
        for name, fits, wanted in (
            ("lora_r", self.lora_r >= 1, "1 or more"),
            ("lora_alpha", self.lora_alpha > 0, "more than 0"),
            ("lora_dropout", 0 <= (self.lora_dropout or 0) < 1, "0 or more, and less than 1"),
        ):
            if not fits:
                raise DuetError(f"{name}={getattr(self, name)}: expected {wanted}.")
        self._check_adapters()

    @property
    def has_adapters(self) -> bool:
        """Whether a part learns through adapters."""
        return "lora" in (self.tune_vision, self.tune_text)

    def check_told(self) -> None:
        """
        Refuse settings that were given and that nothing would read; to be asked once it is settled what learns.

        Raises:
            DuetError: which.
        """
        self._check_adapters()
        if self.freeze_embeddings and self.tune_text != "full":
            raise DuetError(
                f"freeze_embeddings: with tune_text={self.tune_text} the token embeddings stay as they are; leave it "
                "out, or let the language model learn whole (tune_text=full)."
            )

    def _check_adapters(self):
        if not self.has_adapters and (told := self.told_of_lora()):
            raise DuetError(f"{told[0]} is about adapters, and no part's policy is lora; leave it out.")

    def told_of_lora(self) -> list[str]:
        """The settings of adapters that were given, whatever their value, or are not as they are by default."""
        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")
        given = self.sources or {}
        return [
            f.name for f in fields(self) if f.name in names and (f.name in given or getattr(self, f.name) != f.default)
        ]


__all__ = ["TuningArguments"]
