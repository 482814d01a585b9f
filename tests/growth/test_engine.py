"""The growth engine against a naive one-at-a-time oracle in float64, and at its edges."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infogrowth.errors import UserError
from infogrowth.growth.decisions import Reason
from infogrowth.growth.engine import InfoGrowth, Recaption

GOLDEN = Path(__file__).parents[1] / "golden"
PROBES = json.loads((GOLDEN / "selection_edge_probes.json").read_text())


def captions_of(growth):
    return [entry["caption"] for entry in growth.annotations()]


@pytest.mark.parametrize("k", [1001, 99999999999999999999999])
def test_a_k_that_is_not_local_is_refused(k):
    with pytest.raises(UserError, match="k must be"):
        InfoGrowth(k=k, device="cpu")


class Oracle:
    """Spec §2 word for word: one sample at a time, every distance in float64, no shortcuts."""

    def __init__(self, k, min_align):
        self.k, self.min_align = k, min_align
        self.ids, self.captions, self.rows, self.gains = [], [], [], []

    @staticmethod
    def unit(vector):
        vector = np.asarray(vector, np.float64)
        length = np.linalg.norm(vector)
        return vector / length if np.isfinite(length) and length > 0 else None

    def nearest(self, vector, space):
        distances = [1 - float(vector @ pair[space]) for pair in self.rows]
        return sorted(zip(distances, self.ids, strict=True), key=lambda pair: round(pair[0], 7))

    def process(self, name, caption, image, text, recaption=None, is_seed=False):
        image, text = self.unit(image), self.unit(text)
        if image is None or text is None or name in self.ids:
            return "dropped"
        verdict = "kept"
        if not is_seed and image @ text < self.min_align:
            other = self.unit(recaption[1]) if recaption else None
            if other is None or image @ other < self.min_align:
                return "dropped"
            caption, text, verdict = recaption[0], other, "recaptioned"
        gains = []
        for space, vector in enumerate((image, text)):
            found = [distance for distance, _ in self.nearest(vector, space)[: self.k]]
            gains.append(np.mean(found) if found else 1.0)
        self.ids.append(name)
        self.captions.append(caption)
        self.rows.append((image, text))
        self.gains.append(gains)
        return verdict


def pairs(random, count, dimension, clusters):
    """Features in dense clusters, with exact copies, near copies and mismatched captions."""
    centers = random.normal(size=(clusters, dimension))
    image = centers[random.integers(clusters, size=count)]
    image = image + random.choice([0, 1e-6, 1e-3, 0.3], size=(count, 1)) * random.normal(
        size=image.shape
    )
    text = image + 0.8 * random.normal(size=image.shape)
    wrong = random.random(count) < 0.3
    text[wrong] = random.normal(size=(int(wrong.sum()), dimension))
    return image, text


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 6),
    dimension=st.integers(1, 24),
    batch_size=st.integers(1, 90),
    clusters=st.integers(1, 12),
)
def test_any_stream_grows_as_one_by_one(seed, k, dimension, batch_size, clusters):
    random = np.random.default_rng(seed)
    count, seeds = 80, int(random.integers(0, 20))
    image, text = pairs(random, count, dimension, clusters)
    image[random.random(count) < 0.05] = np.nan
    text[random.random(count) < 0.05] = 0
    ids = [f"id{number}" for number in random.integers(0, count, size=count)]
    recap = {
        name: Recaption(f"better {name}", random.normal(size=dimension) + image[row])
        for row, name in enumerate(ids)
        if random.random() < 0.3 and np.isfinite(image[row]).all()
    }
    oracle = Oracle(k, 0.4)
    expected = []
    for row, name in enumerate(ids):
        other = recap.get(name)
        table = (other.caption, other.text_feature) if other else None
        expected.append(
            oracle.process(name, f"caption {row}", image[row], text[row], table, row < seeds)
        )
    growth = InfoGrowth(k=k, device="cpu")
    captions = [f"caption {row}" for row in range(count)]
    verdicts = growth.seed(ids[:seeds], captions[:seeds], image[:seeds], text[:seeds]).verdicts
    for at in range(seeds, count, batch_size):
        part = slice(at, at + batch_size)
        verdicts += growth.process(
            ids[part], captions[part], image[part], text[part], recap
        ).verdicts
    assert verdicts == expected
    assert growth.kept_ids == oracle.ids
    assert captions_of(growth) == oracle.captions
    np.testing.assert_allclose(
        growth.kept_gains, np.reshape(oracle.gains, (-1, 2)), atol=1e-6, rtol=0
    )


def small(count=50, dimension=16, seed=0):
    image, text = pairs(np.random.default_rng(seed), count, dimension, 8)
    ids = [f"s{number}" for number in range(count)]
    return ids, [f"caption of {name}" for name in ids], image, text


def test_everything_about_a_decision_is_the_same_at_any_batch_size():
    ids, captions, image, text = small(300)
    records = []
    for batch_size in (1, 11, 300):
        growth = InfoGrowth(device="cpu")
        records.append([])
        for at in range(0, 300, batch_size):
            part = slice(at, at + batch_size)
            records[-1] += list(growth.process(ids[part], captions[part], image[part], text[part]))
    assert records[0] == records[1] == records[2]  # to the bit, neighbors and distances too


def test_a_single_sample_gives_a_single_decision():
    growth = InfoGrowth(device="cpu")
    first = growth.process("a", "one", np.array([3.0, 4.0]), np.array([3.0, 4.0]))
    assert (first.id, first.verdict, first.reason) == ("a", "kept", "aligned")
    assert (first.gain_image, first.gain_text) == (1.0, 1.0)
    assert first.image_neighbors == [] and first.alignment == pytest.approx(1)
    second = growth.process("b", "two", [4.0, 3.0], [0.0, 1.0])
    assert second.alignment == pytest.approx(0.6)
    assert second.image_neighbors == [("a", pytest.approx(1 - 24 / 25, abs=2e-7))]
    assert second.gain_text == pytest.approx(1 - 0.8)


def test_alignment_equal_to_min_align_is_kept_and_just_below_is_dropped():
    growth = InfoGrowth(min_align=0.6, device="cpu")
    image = np.array([[1.0, 0.0], [1.0, 0.0]])
    text = np.array([[0.6, 0.8], [0.5999, np.sqrt(1 - 0.5999**2)]])
    assert growth.process(["at", "under"], ["", ""], image, text).verdicts == ["kept", "dropped"]


def test_unusable_features_are_rejected_with_the_reason():
    ids, captions, image, text = small(6)
    text = image.copy()
    image[0, 3], image[1], text[2, 0], text[3] = np.nan, 0, np.inf, 0
    image[4], text[4] = np.nan, 0
    decisions = InfoGrowth(device="cpu").process(ids, captions, image, text)
    assert decisions.reason.tolist() == [
        Reason.IMAGE_NOT_FINITE, Reason.IMAGE_ZERO, Reason.TEXT_NOT_FINITE, Reason.TEXT_ZERO,
        Reason.IMAGE_NOT_FINITE, Reason.ALIGNED,
    ]  # fmt: skip
    assert decisions[0].alignment is None and decisions[0].gain_image is None
    assert decisions[0].image_neighbors == [] and decisions[5].gain_image == 1.0


def test_seeds_with_unusable_features_or_known_ids_are_reported_and_not_inserted():
    growth = InfoGrowth(device="cpu")
    image = np.array([[1.0, 0], [np.nan, 0], [0, 1.0]])
    assert growth.seed(["a", "b", "a"], ["x", "y", "z"], image, -image).reason.tolist() == [
        Reason.SEED, Reason.IMAGE_NOT_FINITE, Reason.DUPLICATE_ID,
    ]  # fmt: skip
    assert growth.kept_ids == ["a"]


def test_an_id_already_in_the_dataset_is_reported_and_not_inserted_twice():
    growth = InfoGrowth(device="cpu")
    image = np.eye(4)
    first = growth.process(["a", "a", "b", "c"], list("1234"), image, image)
    assert first.verdicts == ["kept", "dropped", "kept", "kept"]
    again = growth.process(["c"], ["5"], image[:1], image[:1])[0]
    assert (again.verdict, again.reason) == ("dropped", "id is already in the dataset")
    assert captions_of(growth) == ["1", "3", "4"]


def test_a_dropped_id_may_come_again_in_the_same_batch():
    growth = InfoGrowth(device="cpu")
    image, text = np.array([[1.0, 0]] * 3), np.array([[0, 1.0], [1, 0], [1, 0]])
    verdicts = growth.process(["a"] * 3, ["wrong", "right", "late"], image, text).verdicts
    assert verdicts == ["dropped", "kept", "dropped"]
    assert captions_of(growth) == ["right"]


@pytest.mark.parametrize(
    ("recaption", "reason"),
    [
        (Recaption(None, [1.0, 0]), Reason.RECAPTION_WITHOUT_CAPTION),
        (Recaption("", [1.0, 0]), Reason.RECAPTION_WITHOUT_CAPTION),
        (Recaption("good", None), Reason.RECAPTION_WITHOUT_FEATURE),
        (Recaption("good", [np.nan, 0]), Reason.RECAPTION_NOT_FINITE),
        (Recaption("good", [0.0, 0]), Reason.RECAPTION_ZERO),
        (Recaption("good", [1.0, 0, 0]), Reason.RECAPTION_MISFIT),
        (Recaption("good", [0.0, 1.0]), Reason.LOW_RECAPTION),
        (Recaption("good", torch.tensor([2.0, 0])), Reason.RECAPTIONED),
    ],
)
def test_recaptions_help_when_they_can_and_never_hurt(recaption, reason):
    growth = InfoGrowth(device="cpu")
    image, text = np.array([[1.0, 0], [1.0, 0]]), np.array([[0, 1.0], [1.0, 0]])
    table = {"low": recaption, "fine": recaption}
    low, fine = growth.process(["low", "fine"], ["bad", "own"], image, text, table)
    assert low.reason == reason and low.original_caption == "bad"
    assert low.caption == ("good" if reason == Reason.RECAPTIONED else "bad")
    assert low.original_alignment == 0
    assert low.alignment == (1 if reason == Reason.RECAPTIONED else 0)
    assert (fine.reason, fine.caption) == ("aligned", "own")


def test_calls_that_fail_change_nothing(monkeypatch):
    ids, captions, image, text = small(40)
    growth = InfoGrowth(device="cpu")
    growth.seed(ids[:10], captions[:10], image[:10], text[:10])
    before = growth.settings, growth.annotations()
    bad_calls = [
        (ids[:5], captions[:4], image[:5], text[:5], "4 captions"),
        (ids[:5], captions[:5], image[:4], text[:5], "image_features"),
        (ids[:5], captions[:5], image[:5, :8], text[:5], "8 columns"),
        (ids[:5], captions[:5], image[:5], None, "text_features"),
        (ids[:5], captions[:5], image[0], text[:5], "shape"),
        ([1, 2], captions[:2], image[:2], text[:2], "strings"),
        (ids[:2], captions[:2], [["a"], ["b"]], text[:2], "numbers"),
    ]
    for *arguments, message in bad_calls:
        with pytest.raises(UserError, match=message):
            growth.process(*arguments)
    monkeypatch.setattr("infogrowth.growth.engine.BLOCK_ROWS", 8)
    index = growth._indexes["text"]
    failing = _fail_at_the_third_block(index.search_and_extend)
    monkeypatch.setattr(index, "search_and_extend", failing)
    with pytest.raises(MemoryError):
        growth.process(ids[10:], captions[10:], image[10:], text[10:])
    monkeypatch.undo()
    assert (growth.settings, growth.annotations()) == before
    growth.process(ids[10:], captions[10:], image[10:], text[10:])
    whole = InfoGrowth(device="cpu")
    whole.seed(ids[:10], captions[:10], image[:10], text[:10])
    whole.process(ids[10:], captions[10:], image[10:], text[10:])
    assert growth.annotations() == whole.annotations()


@pytest.mark.parametrize("threads", [2, 5])
def test_looked_up_side_by_side_the_spaces_give_the_same_and_fail_as_one(threads, monkeypatch):
    ids, captions, image, text = small(40)
    in_turn = InfoGrowth(device="cpu", min_align=-1.0)
    in_turn.process(ids, captions, image, text)
    monkeypatch.setattr("infogrowth.growth.engine.FEW", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        growth = InfoGrowth(device="cpu", min_align=-1.0)
        growth.process(ids[:20], captions[:20], image[:20], text[:20])
        index, meeting = growth._indexes["text"], threading.Barrier(2, timeout=30)
        searching = growth._indexes["image"].search_and_extend
        monkeypatch.setattr(
            growth._indexes["image"],
            "search_and_extend",
            lambda *given: meeting.wait() is None or searching(*given),
        )
        with monkeypatch.context() as failing, pytest.raises(MemoryError):
            failing.setattr(index, "search_and_extend", lambda *_: _fail(meeting))
            growth.process(ids[20:], captions[20:], image[20:], text[20:])
        assert torch.get_num_threads() == threads
        monkeypatch.undo()
        growth.process(ids[20:], captions[20:], image[20:], text[20:])
    finally:
        torch.set_num_threads(before)
    assert growth.annotations() == in_turn.annotations()


def _fail(meeting):
    meeting.wait()
    raise MemoryError


def _fail_at_the_third_block(search):
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return search(*arguments)

    return fail


def test_image_and_text_of_different_encoders_are_refused_before_anything_exists():
    growth = InfoGrowth(device="cpu")
    with pytest.raises(UserError, match="encoder"):
        growth.process(["a"], ["b"], np.ones((1, 8)), np.ones((1, 4)))
    assert growth.settings["dimension"] == {"image": None, "text": None}
    assert growth.process(["a"], ["b"], np.ones((1, 4)), np.ones((1, 4))).verdicts == ["kept"]


@pytest.mark.parametrize(
    "settings_", [{"k": 0}, {"k": 2.5}, {"min_align": float("nan")}, {"min_align": "0.4"},
                  {"index": "best"}, {"modality": "video"}, {"memory_mb": 0},
                  {"modality": "image", "min_align": "auto"}],
)  # fmt: skip
def test_senseless_settings_are_refused(settings_):
    with pytest.raises(UserError):
        InfoGrowth(device="cpu", **settings_)


def test_no_samples_are_fine_at_any_time():
    growth = InfoGrowth(device="cpu")
    assert len(growth.process([], [], np.empty((0, 4)), np.empty((0, 4)))) == 0
    assert len(growth.process([], [], [], [])) == 0
    growth.process(["a"], [""], np.ones((1, 4)), np.ones((1, 4)))
    assert len(growth.process([], [], [], [])) == 0 and len(growth) == 1


@pytest.mark.parametrize("kind", ["float16", "float64", "torch", "bfloat16", "lists"])
def test_features_of_any_float_type_are_accepted(kind):
    ids, captions, image, text = small(60)
    image, text = image.astype(np.float16), text.astype(np.float16)
    convert = {
        "float16": lambda a: a,
        "float64": lambda a: a.astype(np.float64),
        "torch": torch.from_numpy,
        "bfloat16": lambda a: torch.from_numpy(a.astype(np.float32)).bfloat16(),
        "lists": lambda a: a.tolist(),
    }[kind]
    if kind == "bfloat16":
        image = torch.from_numpy(image.astype(np.float32)).bfloat16().float().numpy()
        text = torch.from_numpy(text.astype(np.float32)).bfloat16().float().numpy()
    plain, other = InfoGrowth(device="cpu"), InfoGrowth(device="cpu")
    plain.process(ids, captions, image.astype(np.float32), text.astype(np.float32))
    other.process(ids, captions, convert(image), convert(text))
    assert plain.annotations() == other.annotations() and len(plain) > 20


def test_capacity_grows_past_every_doubling():
    ids, captions, image, text = small(5000, 4)
    growth = InfoGrowth(min_align=-1.0, device="cpu")
    for at in range(0, 5000, 700):
        part = slice(at, at + 700)
        growth.process(ids[part], captions[part], image[part], text[part])
    rows = growth.kept_features("text")
    assert rows.shape == (5000, 4) and rows.dtype == np.float32
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, unit, atol=1e-7)


def test_a_restored_dataset_accepts_parts_and_refuses_what_does_not_belong_together():
    ids, captions, image, text = small(60)
    growth = InfoGrowth(k=3, device="cpu")
    growth.process(ids[:40], captions[:40], image[:40], text[:40])
    saved = [growth.settings, growth.kept_ids, captions_of(growth), growth.kept_gains]
    features = [growth.kept_features(space) for space in ("image", "text")]
    parts = [[rows[:5], rows[5:5], rows[5:]] for rows in features]
    restored = InfoGrowth.restore(*saved, *parts, device="cpu")
    arguments = ids[40:], captions[40:], image[40:], text[40:]
    assert list(restored.process(*arguments)) == list(growth.process(*arguments))
    assert restored.annotations() == growth.annotations()
    with pytest.raises(UserError, match="image features"):
        InfoGrowth.restore(*saved, features[0][:-1], features[1], device="cpu")
    with pytest.raises(UserError, match="text features"):
        InfoGrowth.restore(*saved, features[0], None, device="cpu")


def test_under_the_launcher_without_a_group_each_process_searches_everything(monkeypatch, caplog):
    ids, captions, image, text = small(60)
    alone = InfoGrowth(device="cpu")
    alone.process(ids, captions, image, text)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    launched = InfoGrowth(device="cpu")
    launched.process(ids, captions, image, text)
    assert launched.annotations() == alone.annotations()
    assert "process_group" in caplog.text
    with pytest.raises(UserError, match="process_group"):
        InfoGrowth(device="cpu", sharded=True).process(ids, captions, image, text)


def test_calls_inside_and_outside_of_inference_mode_mix():
    ids, captions, image, text = small(60)
    plain, mixed = InfoGrowth(device="cpu"), InfoGrowth(device="cpu")
    plain.process(ids, captions, image, text)
    with torch.inference_mode():
        features = torch.from_numpy(image[:20]), torch.from_numpy(text[:20])
        mixed.process(ids[:20], captions[:20], *features)
        parts = [mixed.kept_features(space) for space in ("image", "text")]
        saved = mixed.settings, mixed.kept_ids, captions_of(mixed), mixed.kept_gains
        restored = InfoGrowth.restore(*saved, *parts, device="cpu")
    for growth in (mixed, restored):
        growth.process(ids[20:], captions[20:], image[20:], text[20:])
        assert growth.annotations() == plain.annotations()


def test_annotations_hold_image_caption_and_both_gains():
    growth = InfoGrowth(device="cpu")
    growth.process(["a", "b"], ["x", "y"], np.eye(2), np.eye(2))
    assert growth.annotations() == [
        {"image": "a", "caption": "x", "gains": [1.0, 1.0]},
        {"image": "b", "caption": "y", "gains": [1.0, 1.0]},
    ]


def test_columns_hold_the_same_as_the_records():
    ids, captions, image, text = small(80)
    growth = InfoGrowth(device="cpu")
    decisions = growth.process(ids, captions, image, text)
    assert decisions.verdicts == [record.verdict for record in decisions]
    assert decisions.reason.tolist() == [record.reason for record in decisions]
    assert decisions[-1] == decisions[79] and decisions[3:5] == [decisions[3], decisions[4]]
    assert decisions.kept.sum() == len(growth) == decisions.verdicts.count("kept")
    with pytest.raises(IndexError):
        decisions[80]


# --- the original on edge cases (selection_edge_probes.json), and what the spec wants instead ---


def test_probe_a_dataset_needs_no_dimension_in_advance():
    assert PROBES["empty_init_dim"] == 256  # the original guessed, and then failed
    assert "dimensionality" in PROBES["empty_init_process"]
    growth = InfoGrowth(device="cpu")
    assert growth.process(["a"], ["x"], np.ones((1, 7)), np.ones((1, 7))).verdicts == ["kept"]
    assert growth.settings["dimension"] == {"image": 7, "text": 7}


def test_probe_a_copy_of_a_kept_sample_is_kept_with_less_gain():
    assert PROBES["dup_gains"][1][0] < PROBES["dup_gains"][0][0]  # the original does so too
    rows = np.random.default_rng(0).normal(size=(5, 16))
    growth = InfoGrowth(device="cpu")
    growth.seed(list("abcde"), list("abcde"), rows, rows)
    copy = growth.process("f", "copy", rows[0], rows[0])
    assert copy.verdict == "kept" and copy.image_neighbors[0] == ("a", pytest.approx(0, abs=1e-7))
    others = sorted(distance for _, distance in copy.image_neighbors[1:])
    assert copy.gain_image == pytest.approx(sum(others) / 4, abs=1e-7)


def test_probe_a_seed_that_comes_again_is_not_inserted_twice():
    assert PROBES["seed_reprocessed"]["kept"] == 6  # the original inserts it again
    rows = np.eye(5)
    growth = InfoGrowth(device="cpu")
    growth.seed(list("abcde"), list("abcde"), rows, rows)
    assert growth.process("c", "again", rows[2], rows[2]).reason == Reason.DUPLICATE_ID
    assert len(growth) == 5


def test_probe_a_zero_feature_is_not_kept():
    assert PROBES["zero_feature"].startswith("kept=4")  # the original keeps it
    growth = InfoGrowth(device="cpu")
    growth.seed(["a"], ["x"], np.ones((1, 4)), np.ones((1, 4)))
    assert growth.process("b", "y", np.zeros(4), np.ones(4)).reason == Reason.IMAGE_ZERO
