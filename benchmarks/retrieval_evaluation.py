"""Retrieval evaluation against re-ranking row by row, in one run, on the same model and scores.

    python benchmarks/retrieval_evaluation.py                      # tiny model, on a CPU
    python benchmarks/retrieval_evaluation.py --vit base --device cuda --images 500 --k_test 128

The straightforward way, as the paper's code has it: one query after the other, its candidates as a
batch, every caption padded to the full length, the image repeated for each of its candidates, and
pairs that both directions want computed twice.
"""

import sys
import time
from dataclasses import dataclass

import infogrowth.threads  # noqa: F401 - before torch

import torch

from infogrowth import distributed
from infogrowth.blip.config import preset
from infogrowth.blip.model import BlipDual
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.evaluation.retrieval import NOT_RANKED, retrieval_scores
from infogrowth.randomness import generator, torch_generator
from infogrowth.training.options import Precision, PrecisionName, Vit

CAPTIONS_PER_IMAGE = 5
MAX_LENGTH = 35


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    vit: Vit = option("tiny", "size of the model")
    image_size: int = option(64, "pixels a side")
    images: int = option(100, "images, each with five captions")
    k_test: int = option(32, "candidates per query")
    device: str = option("auto", "auto, cpu or cuda")
    precision: PrecisionName = option("auto", "as in training")


class WordsAsNumbers:
    """A tokenizer whose captions are already token ids, of COCO's lengths (about 13 tokens)."""

    def __call__(self, captions: list[str], **_: object) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(captions), MAX_LENGTH, dtype=torch.int64)
        for row, caption in enumerate(captions):
            words = torch.tensor([int(word) for word in caption.split()])
            ids[row, : len(words)] = words
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class NoiseImages(torch.utils.data.Dataset):
    """Noise: what is in an image does not change how long it takes."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = torch.randn(count, 3, size, size, generator=torch_generator(0, "noise"))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"image": self.pixels[number]}


def captions(count: int) -> list[str]:
    """Captions of 10 to 22 tokens, most of them 12 to 14, as on COCO."""
    random = generator(0, "captions")
    lengths = 10 + random.gamma(2.0, 1.6, count).astype(int).clip(0, 12)
    words = [random.integers(200, 30_000, length) for length in lengths]
    return [" ".join(map(str, [101, *row, 102])) for row in words]


@torch.inference_mode()
def row_by_row(
    model: BlipDual, noise: NoiseImages, texts: list[str], k_test: int, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The straightforward evaluation; returns both score matrices."""
    device = next(model.parameters()).device
    batch = WordsAsNumbers()(texts)
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    text = torch.cat(
        [
            model.encode_text(ids[s : s + batch_size], mask[s : s + batch_size])[1]
            for s in range(0, len(ids), batch_size)
        ]
    )
    parts = [model.encode_image(p.to(device)) for p in noise.pixels.split(batch_size)]
    tokens, image = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    cosine = image @ text.T
    i2t = torch.full(cosine.shape, NOT_RANKED, device=device)
    for row, similarity in enumerate(cosine):
        values, found = similarity.topk(min(k_test, len(texts)))
        repeated = tokens[row].repeat(len(found), 1, 1)
        i2t[row, found] = model.itm_logits(repeated, ids[found], mask[found])[:, 1] + values
    t2i = torch.full(cosine.T.shape, NOT_RANKED, device=device)
    for row, similarity in enumerate(cosine.T):
        values, found = similarity.topk(min(k_test, len(tokens)))
        repeated_ids = ids[row].repeat(len(found), 1)
        repeated_mask = mask[row].repeat(len(found), 1)
        logits = model.itm_logits(tokens[found], repeated_ids, repeated_mask)
        t2i[row, found] = logits[:, 1] + values
    return i2t.cpu(), t2i.cpu()


def run(config: Config) -> int:
    """Time both evaluations on one model and check that they give the same scores."""
    device = distributed.choose_device(config.device)
    precision = Precision(config.precision, device)
    size = preset(config.vit, image_size=config.image_size, vocab_size=30524)
    model = BlipDual(size).to(device).eval()
    noise = NoiseImages(config.images, config.image_size)
    texts = captions(config.images * CAPTIONS_PER_IMAGE)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        scores = retrieval_scores(
            model,
            WordsAsNumbers(),  # type: ignore[arg-type]
            noise,
            texts,
            k_test=config.k_test,
            max_length=MAX_LENGTH,
            autocast=precision.autocast,
        )
        return scores.i2t, scores.t2i

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        with precision.autocast():
            return row_by_row(model, noise, texts, config.k_test)

    seconds = {}
    scores = {}
    for name, evaluate in (("row by row", theirs), ("ours", ours)) * 2:  # the first is warm-up
        started = time.perf_counter()
        scores[name] = evaluate()
        seconds[name] = time.perf_counter() - started
    both = zip(scores["ours"], scores["row by row"], strict=True)
    largest = max(float((a - b).abs().max()) for a, b in both)
    pairs = config.k_test * (len(texts) + config.images)
    print(f"{config.images} images, {len(texts)} captions, k_test {config.k_test}, {config.vit}")
    print(f"{device.type} {precision.name}, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:>10}: {value:7.2f} s  {pairs / value:9.0f} pairs/s")
    print(f"   speedup: {seconds['row by row'] / seconds['ours']:.2f}×")
    print(f"largest difference of a score: {largest:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
