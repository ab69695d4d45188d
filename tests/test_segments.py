"""A row of many texts is trained on as if each were a row of its own, in any language model and any attention."""

import json
import sys
import types

import pytest
import torch

from modeling_vlm import DuetError, attention_vlm
from modeling_vlm.attention_vlm import BY_SEGMENT
from modeling_vlm.backbones_vlm import CACHE
from tests import matrix
from tests.segments import IMAGE, Batches, Node, as_one_text, forest, model_of, off, step
from training_vlm.learning.probe import why_not_packed


FAMILIES = ["GPT-2", "Llama", "Gemma 2", "Gemma 3 text", "Mistral", "OPT", "gpt-oss", "StableLM", "Falcon"]
"""Learned positions; rotary ones; a soft cap; windows of some layers, of all; a mask needed for positions; sinks;
kwargs that do not reach attention; attention of its own."""

OTHERS = {
    "BLOOM": "cannot be run",  # biases that grow with the distance in the row, from a mask of its own
    "GPT-Neo": "cannot be run",  # a window of its own
    "MPT": "cannot be run",  # biases for so many positions
    "Falcon-H1": "see each other",  # recurrence
    "Granite 4": "see each other",
    "Jamba": "see each other",
    "Qwen3-Next": "see each other",
    "Qwen3.5 text": "see each other",
    "LFM2": "see each other",  # convolution
}
"""Language models of the matrix that keep texts of a row apart in no way, and what the probe says of them."""


def batches_of(model, seed=0):
    return forest(model, torch.Generator().manual_seed(seed))


DOUBLE = pytest.param(torch.float64, 1e-9, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), DOUBLE])
@pytest.mark.parametrize("name", [name for name in matrix.LANGUAGE_MODELS if name not in OTHERS])
def test_a_row_has_the_loss_and_gradients_of_the_padded_batch_and_leaking_texts_have_others(name, dtype, most):
    model = model_of(name, dtype=dtype)
    assert why_not_packed(model) is None
    batches = batches_of(model)
    loss, gradients = step(model, batches.padded)
    found, again = step(model, batches.packed)
    assert abs(found - loss) <= most * loss
    assert off(again, gradients) <= most
    assert off(step(model, as_one_text(batches.packed))[1], gradients) > 0.1


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_language_model_of_the_matrix_is_found_out(name):
    assert OTHERS[name] in why_not_packed(model_of(name))


@pytest.mark.parametrize("worth", [0, 10**9])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_how_segments_share_calls_changes_nothing(name, attention, worth, monkeypatch):
    if name in ("Gemma 2", "gpt-oss") and attention == "sdpa":
        pytest.skip("refused by the library")
    monkeypatch.setitem(attention_vlm.CALL, "cpu", worth)
    model = model_of(name, attention)
    batches = batches_of(model)
    loss, gradients = step(model, batches.padded)
    found, again = step(model, batches.packed)
    assert abs(found - loss) <= 1e-5 * loss
    assert off(again, gradients) <= 1e-5


def test_texts_of_like_lengths_and_groups_behind_like_prefixes_share_calls():
    row = [(0, 90), (90, 490), (490, 575), (575, 665)]  # three short texts and a long one
    segments = [(start, end, -1, number) for number, (start, end) in enumerate(row)]
    for image in (4, 7):  # two prefixes, each with two texts
        start = segments[-1][1]
        segments += [(start, start + 200, -1, -1)]
        segments += [(start + 200 + 15 * i, start + 215 + 15 * i, image, image + i) for i in range(2)]
    found = attention_vlm.Row(segments, segments[-1][1], torch.device("cpu")).calls()
    assert [[(run.first, run.behind, run.seen) for run in call] for call in found] == [
        [(0, 1, []), (3, 4, []), (2, 3, [])],
        [(1, 2, [])],
        [(4, 5, []), (7, 8, [])],
        [(5, 7, [4]), (8, 10, [7])],
    ]


@pytest.mark.parametrize("name, attention", [("GPT-2", "eager"), ("Llama", "eager"), ("Mistral", None)])
def test_a_row_has_the_gradients_of_the_padded_batch_in_double_precision(name, attention):
    model = model_of(name, attention, torch.float64)
    batches = batches_of(model)
    loss, gradients = step(model, batches.padded)
    found, again = step(model, batches.packed)
    assert abs(found - loss) <= 1e-9 * loss
    assert off(again, gradients) <= 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["GPT-2", "Gemma 3 text", "StableLM"])
