"""Stage 2, instruction tuning: learn to answer in dialogues, going on from stage 1's folder.

    python train_sft.py                                         # the built-in data set, after train_pretrain.py
    python train_sft.py --config flickr30k_vit_distilgpt2       # a recipe, or a yaml file of yours
    accelerate launch train_sft.py --model outputs/aligned --tune_text full --dataset dialogues.jsonl \\
        --image_dir images --output_dir outputs/assistant

Every option of `TrainingArguments` works; `--help` lists them with Duet's own.
"""

from training_vlm.data import encode_data, encode_test, load_data
from training_vlm.finish import finish
from training_vlm.learning.stopping import exiting_when_told
from training_vlm.load import check_model, choose_max_length, load_model
from training_vlm.model_card import RunCard
from training_vlm.run import build_trainer, one_line_errors, prepare, report, train
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT
from training_vlm.survey import survey_data


@one_line_errors
@exiting_when_told()
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(SFT, argv)
    model_args, data_args, training_args = arguments.model, arguments.data, arguments.training
    prepare(training_args)
    check_model(model_args)

    data = load_data(SFT, data_args, training_args, arguments.evaluation.predict_with_generate)
    model, processor = load_model(SFT, arguments, data)
    encoder = SFT.encoder(processor, data_args, choose_max_length(model, data_args.max_length))
    train_set, eval_set = encode_data(data, encoder, data_args, training_args)
    test_set = encode_test(data, encoder, training_args)
    surveys = survey_data(SFT, train_set, eval_set, test_set, encoder, data_args, training_args)

    trainer = build_trainer(arguments, model, encoder, train_set, eval_set, test_set)
    trainer.card = RunCard(SFT, arguments, trainer)
    report(SFT, arguments, trainer, surveys)
    result = train(trainer)
    finish(SFT, arguments, trainer, data, test_set, result)


if __name__ == "__main__":
    main()
