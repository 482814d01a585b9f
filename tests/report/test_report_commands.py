"""The four commands as a person calls them: through the command line, on the made growth folder."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from infogrowth.cli import main
from infogrowth.report.formatting import percent

VOID_TEXT = "window.__injected"


class Seen(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, addresses and handlers."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.alternatives: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.append(name)
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                self.addresses.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")

    def handle_data(self, data):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", str(made.growth), "-o", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def test_the_page_leads_nowhere_and_carries_its_images(page):
    seen = Seen(page)
    assert all(a.startswith(("data:", "#")) for a in seen.addresses)
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert "@import" not in page
    assert sum(a.startswith("data:image/webp;base64,") for a in seen.addresses) > 50


def test_hostile_ids_and_captions_stay_text(page):
    seen = Seen(page)
    assert seen.tags.count("script") == 1
    assert seen.handlers == []
    assert not any(VOID_TEXT in address for address in seen.addresses)
    # … and they are there to be read, in text and in alternative texts:
    assert "&lt;script&gt;window.__injected=1&lt;/script&gt;" in page
    assert any(VOID_TEXT in text for text in seen.alternatives)


def test_thumbnails_are_small_and_made_anew(page):
    import base64

    for code in re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)[:20]:
        with Image.open(io.BytesIO(base64.b64decode(code))) as image:
            assert max(image.size) <= 128
            assert image.format == "WEBP"


def test_every_gallery_shows_what_was_decided(page, made):
    for title in ("Dropped as noise", "Recaptioned", "Most redundant", "Most novel"):
        assert title in page
    dropped = page[page.index('id="panel-dropped"') : page.index('id="panel-recaptioned"')]
    shown = re.findall(r'<p class="id"><bdi>([^<]*)</bdi>', dropped)
    expected = sorted(
        (row["alignment"], row["id"]) for row in made.rows if row["verdict"] == "dropped"
    )
    assert shown == [sample_id for _, sample_id in expected]


def test_redundant_samples_stand_beside_their_nearest_neighbors(page, made):
    start = page.index('id="panel-redundant"')
    first = page[start : page.index("</li>", page.index('class="neighbors"', start))]
    kept = [row for row in made.rows if row["verdict"] != "dropped"]
    lowest = min(kept, key=lambda row: row["gain_image"] + row["gain_text"])
    assert f"<bdi>{lowest['id']}</bdi>" in first
    assert f"{lowest['image_distances'][0]:.3f}" in first


def test_the_same_growth_gives_the_same_bytes(page, made, tmp_path):
    assert main(["report", str(made.growth), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_known_truth_is_shown_before_and_after(made, tmp_path):
    came = [row for row in made.rows if row["reason"] != "seed"]
    right = [{"image": row["id"], "caption": [row["original_caption"]]} for row in came[1:]]
    wrong = {"image": came[0]["id"], "caption": ["another caption"]}
    (tmp_path / "truth.json").write_text(json.dumps([wrong, *right]))
    path = tmp_path / "report.html"
    truth = str(tmp_path / "truth.json")
    assert main(["report", str(made.growth), "--truth", truth, "-o", str(path)]) == 0
    kept = [row for row in came if row["verdict"] != "dropped"]
    wrong_after = sum(row["caption"] != row["original_caption"] for row in kept)
    wrong_after += came[0]["verdict"] == "kept"
    shown = f"{percent(100 / len(came))} → {percent(100 * wrong_after / len(kept))}"
    assert shown in path.read_text(encoding="utf-8")


def test_a_result_json_is_reported_with_its_lmdb(made, tmp_path):
    result = tmp_path / "grown.json"
    samples = [
        {"image": row["id"], "caption": row["caption"], "gains": [row["gain_image"]] * 2}
        for row in made.rows[:60]
        if row["verdict"] != "dropped"
    ]
    result.write_text(json.dumps(samples))
    output = tmp_path / "report.html"
    arguments = ["--annotations", str(result), "--lmdb", str(made.lmdb), "-o", str(output)]
    assert main(["report", *arguments]) == 0
    page = output.read_text(encoding="utf-8")
    assert page.count("data:image/webp") >= 50
    assert "Most novel" in page
    assert "Dropped as noise" not in page


def test_a_report_without_its_images_says_so(made, tmp_path):
    import shutil

    growth = tmp_path / "growth"
    shutil.copytree(made.growth, growth)
    settings = json.loads((growth / "growth.json").read_text())
    (growth / "growth.json").write_text(json.dumps({**settings, "images": "/moved/away"}))
    assert main(["report", str(growth), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "No images: /moved/away is gone; give the LMDB with --lmdb DIR." in page
    assert "data:image/webp" not in page


def sample(number, verdict="kept", **more):
    return {
        "row": number,
        "source": 1,
        "source_row": number,
        "id": f"s{number}",
        "verdict": verdict,
        "reason": "aligned" if verdict == "kept" else "image feature is not finite",
        "image_neighbors": [],
        "image_distances": [],
        "text_neighbors": [],
        "text_distances": [],
        "caption": "words",
        "original_caption": "words",
        "alignment": 0.5,
        "original_alignment": 0.5,
        "gain_image": 1.0,
        "gain_text": 1.0,
        **more,
    }


ABSENT = dict.fromkeys(["alignment", "original_alignment", "gain_image", "gain_text"])


@pytest.mark.parametrize(
    "rows",
    [
        [sample(0)],
        [sample(0, "dropped", **ABSENT)],
        [sample(n, gain_image=0.0, gain_text=0.0) for n in range(7)],
        [sample(n, gain_text=None) for n in range(4)],
        [sample(n, caption=None, original_caption=None, source=n % 2) for n in range(30)],
    ],
    ids=["one sample", "nothing kept", "no gain at all", "labels", "no captions"],
)
def test_unusual_growths_have_a_report_and_a_sweep_too(rows, tmp_path, write_folder):
    kept = sum(row["verdict"] == "kept" for row in rows)
    features = np.ones((kept, 4)) / 2
    write_folder(tmp_path / "g", rows, features, features)
    if any(row["gain_text"] is None for row in rows) and kept:
        settings = json.loads((tmp_path / "g/growth.json").read_text())
        (tmp_path / "g/growth.json").write_text(json.dumps({**settings, "modality": "image"}))
    assert main(["report", str(tmp_path / "g"), "-o", str(tmp_path / "r.html")]) == 0
    assert "nan" not in Seen((tmp_path / "r.html").read_text(encoding="utf-8")).text.lower()
    assert main(["sweep", str(tmp_path / "g")]) == (0 if kept else 2)


def test_a_growth_that_was_begun_but_holds_nothing_is_refused(tmp_path, write_folder, capsys):
    write_folder(tmp_path / "g", [], np.ones((0, 4)), np.ones((0, 4)))
    assert main(["report", str(tmp_path / "g"), "-o", str(tmp_path / "r.html")]) == 2
    assert "no samples" in capsys.readouterr().err


def test_training_runs_stand_side_by_side(tmp_path):
    for name, loss in (("full", 3.0), ("grown <i>", 2.0)):
        (tmp_path / name).mkdir()
        records = [
            {"kind": "step", "step": s, "samples_seen": 64 * s, "loss": loss + 1 / s}
            for s in (1, 2, 3)
        ]
        records.append(
            {"kind": "epoch", "step": 3, "samples_seen": 192, "recall": {"val": {"r_mean": 41.5}}}
        )
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    runs = [str(tmp_path / "full"), str(tmp_path / "grown <i>")]
    assert main(["report", "--training", *runs, "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "grown &lt;i&gt;" in page
    assert "<i>grown" not in page
    assert page.count("41.50") == 2


def test_explain_prints_text_json_and_a_strip(made, tmp_path, capsys):
    sample_id = made.ids("recaptioned")[1]
    image = tmp_path / "strip.png"
    assert main(["explain", str(made.growth), sample_id, "--image", str(image)]) == 0
    assert f"{sample_id}: recaptioned" in capsys.readouterr().out
    with Image.open(image) as strip:
        assert strip.format == "PNG"
    assert main(["explain", str(made.growth), sample_id, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    row = next(row for row in made.rows if row["id"] == sample_id)
    assert found["alignment"] == row["alignment"]
    assert found["image_neighbors"][0]["id"] == row["image_neighbors"][0]


def test_sweep_prints_tables_and_json_and_plots(made, tmp_path, capsys):
    page, plot = tmp_path / "sweep.html", tmp_path / "sweep.png"
    assert main(["sweep", str(made.growth), "--min-align", "0.2", "-0.1", "-o", str(page)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["-0.1", "0.2", "0.4*"]
    assert Seen(page.read_text(encoding="utf-8")).handlers == []
    assert main(["sweep", str(made.growth), "--tops", "5", "--json", "-o", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["count"] for row in found["tops"]] == [5]
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_compare_prints_text_and_json_and_a_page(made, tmp_path, capsys):
    kept = [row for row in made.rows if row["verdict"] != "dropped"]
    for name, rows in (("a", kept[:100]), ("b", kept[40:])):
        samples = [{"image": r["id"], "caption": r["caption"], "gains": [0.5, 0.5]} for r in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(samples))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    output = tmp_path / "compare.html"
    assert main(["compare", *files, "-o", str(output), "--lmdb", str(made.lmdb)]) == 0
    assert re.search(r"only in A +40\b", capsys.readouterr().out)
    page = output.read_text(encoding="utf-8")
    assert "data:image/webp" in page
    assert Seen(page).tags.count("script") == 1
    assert main(["compare", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["both"]["count"] == 60


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["report"], "--training"),
        (["report", "/no/such/folder"], "growth folder"),
        (["report", "GROWTH", "--annotations", "x.json"], "both"),
        (["report", "GROWTH", "--lmdb", "/no/lmdb"], "/no/lmdb"),
        (["report", "GROWTH", "--duplicate-distance", "7"], "distance"),
        (["explain", "GROWTH", "nobody"], "never processed"),
        (["sweep", "GROWTH", "-o", "plot.gif"], ".png"),
        (["sweep", "GROWTH", "--tops", "9999"], "9999"),
        (["compare", "/no/a.json", "/no/b.json"], "does not exist"),
    ],
)
def test_bad_input_gets_one_sentence_and_status_2(
    made, arguments, word, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([str(made.growth) if a == "GROWTH" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert list(tmp_path.iterdir()) == []