def test_layers_that_run_again_for_their_gradients_see_what_they_saw(name, reentrant):
    model = model_of(name)
    batches = batches_of(model)
    loss, gradients = step(model, batches.padded)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, again = step(model, batches.packed)
    assert found == pytest.approx(loss, rel=1e-5)
    assert off(again, gradients) <= 1e-5


@pytest.mark.parametrize("name", ["GPT-2", "Mistral"])
def test_a_text_changes_no_logit_of_another(name):
    model = model_of(name).eval()
    batch = batches_of(model).packed
    with torch.no_grad():
        before = model(**batch).logits
        for number, (start, end, _, text) in enumerate(batch["segments"]):
            if text < 0:
                continue
            ids = batch["input_ids"].clone()
            words = (batch["feature_index"] < 0)[0, start:end].nonzero().flatten() + start
            ids[0, words] = (ids[0, words] + 1) % 300
            after = model(**{**batch, "input_ids": ids}).logits
            same = (after == before).all(-1)[0]
            assert same[:start].all() and same[end:].all() and not same[words[1:]].any(), number


def test_an_image_changes_logits_of_its_texts_alone():
    model = model_of("Llama").eval()
    batch = batches_of(model).packed
    with torch.no_grad():
        before = model(**batch).logits
        pixel_values = batch["pixel_values"].clone()
        pixel_values[1] += 1
        same = (model(**{**batch, "pixel_values": pixel_values}).logits == before).all(-1)[0]
    size, index = model.config.image_seq_length, batch["feature_index"][0]
    first = int((index >= size).nonzero()[0])
    words = int(batch["segments"][-1][0])
    assert same[:first].all() and not same[first:words].any() and same[words:].all()


@pytest.mark.parametrize("worth", [0, 4096, 10**9])
def test_prefixes_may_be_shared_at_any_depth(worth, monkeypatch):
    monkeypatch.setitem(attention_vlm.CALL, "cpu", worth)
    model = model_of("Gemma 3 text")
    generator = torch.Generator().manual_seed(0)

    def grown(depth):
        ids = torch.randint(1, 300, (4 + depth,), generator=generator).tolist()
        return Node(ids, [grown(depth - 1), grown(depth - 1)] if depth else [])

    root = grown(3)
    root.ids.insert(2, IMAGE)
    root.images = [0]
    batches = Batches([root], model, torch.randn(1, 3, *model.config.image_size, generator=generator))
    assert (
        max(
            len(above)
            for above in attention_vlm.Row(batches.segments, batches.segments[-1][1], torch.device("cpu")).ancestors
        )
        == 3
    )
    loss, gradients = step(model, batches.padded)
    found, again = step(model, batches.packed)
    assert abs(found - loss) <= 1e-5 * loss
    assert off(again, gradients) <= 1e-5


def test_positions_are_those_of_the_segments_where_none_are_given():
    model = model_of("GPT-2").eval()
    batch = batches_of(model).packed
    without = {name: value for name, value in batch.items() if name != "position_ids"}
    with torch.no_grad():
        assert torch.equal(model(**without).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask cannot be given"),
        ({CACHE: object()}, "a cache cannot be given"),
        ({"use_cache": True}, "a cache cannot be given"),
        ({"output_attentions": True}, "attentions cannot be given"),
        ({"position_ids": torch.tensor([[126, 127, 128]])}, "129 positions"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "the batch has 2"),
        ({"segments": [(0, 2, -1, 0)]}, "the segments cover 2 positions and the row has 3"),
        ({"segments": [(0, 2, -1, 0), (1, 3, -1, 1)]}, "segment 1 of the row is (1, 3, -1, 1)"),
        ({"segments": [(0, 2, 1, 0), (2, 3, -1, 1)]}, "segment 0 of the row is (0, 2, 1, 0)"),
        ({"segments": [(0, 3, -1)]}, "segment 0 of the row is (0, 3, -1); segments cover the row"),
        ({"segments": [(0, 3, 0, 0)]}, "segment 0 of the row is (0, 3, 0, 0)"),
        ({"segments": [(0, 3, -1, 0), (3, 3, -1, 0)]}, "segment 1 of the row is (3, 3, -1, 0)"),
    ],
)
def test_what_cannot_stand_beside_segments_is_refused_in_a_line(change, found):
    model = model_of("GPT-2", n_positions=128).eval()
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "segments": [(0, 3, -1, 0)], **change}
    with pytest.raises(DuetError) as error:
        model(**batch)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_learned_positions_limit_a_text_and_not_the_row():
    model = model_of("GPT-2", n_positions=20).eval()
    ids = torch.ones(1, 40, dtype=torch.long)
    assert model(input_ids=ids, segments=[(0, 20, -1, 0), (20, 40, -1, 1)]).logits.isfinite().all()
    with pytest.raises(DuetError, match="21 positions"):
        model(input_ids=ids, segments=[(0, 20, -1, 0), (20, 21, 0, 1), (21, 40, -1, 2)])


