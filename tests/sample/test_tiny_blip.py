"""The bundled tiny BLIP: small, complete, and able to tell the sample's captions apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from infogrowth.data.images import decode_image
from infogrowth.data.sources import open_source
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.evaluation.truth import auroc


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "infogrowth" / "assets" / "tiny_blip"


@pytest.fixture(scope="module")
def pairs(repository):
    """Every fourth pair of the sample after its seeds: 495 pictures that training never saw."""
    source = open_source(repository / "processed_data" / "sample")
    return [source.read(row) for row in range(220, len(source), 4)]


@pytest.fixture(scope="module")
def truth(repository):
    return json.loads((repository / "processed_data" / "sample_truth.json").read_text())


@pytest.fixture(scope="module")
def features(pairs):
    encoder = load_encoder("tiny")
    images = torch.stack([encoder.preprocess(decode_image(pair.data)) for pair in pairs])
    return encoder.encode_images(images).numpy(), encoder.encode_texts([p.caption for p in pairs])


def test_the_folder_is_complete_and_small(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "README.md",
    }  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000


def test_alignment_tells_right_captions_from_swapped_ones(pairs, truth, features):
    images, texts = features
    swapped = np.array([truth[pair.id]["swapped"] for pair in pairs])
    assert auroc((images * texts.numpy()).sum(axis=1), ~swapped) >= 0.98


def test_planted_copies_are_nearer_to_their_originals_than_to_anything_else(
    repository, pairs, truth, features
):
    source = open_source(repository / "processed_data" / "sample")
    rows = {key: row for row, key in enumerate(source.ids)}
    encoder = load_encoder("tiny")
    copies = [number for number, pair in enumerate(pairs) if truth[pair.id]["copy_of"]]
    originals = [source.read(rows[truth[pairs[n].id]["copy_of"]]).data for n in copies]
    ready = torch.stack([encoder.preprocess(decode_image(data)) for data in originals])
    similarity = features[0][copies] @ encoder.encode_images(ready).numpy().T
    own = np.diag(similarity)
    strangers = np.median(similarity, axis=1)
    assert (own > 0.9).mean() > 0.8 and (own > strangers).all()


def test_it_writes_captions_for_unseen_pictures(pairs):
    captioner = load_captioner("tiny")
    pictures = [captioner.preprocess(decode_image(pair.data)) for pair in pairs[:24]]
    written = captioner.caption(pictures)
    assert len(written) == 24 and all(text.strip() for text in written)
    assert len(set(written)) > 12


def test_the_readme_gives_figure_seed_and_command(folder):
    readme = (folder / "README.md").read_text()
    for expected in ("AUROC", "scripts/making/tiny_blip.sh", "pretrain_tiny.yaml", "seed"):
        assert expected in readme
