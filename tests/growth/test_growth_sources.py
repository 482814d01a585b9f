"""Which sources a run reads: seeds first, streams go on, retries when a new table comes."""

from dataclasses import dataclass

import pytest

from infogrowth.errors import UserError
from infogrowth.growth.ledger import PENDING_REASONS
from infogrowth.growth.sources import SourceProgress, plan_seeds, plan_stream


@dataclass
class Rows:
    """Features whose content is a word: the fingerprint of n rows is the word's first n letters."""

    path: str
    content: str

    @property
    def rows(self):
        return len(self.content)

    def fingerprint(self, rows):
        return self.content[:rows]


def read(sources, number, features, up_to=None):
    """Pretend that source ``number`` was read up to a row."""
    source = sources[number]
    source.position = source.rows if up_to is None else up_to
    source.digest = features.fingerprint(source.position)


def test_an_interrupted_stream_goes_on_and_a_finished_one_is_done():
    sources, features = [], Rows("a", "abcdef")
    assert plan_stream(sources, features) == [0]
    read(sources, 0, features, up_to=4)
    assert plan_stream(sources, features) == [0]
    assert sources[0].position == 4
    read(sources, 0, features)
    assert plan_stream(sources, features) == []
    assert plan_stream(sources, Rows("copied", "abcdef")) == []


def test_other_features_are_another_source():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features)
    read(sources, 0, features, up_to=4)
    assert plan_stream(sources, Rows("b", "xyz")) == [1]


def test_added_rows_extend_the_source():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features)
    read(sources, 0, features)
    assert plan_stream(sources, Rows("a", "abcdefgh")) == [0]
    assert (sources[0].position, sources[0].rows) == (6, 8)


def test_features_that_changed_half_way_are_refused():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features)
    read(sources, 0, features, up_to=4)
    with pytest.raises(UserError, match="a have changed"):
        plan_stream(sources, Rows("a", "abXdef"))


def test_new_content_under_the_path_of_a_finished_source_is_new_data():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features)
    read(sources, 0, features)
    assert plan_stream(sources, Rows("a", "uvw")) == [1]


def test_another_table_half_way_begins_a_source_and_retries_the_first_part():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features)
    read(sources, 0, features, up_to=4)
    todo = plan_stream(sources, features, recaptions="table")
    assert todo == [1, 2]
    assert (sources[1].kind, sources[1].start, sources[1].rows) == ("stream", 4, 6)
    assert (sources[2].kind, sources[2].start, sources[2].rows) == ("retry", 0, 4)
    read(sources, 1, features)
    read(sources, 2, features, up_to=2)
    assert plan_stream(sources, features, recaptions="table") == [2]
    read(sources, 2, features)
    assert plan_stream(sources, features, recaptions="table") == []
    assert plan_stream(sources, features) == []


def test_a_table_used_from_the_start_starts_no_retry():
    sources, features = [], Rows("a", "abcdef")
    plan_stream(sources, features, recaptions="table")
    read(sources, 0, features)
    assert plan_stream(sources, features, recaptions="table") == []
    assert plan_stream(sources, features, recaptions="better table") == [1]


def test_seeds_come_first_and_only_once():
    sources, seeds = [], Rows("s", "pq")
    assert plan_seeds(sources, seeds) == [0]
    read(sources, 0, seeds)
    assert plan_seeds(sources, seeds) == []
    assert plan_seeds(sources, None) == []
    with pytest.raises(UserError, match="first"):
        plan_seeds(sources, Rows("t", "other"))
    with pytest.raises(UserError, match=r"2 rows .* 3"):
        plan_seeds(sources, Rows("s", "pqr"))


def test_interrupted_seeding_must_be_finished():
    sources, seeds = [], Rows("s", "pqrs")
    plan_seeds(sources, seeds)
    read(sources, 0, seeds, up_to=2)
    with pytest.raises(UserError, match="interrupted"):
        plan_seeds(sources, None)
    assert plan_seeds(sources, seeds) == [0]


def test_seeds_by_id_stay_as_they_were_when_the_features_grow():
    sources, features = [], Rows("a", "abcd")
    assert plan_seeds(sources, features, seed_ids="list") == [0]
    read(sources, 0, features)
    assert plan_seeds(sources, Rows("a", "abcdef"), seed_ids="list") == []
    with pytest.raises(UserError, match="first"):
        plan_seeds(sources, features, seed_ids="another list")


def test_only_what_a_better_caption_could_change_is_processed_again():
    assert "alignment below min_align" in PENDING_REASONS
    assert "alignment and recaption below min_align" in PENDING_REASONS
    assert not {"image feature is zero", "id is already in the dataset"} & PENDING_REASONS


def test_a_source_without_progress_is_known_by_its_path():
    sources = [SourceProgress("stream", "a", rows=6)]
    assert plan_stream(sources, Rows("a", "abcdef")) == [0]
