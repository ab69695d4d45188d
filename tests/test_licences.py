"""What a card may say of licences: no more than follows from the cards of all that the model was made of."""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData

from tests.fake_hub import faults_of_card
from training_vlm import licences
from training_vlm.arguments import ModelArguments
from training_vlm.licences import Base, find_bases, licence_of
from training_vlm.model_card import _licence_in_words


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub("maker/lm", license="mit")` is a model with such a card; what is asked for is in `hub.asked`."""
    cards = {}

    def download(name, file, revision=None, token=None):
        put.asked.append((name, revision, token))
        if name not in cards:
            raise OSError("there is none, or it cannot be asked")
        return cards[name]

    def put(name, **said):
        cards[name] = tmp_path / f"{name.replace('/', '--')}.md"
        cards[name].write_text(f"---\n{json.dumps(said)}\n---\n# It\n")  # json is yaml too

    put.asked = []
    monkeypatch.setattr(licences, "hf_hub_download", download)
    return put


@pytest.fixture
def folder(tmp_path):
    """`folder("lm", license="mit")` is the path of a model's folder with such a card; of `None` without one."""

    def make(name, said=None, **more):
        place = tmp_path / "models" / name
        place.mkdir(parents=True)
        if more or said is not None:
            (place / "README.md").write_text(f"---\n{json.dumps({**(said or {}), **more})}\n---\n# It\n")
        return str(place)

    return make


def joined(vision, text):
    return find_bases(ModelArguments(vision_model=vision, text_model=text))


def gone_on_with(model):
    return find_bases(ModelArguments(model=model))


def base(name, **terms):
    return Base("language model", name, True, terms)


def is_taken(bases):
    """Whether the Hub takes what a card says of the licence of these, and the card says so in words too."""
    content = ModelCard.from_template(ModelCardData(**licence_of(bases)), template_str="---\n{{ card_data }}\n---\n")
    return not faults_of_card(str(content)) and bool(_licence_in_words(bases))


def test_a_licence_is_claimed_as_far_as_all_bases_state_one():
    apache, mit = base("a/b", license="apache-2.0"), base("c/d", license="mit")
    own = base("e/f", license="other", license_name="their-own", license_link="https://example.com/terms")
    assert licence_of([apache, base("c/d", license="apache-2.0")]) == {"license": "apache-2.0"}
    assert licence_of([apache, mit]) == {"license": "other", "license_name": "apache-2.0-and-mit"}
    assert licence_of([own, own]) == own.terms
    assert licence_of([apache, own]) == {"license": "other", "license_name": "apache-2.0-and-their-own"}
    assert licence_of([apache, base("c/d")]) == {} == licence_of([])


@pytest.mark.parametrize(
    "card, terms",
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: MIT\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit]\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit, gpl]\n---\n", {"license": "other", "license_name": "mit-gpl"}),
        ("---\nlicense: My Own <b>\n---\n", {"license": "other", "license_name": "my-own-b"}),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: A\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense: other\n---\n", {"license": "other"}),
        ("---\nlicense: unknown\n---\n", {}),
        ("---\nlicense: 3\n---\n", {}),
        ("---\n- no\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("no metadata", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_the_licence_of_a_folder_is_what_its_card_says(card, terms, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (found,) = gone_on_with(str(tmp_path))
    assert found == Base("earlier model", tmp_path.name, False, terms)
    assert is_taken([found])


def test_a_model_with_a_licence_and_a_base_has_both_licences(hub):
    hub("me/tuned", license="cc-by-nc-4.0", base_model="maker/lm")
    hub("maker/lm", license="apache-2.0")
    found = gone_on_with("me/tuned")
    assert [(one.name, one.licence) for one in found] == [("me/tuned", "cc-by-nc-4.0"), ("maker/lm", "apache-2.0")]
    assert licence_of(found)["license_name"] == "cc-by-nc-4.0-and-apache-2.0"
    assert is_taken(found) and "different licences" in _licence_in_words(found)


def test_a_licence_is_not_taken_from_the_base_of_a_model_that_states_none(hub):
    hub("me/tuned", base_model=["maker/lm"])
    hub("maker/lm", license="apache-2.0")
    assert licence_of(gone_on_with("me/tuned")) == {}
    assert licence_of(joined("maker/lm", "me/tuned")) == {}


def test_the_licences_of_a_whole_chain_of_models_hold(hub):
    hub("me/third", license="mit", base_model="me/second")
    hub("me/second", license="mit", base_model=["me/first"])
    hub("me/first", license="llama2")
    hub("maker/vit", license="mit")
    assert licence_of(gone_on_with("me/second"))["license_name"] == "mit-and-llama2"
    assert licence_of(gone_on_with("me/third"))["license_name"] == "mit-and-llama2"
    assert licence_of(joined("maker/vit", "me/third"))["license_name"] == "mit-and-llama2"
    hub("me/first", license="mit")
    assert licence_of(joined("maker/vit", "me/third")) == {"license": "mit"}


def test_nothing_is_claimed_where_one_of_a_chain_cannot_be_asked(hub):
    hub("me/tuned", license="mit", base_model="gated/lm")
    found = gone_on_with("me/tuned")
    assert licence_of(found) == {} and "not all that it is made of states one" in _licence_in_words(found)


def test_models_that_name_each_other_are_asked_once(hub):
    hub("a/b", license="mit", base_model=["c/d", "a/b"])
    hub("c/d", license="mit", base_model="a/b")
    assert [one.name for one in gone_on_with("a/b")] == ["a/b", "c/d"]
    hub("a/merge", license="mit", base_model=[f"a/{number}" for number in range(100)])
    hub.asked.clear()
    assert licence_of(gone_on_with("a/merge")) == {} and len(hub.asked) <= 20


def test_a_folder_without_a_licence_leaves_none_to_claim(hub, folder):
    hub("maker/vit", license="mit")
    assert licence_of(joined("maker/vit", folder("bare"))) == {}
    assert licence_of(joined("maker/vit", folder("no-word", said={}))) == {}
    assert licence_of(joined("maker/vit", folder("lm", license="mit"))) == {"license": "mit"}


def test_a_model_made_of_a_folder_without_a_licence_claims_none_later_either(hub, folder):
    hub("maker/vit", license="mit")
    first = joined("maker/vit", folder("bare"))
    nearest = [one.name for one in first if one.is_nearest]
    assert nearest == ["maker/vit"]
    hub("me/aligned", base_model=nearest, **licence_of(first))
    hub("me/chat", base_model="me/aligned", license="mit")  # as somebody wrote by hand
    assert licence_of(gone_on_with("me/aligned")) == {} == licence_of(gone_on_with("me/chat"))


def test_a_folder_says_what_it_was_made_of(hub, folder):
    hub("maker/lm", license="llama2")
    tuned = folder("tuned", license="mit", base_model="maker/lm")
    assert licence_of(gone_on_with(tuned))["license_name"] == "mit-and-llama2"
    lost = folder("lost", license="mit", base_model="/home/anna/models/lm")
    found = gone_on_with(lost)
    assert licence_of(found) == {} and [one.name for one in found] == ["lost", "lm"]


def test_tower_and_text_of_different_licences_are_both_named(hub):
    hub("maker/vit", license="apache-2.0")
    hub("maker/lm", license="other", license_name="Their Own 1.0", license_link="LICENSE.txt")
    found = joined("maker/vit", "maker/lm")
    assert licence_of(found) == {"license": "other", "license_name": "apache-2.0-and-their-own-1.0"}
    hub("me/aligned", base_model=["maker/vit", "maker/lm"], **licence_of(found))
    assert licence_of(gone_on_with("me/aligned")) == licence_of(found) and is_taken(found)


def test_another_licence_keeps_its_name_and_where_it_is_read(hub):
    hub("maker/vlm", license="other", license_name="their-own", license_link="LICENSE")
    (found,) = find_bases(ModelArguments(model="maker/vlm", model_revision="v2"))
    link = "https://huggingface.co/maker/vlm/blob/v2/LICENSE"
    assert licence_of([found]) == {"license": "other", "license_name": "their-own", "license_link": link}
    assert hub.asked == [("maker/vlm", "v2", None)] and is_taken([found])
    hub("maker/vlm", license="mit", license_name="their-own", license_link="../../etc")
    assert licence_of(gone_on_with("maker/vlm")) == {"license": "mit"}


def test_two_licences_that_no_name_tells_are_not_called_one(hub):
    hub("maker/vit", license="other")
    hub("maker/lm", license="other")
    found = joined("maker/vit", "maker/lm")
    assert licence_of(found) == {"license": "other"} and "different licences" in _licence_in_words(found)
    assert "of its own" in _licence_in_words(found[:1])


def test_a_card_names_the_nearest_models_of_the_hub_as_its_bases(hub, folder):
    hub("me/tuned", base_model="maker/lm")
    hub("maker/lm", license="mit")

    def nearest(bases):
        return [one.name for one in bases if one.is_nearest]

    assert nearest(gone_on_with("me/tuned")) == ["me/tuned"]
    assert nearest(joined("maker/vit", "me/tuned")) == ["maker/vit", "me/tuned"]
    assert nearest(joined("maker/vit", folder("here", base_model="me/tuned"))) == ["maker/vit", "me/tuned"]
