"""`select --where`: one SQL expression over decisions and score tables."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from infogrowth.annotations import load_annotations
from infogrowth.data.sample_table import SampleTable
from infogrowth.errors import UserError
from infogrowth.growth.ledger import read_growth


@pytest.fixture
def grown(selection, infogrowth, tmp_path):
    """The golden selection as a growth folder, and its result JSON."""
    folder, result = tmp_path / "growth", tmp_path / "grown.json"
    seeds, stream = selection.folder("seeds", range(100)), selection.folder("all", range(100, 1600))
    status, _ = infogrowth(
        "grow", "--features", stream, "--seed-features", seeds, "--growth", folder,
        "--output", result, "--quiet",
    )  # fmt: skip
    assert status == 0
    return folder, result


def score_file(path, ids, **columns):
    pq.write_table(pa.table({"id": ids, **columns}), path)
    return path


def test_clauses_over_decisions_and_scores_keep_what_pandas_would(grown, infogrowth, tmp_path):
    folder, result = grown
    decisions = read_growth(folder).decisions().to_pandas()
    kept = decisions[decisions.verdict != "dropped"]
    scored = kept.id.tolist()[: len(kept) // 2]
    aesthetic = np.random.default_rng(0).uniform(0, 10, len(scored))
    score_file(tmp_path / "a.parquet", [*scored, "nobody"], aesthetic=[*aesthetic, 1.0])
    output = tmp_path / "out.json"
    status, printed = infogrowth(
        "select", "--growth", folder, "--scores", tmp_path / "a.parquet", "--output", output,
        "--where", "gain >= 0.3 and aesthetic > 4.5 and alignment between 0.4 and 0.9",
    )  # fmt: skip
    assert status == 0
    gain = (kept.gain_image + kept.gain_text) / 2
    score = kept.id.map(dict(zip(scored, aesthetic, strict=True)))
    first, second, third = gain >= 0.3, score > 4.5, kept.alignment.between(0.4, 0.9)
    expected = kept[first & second & third]
    assert 0 < len(expected) < len(kept)
    chosen = load_annotations(output)
    assert [entry["image"] for entry in chosen] == expected.id.tolist()
    everything = {entry["image"]: entry for entry in load_annotations(result)}
    assert chosen == [everything[entry["image"]] for entry in chosen]
    lines = [line.replace(",", "") for line in printed.splitlines()]
    counts = [(first.sum(), first.sum()), (second.sum(), (first & second).sum())]
    counts.append((third.sum(), len(expected)))
    clauses = [line.partition("  (")[0].split()[-2:] for line in lines if line.startswith("(")]
    assert [[str(a), str(b)] for a, b in counts] == clauses
    assert f"{len(kept) - len(scored)} without a value" in " ".join(lines)
    assert f"{len(kept) - len(scored)} samples have no row" in " ".join(lines)
    assert "no sample" in printed


def test_a_selection_from_the_folder_is_that_from_its_result(grown, infogrowth, tmp_path):
    folder, result = grown
    for choice in (["--top", 40], ["--bernoulli", "--seed", 7], ["--where", "gain > 0.4"]):
        outputs = [tmp_path / "a.json", tmp_path / "b.json"]
        for source, output in zip(
            (["--growth", folder], ["--annotations", result]), outputs, strict=True
        ):
            assert infogrowth("select", *source, *choice, "--output", output)[0] == 0
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_what_was_dropped_can_be_selected_too(grown, infogrowth, tmp_path):
    folder, _ = grown
    decisions = read_growth(folder).decisions().to_pandas()
    output = tmp_path / "out.parquet"
    status, _ = infogrowth(
        "select", "--growth", folder, "--among", "dropped", "--output", output,
        "--where", "reason = 'alignment below min_align' and alignment > 0.3",
    )  # fmt: skip
    assert status == 0
    low = decisions[(decisions.reason == "alignment below min_align") & (decisions.alignment > 0.3)]
    table = pq.read_table(output).to_pandas()
    assert table.image.tolist() == low.id.tolist()
    assert table.alignment.tolist() == low.alignment.tolist()
    assert set(table.verdict) == {"dropped"}


def test_extra_keys_of_a_result_are_columns_too(infogrowth, tmp_path):
    entries = [
        {"image": str(n), "caption": "c", "gains": [n, n], "page": f"p{n % 2}", "size": [n, n]}
        for n in range(1, 7)
    ]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    output = tmp_path / "out.json"
    status, _ = infogrowth(
        "select", "--annotations", tmp_path / "in.json", "--output", output, "--top", 2,
        "--where", "page = 'p1' and size[1] < 6",
    )  # fmt: skip
    assert status == 0
    assert json.loads(output.read_text()) == [entries[2], entries[4]]


def test_ids_meet_without_folder_and_extension_and_repeats_are_counted(infogrowth, tmp_path):
    names = ["a/1.jpg", "2", "3.png", "x", "17"]
    entries = [{"image": name, "caption": "c", "gains": [1, 1]} for name in names]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    score_file(tmp_path / "s.parquet", ["1", "b/2.webp", "3", "3", "4"], s=[1, 2, 3, 0, 4])
    score_file(tmp_path / "numbers.parquet", [17.0, 5.0], t=[1.0, 2.0])
    output = tmp_path / "out.parquet"
    status, printed = infogrowth(
        "select", "--annotations", tmp_path / "in.json", "--output", output,
        "--scores", tmp_path / "s.parquet", tmp_path / "numbers.parquet",
        "--where", "s >= 1 or t = 1",
    )  # fmt: skip
    assert status == 0
    assert pq.read_table(output).to_pydict() == {
        "image": ["a/1.jpg", "2", "3.png", "17"],
        "caption": ["c"] * 4,
        "gain_image": [1.0] * 4,
        "gain_text": [1.0] * 4,
        "s": [1, 2, 3, None],
        "t": [None, None, None, 1.0],
    }
    assert "several" in printed


def test_files_of_the_same_columns_are_one_table(infogrowth, tmp_path):
    (tmp_path / "metadata").mkdir()
    for part in range(2):
        ids = [f"{part}{n}" for n in range(3)]
        score_file(tmp_path / f"metadata/{part}.parquet", ids, width=[100 * n for n in range(3)])
    entries = [{"image": f"{p}{n}", "caption": "c", "gains": [1, 1]} for p in "01" for n in "012"]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    status, _ = infogrowth(
        "select", "--annotations", tmp_path / "in.json", "--output", tmp_path / "out.json",
        "--scores", tmp_path / "metadata", "--where", "metadata.width >= 200",
    )  # fmt: skip
    assert status == 0
    assert [e["image"] for e in load_annotations(tmp_path / "out.json")] == ["02", "12"]


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        ("aestetic > 4", 'Candidate bindings: "aesthetic"'),
        ("samples.gian > 4", 'named "gian"'),
        ('verdict = "kept"', "single quotes"),
        ("caption = 'one'", "s.caption"),
        ("gain >", "syntax error"),
        ("", "without selection"),
        ("gain > 0; drop table samples", "statement"),
        ("1=1) union select (1", "syntax error"),
        ("1=1) group by (1", "syntax error"),
        ("exists(select * from read_text('/etc/hostname'))", "a query of its own"),
        ("row_number() over () > 1", "window"),
        ("random() < 0.5", "reproducible"),
        ("gain > 0 and now() > timestamp '2020-01-01'", "reproducible"),
        ("current_setting('temp_directory') = ''", "reproducible"),
        ("count(*) > 1", "aggregates"),
        ("verdict::int > 3", "Could not convert"),
        ("gain > $1", "parameters"),
    ],
)
def test_only_an_expression_over_columns_is_a_condition(condition, word, tmp_path):
    scores = score_file(tmp_path / "s.parquet", ["a"], aesthetic=[5.0], caption=["one"])
    columns = {"id": ["a"], "gain": [0.5], "verdict": ["kept"], "caption": ["one"]}
    samples = pa.table({"sample_position": [0], **columns})
    table = SampleTable(samples, "SELECT * FROM {source}", [str(scores)])
    with pytest.raises(UserError, match=word.replace("(", r"\(")):
        table.filter(condition)


def test_the_database_reads_no_other_file(tmp_path):
    other = score_file(tmp_path / "other.parquet", ["a"], secret=[1])
    samples = pa.table({"sample_position": [0], "id": ["a"]})
    with pytest.raises(Exception, match="disabled"):
        SampleTable(samples, f"SELECT 0 AS sample_position, id FROM read_parquet('{other}')")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--where", "gain > 5"], "no sample meets"),
        (["--where", "gain > 0", "--scores", "missing.parquet"], "does not exist"),
        (["--where", "gain > 0", "--scores", "other_ids.parquet"], "no id of"),
        (["--where", "gain > 0", "--scores", "nameless.parquet"], "no column of ids"),
        (["--where", "gain > 0", "--scores", "in.json"], "cannot be read"),
        (["--scores", "other_ids.parquet", "--top", "1"], "--where"),
        (["--where", "gain > 0", "--among", "dropped"], "--growth"),
        (["--where", "gain > 0", "--growth", "folder"], "either --annotations"),
    ],
)
def test_what_no_condition_can_use_is_refused(infogrowth, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text('[{"image": "a", "caption": "c", "gains": [1, 1]}]')
    score_file(tmp_path / "other_ids.parquet", ["b"], s=[1])
    pq.write_table(pa.table({"s": [1]}), tmp_path / "nameless.parquet")
    status, printed = infogrowth(
        "select", "--annotations", "in.json", "--output", "o.json", *arguments
    )
    assert status == 2
    assert word in printed
    assert not (tmp_path / "o.json").exists()


@settings(max_examples=40, deadline=None)
@drawn(
    ids=st.lists(st.text("ab/.1", min_size=1, max_size=4), min_size=1, max_size=8, unique=True),
    theirs=st.lists(st.text("ab/.1", min_size=1, max_size=4), max_size=8),
    bound=st.integers(0, 8),
)
def test_exact_ids_meet_the_first_row_of_their_name(tmp_path_factory, ids, theirs, bound):
    """Whatever the ids: the selection is what a dictionary of first rows would choose."""
    theirs = [*theirs, ids[0]]
    path = tmp_path_factory.mktemp("scores") / "s.parquet"
    score_file(path, theirs, s=list(range(len(theirs))))
    first = {name: row for row, name in reversed(list(enumerate(theirs)))}
    samples = pa.table({"sample_position": range(len(ids)), "id": ids})
    chosen, _, _ = SampleTable(samples, "SELECT * FROM {source}", [str(path)]).filter(
        f"s >= {bound}"
    )
    assert chosen.tolist() == [n for n, name in enumerate(ids) if first.get(name, -1) >= bound]