def test_attentions_that_the_config_asks_for_are_refused_beside_segments():
    model = model_of("Llama", "eager").eval()
    model.model.language_model.config.output_attentions = True
    with pytest.raises(DuetError, match="attentions cannot be given"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), segments=[(0, 3, -1, 0)])


def test_positions_that_are_given_are_those_that_have_to_be_learned():
    model = model_of("GPT-2", n_positions=20).eval()
    ids = torch.ones(1, 24, dtype=torch.long)
    positions = torch.arange(24).remainder(12).unsqueeze(0)
    assert model(input_ids=ids, segments=[(0, 24, -1, 0)], position_ids=positions).logits.isfinite().all()
    with pytest.raises(DuetError, match="24 positions"):  # of shapes alone no positions can be read
        model.to("meta")(input_ids=ids.to("meta"), position_ids=positions.to("meta"))
    model = model_of("GPT-2", n_positions=20).eval()
    for segments in (None, [(0, 2, -1, 0)]):
        with pytest.raises(DuetError, match="21 positions"):
            model(input_ids=ids[:, :2], segments=segments, position_ids=torch.tensor([[19, 20]]))


def test_labels_alone_are_shifted_within_each_text():
    model = model_of("Llama")
    packed = batches_of(model).packed
    expected = step(model, packed)
    targets = packed.pop("shift_labels")
    packed["labels"] = torch.cat([packed["input_ids"][:, :1], targets[:, :-1]], 1)
    for start, *_ in packed["segments"]:
        packed["labels"][0, start] = packed["input_ids"][0, start]  # which nobody predicts
    for skip_logits in (False, True):
        found = step(model, packed, skip_logits=skip_logits)
        assert found[0] == pytest.approx(expected[0], rel=1e-6) and off(found[1], expected[1]) <= 1e-5


@pytest.mark.parametrize("wrong", ["a word with a feature", "an image token without", "a feature that is not there"])
def test_features_and_image_tokens_that_disagree_are_refused(wrong):
    model = model_of("Llama").eval()
    batch = batches_of(model).packed
    index = batch["feature_index"].clone()
    at = (index[0] >= 0).nonzero()[0]
    if wrong == "a word with a feature":
        index[0, 0] = 0
    else:
        index[0, at] = -1 if wrong == "an image token without" else 1000
    with pytest.raises(ValueError, match="feature_index and the batch do not match: 1 positions"):
        model(**{**batch, "feature_index": index})


def test_features_without_images_are_refused():
    model = model_of("Llama").eval()
    batch = {name: value for name, value in batches_of(model).packed.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="none of the 0 of the batch"):
        model(**batch)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_chosen_attention_is_what_is_saved_and_what_generates(attention, tmp_path):
    model = model_of("Llama", attention)
    batches = batches_of(model)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4, "do_sample": False}
    before = model.eval().generate(**prompt)
    step(model, batches.packed)
    config = model.model.language_model.config
    assert str(config._attn_implementation) == BY_SEGMENT + attention
    logits = model(**batches.padded).logits
    model.save_pretrained(tmp_path)
    assert BY_SEGMENT not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert torch.equal(model.generate(**prompt), before)
    assert str(config._attn_implementation) == attention
    assert torch.equal(model(**batches.padded).logits, logits)


def test_an_attention_that_is_not_known_is_refused_in_a_line():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("own", AttentionInterface()["sdpa"])
    AttentionMaskInterface.register("own", sdpa_mask)
    model = model_of("Llama", "own")
    with pytest.raises(DuetError, match="how the attention 'own' reads a mask"):
        step(model, batches_of(model).packed)


