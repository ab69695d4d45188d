"""The account of the data: sums that are the input, whatever the workers, and a report that names what was dropped."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processing.batching.account import CUT_REASONS, DROP_REASONS, Account, BatchAccount, Record


records = st.builds(
    Record,
    source=st.sampled_from(["a", "b"]),
    row=st.integers(0, 50),
    dropped=st.none() | st.sampled_from(DROP_REASONS),
    cut=st.none() | st.sampled_from(CUT_REASONS),
    images=st.integers(0, 3),
    tokens=st.integers(1, 40),
    image_tokens=st.integers(0, 9),
    supervised=st.integers(1, 40),
    notes=st.lists(st.sampled_from(["<image> stands as text", "the column b is not read"]), max_size=3).map(tuple),
)


@given(st.lists(st.lists(records, max_size=8), max_size=6))
def test_what_several_workers_count_is_what_one_counts(batches):
    whole, parts = Account(), Account()
    for batch in batches:
        whole.add(batch, padding=len(batch))
        one = Account()
        one.add(batch, padding=len(batch))
        parts.merge(Account.from_state(json.loads(json.dumps(one.state()))))
    assert parts.report() == whole.report()
    assert parts.table() == whole.table()


@given(st.lists(records, min_size=1))
def test_every_sample_was_learned_from_or_dropped_for_a_reason(batch):
    account = Account()
    account.add(batch)
    for counts in (account.report()["total"], *account.report()["sources"].values()):
        assert counts["samples"] == counts["learned from"] + sum(counts["dropped"].values())
    assert account.report()["total"]["samples"] == len(batch)
    assert account.report()["total"]["tokens"] == sum(r.tokens for r in batch if r.dropped is None)
    named = {(entry["source"], entry["row"]) for entry in account.report()["dropped samples"]}
    assert named == {(r.source, str(r.row)) for r in batch if r.dropped is not None}


@given(st.lists(st.integers(1, 300), min_size=1))
def test_length_percentiles_are_those_of_the_lengths(lengths):
    account = Account()
    account.add(Record("a", row, tokens=length) for row, length in enumerate(lengths))
    for percent, found in account.percentiles().items():
        share = sum(length <= found for length in lengths) / len(lengths)
        below = sum(length < found for length in lengths) / len(lengths)
        assert share * 100 >= percent > below * 100
    assert account.percentiles()[100] == max(lengths)


@given(st.lists(records, min_size=1))
def test_notes_are_counted_for_each_source_of_what_was_learned_from_or_dropped(batch):
    account = Account()
    account.add(batch)
    for source, counts in account.report()["sources"].items():
        own = [record for record in batch if record.source == source]
        assert counts["notes"] == {
            note: sum(record.notes.count(note) for record in own) for record in own for note in record.notes
        }
    for note, number in account.report()["total"]["notes"].items():
        assert account.table().count(note) == 1 and f"{number:,} noted: {note}" in account.table()
    lost = [record for record in batch if record.dropped is not None]
    expected = {note: sum(record.notes.count(note) for record in lost) for record in lost for note in record.notes}
    assert account.dropped_only().report()["total"]["notes"] == expected


def test_only_what_was_dropped_can_be_kept():
    account = Account()
    account.add([Record("a", 0, tokens=5, supervised=2)])
    account.add([Record("a", 1, dropped="malformed row", detail="a, row 1: no")])
    kept = account.dropped_only().report()
    assert kept["total"]["samples"] == 1 and kept["total"]["tokens"] == 0
    assert kept["dropped samples"] == [{"source": "a", "row": "1", "reason": "malformed row", "detail": "a, row 1: no"}]


def test_the_table_says_shares_lengths_and_reasons():
    account = Account()
    account.add([Record("photos", 0, None, "", CUT_REASONS[0], 1, 30, 10, 15)], padding=10)
    account.add([Record("texts", 7, dropped="unreadable image", detail="b.jpg: broken")])
    table = account.table()
    assert "photos" in table and "together" in table
    assert "50.0% of the tokens are supervised" in table and "25.0% of the positions were padding" in table
    assert "1 cut: text cut at its end" in table
    assert "1 dropped: unreadable image (such as b.jpg: broken)" in table


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_reasons_are_told_apart(reason):
    account = Account()
    account.add([Record("a", 0, dropped=reason)])
    assert account.report()["total"]["dropped"] == {reason: 1}


def test_positions_that_samples_share_are_counted_as_often_as_they_are_run():
    """So the share of padding is one of what was run; an account of before, which knew of none, goes on."""
    samples = [Record("a", row, tokens=30, supervised=10) for row in range(3)]
    account = Account()
    account.add_batch(BatchAccount(samples, padding=0, positions=45))
    account.add_batch(BatchAccount(samples[:1], padding=15))
    again = Account.from_state(json.loads(json.dumps(account.state())))
    assert again.positions == 45 + 45 and again.report()["total"]["positions"] == 90
    assert again.report()["total"]["padding share"] == round(15 / 90, 4)
    assert "45 positions that samples share were run once" in again.table()
    state = account.state()
    del state["shared"]
    assert Account.from_state(state).positions == 4 * 30 + 15
