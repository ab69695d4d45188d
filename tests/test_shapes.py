"""What the built-in dataset promises: disjoint splits, unseen pairs, right answers that the question does not tell."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from processing import shapes


SPLITS = ("train", "validation", "test")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[shapes.Scene]]:
    return {split: [shapes.scene(split, index) for index in range(2000)] for split in SPLITS}


@pytest.fixture(scope="module")
def asked() -> list[tuple[shapes.Scene, shapes.Turn]]:
    return shapes.questions("test", 5000)


def test_scene_is_a_pure_function_of_split_index_and_seed(scenes):
    again = [shapes.scene("train", index) for index in reversed(range(50))][::-1]
    assert again == scenes["train"][:50]
    assert again != [shapes.scene("train", index, seed=1) for index in range(50)]
    for item, copy in zip(scenes["train"][:50], again):
        assert item.captions() == copy.captions()
        assert item.dialogue() == copy.dialogue()
        assert item.draw(32).tobytes() == copy.draw(32).tobytes()
    assert len({item.seed for item in scenes["train"]}) == len(scenes["train"])


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'dev'.*train, validation, test"):
        shapes.scene("dev", 0)


def test_splits_share_no_scene_whatever_the_seed():
    content = {
        split: {frozenset(shapes.scene(split, index, seed).objects) for seed in (0, 1) for index in range(5000)}
        for split in SPLITS
    }
    assert not content["train"] & content["validation"]
    assert not content["train"] & content["test"]
    assert not content["validation"] & content["test"]
    # The reason: the objects alone say which split they belong to, in whatever order, on whatever ground.
    for split in SPLITS:
        for objects in content[split]:
            assert shapes.split_of(tuple(objects)) == split
            assert shapes.split_of(tuple(objects)[::-1]) == split


def test_scenes_have_one_to_four_objects_at_their_own_places(scenes):
    everything = [item for split in SPLITS for item in scenes[split]]
    assert {len(item.objects) for item in everything} == {1, 2, 3, 4}
    assert {item.ground for item in everything} == set(shapes.GROUNDS)
    for item in everything:
        assert len({thing.place for thing in item.objects}) == len(item.objects)
    for field, values in (
        ("shape", shapes.SHAPES),
        ("colour", shapes.COLOURS),
        ("size", shapes.SIZES),
        ("place", shapes.PLACES),
    ):
        assert {getattr(thing, field) for item in everything for thing in item.objects} == set(values)


def test_unseen_pairs_are_drawn_and_named_in_test_alone(scenes):
    assert {shape for _, shape in shapes.UNSEEN_PAIRS} == set(shapes.SHAPES)
    names = [f"{colour} {shape}" for colour, shape in shapes.UNSEEN_PAIRS]
    for split in ("train", "validation"):
        for item in scenes[split]:
            assert not item.unseen
            turns = item.dialogue()
            text = " ".join(item.captions() + [f"{turn.question} {turn.answer}" for turn in turns])
            assert not any(name in text for name in names)
            assert not any(turn.unseen for turn in turns)
    test = {thing.pair for item in scenes["test"] for thing in item.objects}
    assert test >= shapes.UNSEEN_PAIRS
    for item in scenes["test"]:
        assert item.unseen == bool({thing.pair for thing in item.objects} & shapes.UNSEEN_PAIRS)
        assert all(turn.unseen == item.unseen for turn in item.dialogue())


def test_five_differing_captions_name_every_object_in_full(scenes):
    for item in scenes["train"][:500]:
        captions = item.captions()
        assert len(set(captions)) == 5
        for caption in captions:
            for thing in item.objects:
                assert all(word in caption for word in (thing.size, thing.colour, thing.shape, thing.place))


def test_dialogues_have_two_to_five_turns_without_repetition(scenes):
    dialogues = [item.dialogue() for item in scenes["train"]]
    assert {len(turns) for turns in dialogues} == {2, 3, 4, 5}
    assert {turn.kind for turns in dialogues for turn in turns} == set(shapes.KINDS)
    for turns in dialogues:
        assert len({turn.question.lower() for turn in turns}) == len(turns)


def answer_by_looking(item: shapes.Scene, turn: shapes.Turn) -> str:
    """Answers a question from its words and the scene, without the functions that asked it; fails on any ambiguity."""
    words = turn.question.lower().rstrip("?").split()
    things = item.objects
    if turn.kind == "place":
        there = [thing for thing in things if thing.place == " ".join(words[-2:])]
        return f"a {there[0]}" if there else "nothing"
    if turn.kind == "colour":
        (thing,) = [thing for thing in things if thing.shape in words]
        return thing.colour
    if turn.kind == "count":
        colours = [colour for colour in shapes.COLOURS if colour in words]
        names = [shape for shape in shapes.SHAPES if {shape + "s", shape + "es"} & set(words)]
        found = [t for t in things if (not colours or t.colour in colours) and (not names or t.shape in names)]
        return ("zero", "one", "two", "three", "four")[len(found)]
    if turn.kind == "exists":
        return "yes" if tuple(words[-2:]) in {thing.pair for thing in things} else "no"
    (reference,) = [thing for thing in things if thing.pair == tuple(words[-2:])]
    (other,) = [t for t in things if t.place.split()[1] == words[-5] != reference.place.split()[1]]
    return f"a {other}"


def test_answers_are_right_and_unambiguous(scenes, asked):
    pairs = asked + [(item, turn) for split in SPLITS for item in scenes[split] for turn in item.dialogue()]
    for item, turn in pairs:
        assert turn.answer == answer_by_looking(item, turn), (item, turn)


def test_questions_are_balanced_over_kinds_and_from_the_split(asked):
    assert Counter(turn.kind for _, turn in asked) == dict.fromkeys(shapes.KINDS, 1000)
    assert all(shapes.split_of(item.objects) == "test" for item, _ in asked)
    assert shapes.questions("test", 50) == shapes.questions("test", 50)
    assert 0.2 < sum(turn.unseen for _, turn in asked) / len(asked) < 0.4


def test_answers_cannot_be_guessed_from_the_question(asked):
    """The commonest answer to each wording-free question, known in hindsight, is right about as rarely as chance."""
    answers = {kind: defaultdict(Counter) for kind in shapes.KINDS}
    for _, turn in asked:
        named = [word for word in turn.question.lower().rstrip("?").split() if word not in ("see", "find")]
        answers[turn.kind][" ".join(named[-2:]) if turn.kind != "count" else named[2]][turn.answer] += 1
    most = {"place": 0.3, "colour": 0.3, "count": 0.5, "exists": 0.65, "relation": 0.3}
    for kind, by_subject in answers.items():
        right = sum(counter.most_common(1)[0][1] for counter in by_subject.values())
        assert right / 1000 <= most[kind], (kind, right)
    yes = sum(turn.answer == "yes" for _, turn in asked)
    assert 450 <= yes <= 550


def test_pictures_are_rgb_and_differ_with_their_scene(scenes):
    for size in (32, 64, 100):
        picture = scenes["train"][0].draw(size)
        assert picture.mode == "RGB" and picture.size == (size, size)
    assert len({item.draw(32).tobytes() for item in scenes["train"][:200]}) == 200


def test_an_object_is_drawn_at_its_place_in_its_colour(scenes):
    for item in scenes["test"][:300]:
        picture = item.draw(64)
        for thing in item.objects:
            x, y = shapes.PLACES[thing.place]
            pixel = picture.getpixel((round(64 * x), round(64 * y)))
            nearest = min(
                shapes.COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, shapes.COLOURS[name]))
            )
            assert nearest == thing.colour


def test_command_writes_pictures_and_questions(tmp_path):
    command = [sys.executable, "-m", "processing.shapes", "--out", tmp_path / "pictures", "--n", "3", "--split", "test"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "pictures" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and run.stderr == ""
    for row, line in zip(rows, run.stdout.splitlines(), strict=True):
        path = tmp_path / "pictures" / row["image"]
        assert path.exists() and len(row["captions"]) == 5
        assert line == f"{path}  {row['question']}  {row['answer']}"