def test_code_that_asks_for_its_attention_by_name_goes_its_own_way_and_takes_no_row(monkeypatch):
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    model = model_of("GPT-2", "eager", reorder_and_upcast_attn=True)
    calls, own = [], GPT2Attention._upcast_and_reordered_attn
    monkeypatch.setattr(
        GPT2Attention, "_upcast_and_reordered_attn", lambda *args, **kw: calls.append(1) or own(*args, **kw)
    )
    batches = batches_of(model)
    before = step(model, batches.padded)
    layers = len(calls)
    with pytest.raises(TypeError, match="SegmentMask"):
        step(model, batches.packed)
    assert "cannot be run" in why_not_packed(model)
    calls.clear()
    attention_vlm.attend_by_segment(model.model.language_model)
    after = step(model, batches.padded)
    assert len(calls) == layers > 0
    assert after[0] == before[0] and torch.equal(after[1], before[1])


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
def test_an_attention_by_segment_is_equal_to_the_name_of_the_one_around_which_it_is(inner):
    model = model_of("Llama", inner)
    attention_vlm.attend_by_segment(model.model.language_model)
    name = model.model.language_model.config._attn_implementation
    other = "sdpa" if inner == "eager" else "eager"
    assert name == inner and inner == name and name in (inner, None) and not name != inner
    assert name != other and other != name and name not in (other, None) and not name == other
    assert {str(name): 1}[name] and inner not in {name: 1}


def test_a_mask_that_nobody_asked_for_is_an_error_and_never_silence(monkeypatch):
    model = model_of("Llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **kwargs: None)
    with pytest.raises(DuetError, match="asks for no attention mask"):
        step(model, batches_of(model).packed)


def test_a_mask_of_the_models_own_is_refused(monkeypatch):
    model = model_of("Llama")
    from transformers.models.llama import modeling_llama

    made = modeling_llama.create_causal_mask

    def with_more(**kwargs):
        return made(**kwargs, or_mask_function=lambda *args: torch.tensor(True))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", with_more)
    with pytest.raises(DuetError, match="adds a mask of its own"):
        step(model, batches_of(model).packed)


# -- attention that this machine does not have ------------------------------------------------------------------------


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """What flash attention computes, as its documentation has it: masks are aligned at the last query and key."""
    assert causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    outputs = []
    for start, stop, first, last in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
        keys, values = (one[first:last].repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(last - first - (stop - start), last - first)[:, None]
        to = torch.arange(last - first)
        seen = to <= at
        if window_size[0] >= 0:
            seen &= to >= at - window_size[0]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """A package `flash_attn`."""
    from transformers import modeling_flash_attention_utils as library

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_func = package.flash_attn_with_kvcache = padding.pad_input = padding.unpad_input = lambda: None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(library, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(library, "_loaded_implementation", None)


@pytest.mark.parametrize("name", ["OPT", "Llama", "Mistral", "Gemma 2", "Gemma 3 text", "StableLM"])
def test_flash_attention_takes_the_row_in_one_call_of_variable_lengths(name, flash):
    model = model_of(name, "eager")
    batches = batches_of(model)
    loss, gradients = step(model, batches.padded)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    found, again = step(model, batches.packed)
    assert abs(found - loss) <= 1e-5 * loss
    assert off(again, gradients) <= 1e-5


def test_flash_attention_reads_the_row_as_it_lies_where_no_text_has_a_prefix(flash):
    model = model_of("Llama", "eager")
    generator = torch.Generator().manual_seed(0)
    texts = [Node(torch.randint(1, 300, (length,), generator=generator).tolist()) for length in (9, 4, 17)]
    batches = Batches(texts, model, None)
    loss, gradients = step(model, batches.padded)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    found, again = step(model, batches.packed)
    assert found == pytest.approx(loss, rel=1e-5) and off(again, gradients) <= 1e-5
    given = []
    mask = attention_vlm.VaryingLengths(attention_vlm.Row(batches.segments, 30, torch.device("cpu")))
    key = value = torch.randn(1, 2, 30, 4)
    mask.attend(lambda module, query, key, value, *rest, **kwargs: given.extend([key, value]), None, key, key, value)
    assert given[0] is key and given[1] is value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_flex_attention_is_given_a_block_mask(name):
    model = model_of(name).eval()
    batch = batches_of(model).packed
    with torch.no_grad():
        expected = model(**batch).logits
        model.model.language_model.set_attn_implementation("flex_attention")
        found = model(**batch).logits
    assert off(found, expected) <= 1e-5
