"""The parts of scripts/making/make_sample.py that need no network: same seed, same bytes."""

import importlib
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from infogrowth.errors import UserError
from infogrowth.randomness import generator


@pytest.fixture
def part(repository, monkeypatch):
    """Import one module of scripts/making/ the way the scripts themselves do."""
    monkeypatch.syspath_prepend(str(repository / "scripts" / "making"))
    return importlib.import_module


@pytest.fixture
def drawings(part):
    """Two artists' drawings of 60 made-up things, whose names share no word."""
    concepts, artists = part("sample_parts.concepts"), part("sample_parts.artists")
    things = [
        concepts.Concept(f"c{i}", (f"thing{i} whole{i}",), ((f"word{i}", f"other{i}"),), False)
        for i in range(60)
    ]
    return [
        artists.Drawing(artist, thing, thing.code, thing.names[0], "<svg/>")
        for thing in things
        for artist in ("ann", "bob")
    ]


def ball(color: str, size: int = 128) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((20, 30, 100, 110), fill=color, outline="black", width=3)
    return image


def planned(part, drawings, seed=0):
    return part("sample_parts.planting").plan(
        drawings,
        generator(seed, "plan"),
        pairs=100,
        seeds=10,
        swapped_share=0.2,
        copied_share=0.1,
    )


def test_a_plan_has_the_shares_asked_for_and_clean_seeds(part, drawings):
    plan = planned(part, drawings)
    assert len(plan.stream) == 100 and plan.seeds == 10
    assert sum(place.swapped for place in plan.stream) == 20
    assert sum(place.original is not None for place in plan.stream) == 10
    assert not any(p.swapped or p.original is not None for p in plan.stream[:10])


def test_a_copy_never_comes_before_its_original(part, drawings):
    for seed in range(20):
        seen = set()
        for place in planned(part, drawings, seed).stream:
            assert place.original is None or place.drawing.name in seen
            seen.add(place.drawing.name)


def test_the_same_seed_plans_the_same_stream_and_another_seed_another(part, drawings):
    first, again, other = (planned(part, drawings, seed).stream for seed in (0, 0, 1))
    assert first == again and first != other


def test_too_few_drawings_are_refused(part, drawings):
    with pytest.raises(ValueError, match="too few"):
        planned(part, drawings[:50])


def test_shards_are_the_same_bytes_every_time(part, tmp_path):
    shards, pixels = part("sample_parts.shards"), part("sample_parts.pixels")
    for folder in ("one", "two"):
        pictures = []
        for position, color in enumerate(["red", "green", "blue"]):
            ending, data = pixels.store(ball(color), generator(0, "picture", position))
            key = shards.key_of(position, 2)
            pictures.append(shards.Picture(key, f"a {color} ball", "pkg:npm/x", ending, data))
        shards.write_shards(tmp_path / folder, pictures, 2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [
        *("00000.parquet", "00000.tar", "00000_stats.json"),
        *("00001.parquet", "00001.tar", "00001_stats.json"),
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_near_copy_differs_in_bytes_but_little_to_the_eye(part):
    pixels = part("sample_parts.pixels")
    original = pixels.encode(ball("orange"), "png")
    changes = set()
    for number in range(20):
        _, data, change = pixels.near_copy(original, np.random.default_rng(number))
        changes.add(change)
        copy = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BOX)
        seen = np.asarray(copy, float) - np.asarray(ball("orange").reduce(4), float)
        assert data != original and np.abs(seen).mean() < 16, change
    assert changes == {"re-encoded", "rescaled", "cropped", "tinted"}


def test_lookalikes_are_told_from_other_drawings(part):
    looks = part("sample_parts.lookalikes")
    moved = Image.new("RGB", (128, 128), "white")
    moved.paste(ball("red").crop((20, 30, 101, 111)).resize((60, 60)), (5, 5))
    distances, positions = looks.nearest(
        looks.signatures([moved, ball("blue")]), looks.signatures([ball("green"), ball("red")])
    )
    assert positions[0] == 1 and distances[0] < looks.SAME_PICTURE < distances[1]


def test_captions_are_names_and_keywords_that_people_wrote(part):
    concepts = part("sample_parts.concepts")
    apple = concepts.Concept("1f34e", ("red apple",), (("apple", "fruit", "ripe"),), False)
    rng = np.random.default_rng(0)
    written = {concepts.caption(apple, rng) for _ in range(50)}
    assert written == {
        "red apple, fruit", "red apple, ripe", "red apple, fruit, ripe",
    }  # fmt: skip


def test_an_emoji_has_one_code_however_it_is_written(part):
    code_of = part("sample_parts.concepts").code_of
    assert code_of("❤️") == code_of("2764-FE0F") == code_of("2764") == "2764"


def test_a_package_with_other_bytes_than_pinned_is_refused(part, tmp_path):
    packages = part("sample_parts.packages")
    package = packages.by_artist("twemoji")
    (tmp_path / package.tarball).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"twemoji-1\.2\.5\.tgz"):
        packages.fetch(package, tmp_path)


def test_a_vocabulary_opens_with_the_special_tokens_and_bert_can_read_it(part, tmp_path):
    from infogrowth.blip.text import load_tokenizer

    train = part("train_vocabulary").train_vocabulary
    captions = ["a red apple", "a green apple, fruit", "red fox", "green tree, nature"] * 5
    tokens = train(captions, 60)
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokens[5:] == sorted(set(tokens[5:])) and len(tokens) <= 60
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    assert tokenizer.tokenize("A picture of apple") == ["a", "picture", "of", "apple"]
