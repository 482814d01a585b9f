"""Does a grown dataset train BLIP to the same recall with fewer samples seen? The experiment.

    python scripts/claim.py --config scripts/configs/claim.yaml [--seeds 0 1 2] [--arms full …]

Data, scoring encoder, growth in portions, arms, trainings, figures: each step is kept when it is
done, a stopped one goes on, and what was measured is appended to the results file, from which the
figures can be drawn at any time (--figures_only). docs/claim.md tells what came out.

Needs npm and `pip install resvg-py` (to draw the icons).
"""

import json
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import pandas as pd
from claim_parts.arms import ARMS, Scored, composition
from claim_parts.figures import draw_figures
from claim_parts.parts import make_parts

from infogrowth.annotations import load_annotations
from infogrowth.cli import main, run_script
from infogrowth.config import option
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json, read_json

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train/pretrain_gain.py": ("PretrainConfig", "pretrain"),
    "scripts/making/train_vocabulary.py": ("VocabularyConfig", "write_vocabulary"),
}


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """Options of the experiment; configs/claim.yaml explains them."""

    output: str = option("output/claim", "folder for data, features, growth and runs")
    packages: str = option("output/packages", "where the package of icons is kept")
    results: str = option("docs/claim.jsonl", "what was measured, a line each")
    page: str = option("docs", "folder of claim.png and of the tables in claim_tables.md")
    seeds: list[int] = option([0, 1, 2], "seeds of the trainings")
    arms: list[str] = option([*ARMS], f"of {', '.join(ARMS)}")
    objectives: list[str] = option(["ita"], "losses of the arms' trainings: ita, itm, lm")
    package_version: str = option(help="version of @iconify/json")
    package_sha512: str = option(help="its hash, as the registry has it")
    source_sets: list[str] = option(help="artists' sets of the source, in the order of arrival")
    pretraining_sets: list[str] = option(help="sets that train the scoring encoder")
    seed_sets: list[str] = option(help="sets that are trusted: the clean start of the growth")
    test_sets: list[str] = option(help="sets that only the test draws from")
    pairs: int | None = option(None, "at most so many pairs in source and pretraining part")
    swapped: float = option(0.3, "share of the source's captions that change places")
    portions: int = option(10, "how many portions the source arrives in")
    test_names: int = option(1000, "names in the test set")
    image_size: int = option(64, "pixels a side")
    encoder_samples: int = option(1_000_000, "pairs that the scoring encoder sees")
    min_align: str = option("auto:0.98", "threshold of the growth")
    k: int = option(4, "neighbors of the gain")
    static_size: int = option(16_000, "pairs of every static subset")
    batch_size: int = option(128, "pairs per step, all arms")
    full_samples: int = option(500_000, "samples that the full arm sees")
    samples: int = option(170_000, "samples that the other arms see")
    validate_every: int = option(10_000, "samples between two evaluations")
    device: str = option("auto", "auto, cpu or cuda")
    figures_only: bool = option(False, "draw the figures from the results file, run nothing")


def claim(config: ClaimConfig) -> int:
    """Measure recall against samples seen for a grown dataset and for its rivals."""
    unknown = [name for name in config.arms if name not in ARMS]
    if unknown:
        raise UserError(f"--arms {unknown[0]} is none of {', '.join(ARMS)}")
    results = Results(Path(config.results))
    if not config.figures_only:
        Experiment(config, results).run()
    draw_figures(results.records, Path(config.page))
    return 0


class Results:
    """The JSON lines file of everything measured; a line is written when its step is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **keys: Any) -> list[dict[str, Any]]:
        """The records with these values."""
        return [r for r in self.records if all(r.get(k) == v for k, v in keys.items())]

    def add(self, records: Sequence[dict[str, Any]], **replaced: Any) -> None:
        """Append records; with keys, in place of those that have these values."""
        if replaced:
            old = self.find(**replaced)
            self.records = [record for record in self.records if record not in old]
        self.records += records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
        self.path.write_text(text, "utf-8")


class Experiment:
    """The steps in their order; each is a no-op when its result is there."""

    def __init__(self, config: ClaimConfig, results: Results) -> None:
        self.config, self.results = config, results
        self.folder = Path(config.output)

    def run(self) -> None:
        """Everything that is missing."""
        self.data()
        encoder = self.encoder()
        self.grow(encoder)
        scored = self.scored()
        for seed in self.config.seeds:
            for name in self.config.arms:
                self.train_arm(name, seed, scored)

    def data(self) -> None:
        """Draw the icons, plant the noise."""
        config = self.config
        sets = {
            "source": config.source_sets,
            "pretraining": config.pretraining_sets,
            "seeds": config.seed_sets,
            "test": config.test_sets,
        }
        with self._cost("draw"):
            counts = make_parts(
                self.folder / "data", Path(config.packages),
                (config.package_version, config.package_sha512), sets,
                config.pairs, config.swapped, config.portions, config.test_names,
                config.image_size, seed=0,
            )  # fmt: skip
        self.results.add([{"kind": "parts", **counts}], kind="parts")

    def encoder(self) -> Path:
        """Pretrain the encoder that scores, on other artists' icons."""
        data, output = self.folder / "data", self.folder / "encoder"
        if not (output / "done.json").exists():
            self._vocabulary()
            with self._cost("encoder"):
                self._pretrain(
                    output, data / "pretraining.json", data / "lmdb_pretraining",
                    sampler="uniform", samples=self.config.encoder_samples, seed=1234,
                    objectives=["ita"], validation=data / "seeds_val.json",
                    validation_images=data / "lmdb_seeds",
                )  # fmt: skip
            atomic_write_json(output / "done.json", True)
        return output / "model"

    def grow(self, encoder: Path) -> None:
        """Embed and grow, portion by portion, each onto the last."""
        data, folder = self.folder / "data", self.folder
        self._embed(data / "lmdb_seeds", data / "seeds.json", folder / "features_seeds", encoder)
        for number in range(self.config.portions):
            marker = folder / f"grown_{number:02d}.json"
            features = folder / f"features_{number:02d}"
            portion = data / f"source_{number:02d}.json"
            with self._cost("embed"):
                self._embed(data / "lmdb_source", portion, features, encoder)
            if marker.exists():
                continue
            with self._cost("grow"):
                self._program(
                    "grow", "--features", features,
                    "--growth", folder / "growth",
                    "--seed-features", folder / "features_seeds", "--k", self.config.k,
                    "--min-align", self.config.min_align, "--device", self.config.device,
                    "--output", marker,
                )  # fmt: skip
            self._note_portion(number, portion, marker)

    def _note_portion(self, number: int, portion: Path, grown: Path) -> None:
        """What the growth kept of a portion, against the planted truth."""
        truth = read_json(self.folder / "data" / "truth.json")
        offered = {pair["image"] for pair in read_json(portion)}
        kept = [pair["image"] for pair in load_annotations(grown) if pair["image"] in offered]
        record = {
            "kind": "portion",
            "portion": number,
            "pairs": len(offered),
            "kept": len(kept),
            "wrong_kept": sum(image in truth for image in kept) / max(1, len(kept)),
            "noise_true": sum(image in truth for image in offered) / len(offered),
            "noise": read_json(self.folder / "growth" / "growth.json").get("noise"),
        }
        self.results.add([record], kind="portion", portion=number)

    def scored(self) -> Scored:
        """The source with its scores, in the order of its arrival."""
        data = self.folder / "data"
        portions = range(self.config.portions)
        pairs = [p for n in portions for p in read_json(data / f"source_{n:02d}.json")]
        at = {pair["image"]: row for row, pair in enumerate(pairs)}
        decisions = pd.read_parquet(self.folder / "growth" / "decisions").set_index("id")
        images = np.zeros((len(pairs), 0), np.float32)
        for number in portions:
            stream = open_features(self.folder / f"features_{number:02d}", ("image",))
            for batch in stream.batches(4096):
                assert batch.image is not None
                if not images.size:
                    images = np.zeros((len(pairs), batch.image.shape[1]), np.float32)
                images[[at[name] for name in batch.ids]] = batch.image
        images /= np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
        last = load_annotations(self.folder / f"grown_{self.config.portions - 1:02d}.json")
        truth = read_json(data / "truth.json")
        found = decisions.loc[[pair["image"] for pair in pairs]]
        return Scored(
            pairs=pairs,
            alignment=found["original_alignment"].to_numpy(),
            images=images,
            kept={at[pair["image"]]: pair for pair in last if pair["image"] in at},
            min_align=read_json(self.folder / "growth" / "growth.json")["min_align"],
            swapped=np.array([pair["image"] in truth for pair in pairs]),
        )

    def train_arm(self, name: str, seed: int, scored: Scored) -> None:
        """Train one arm from random weights; its evaluations go into the results."""
        config, arm = self.config, ARMS[name]
        objectives = "+".join(config.objectives)
        samples = config.full_samples if name == "full" else config.samples
        key = {"arm": name, "seed": seed, "objectives": objectives}
        known = self.results.find(kind="val", **key)
        steps = samples // config.batch_size
        if known and known[-1]["step"] >= steps:
            return
        folder = self.folder / "runs" / f"{name}-{objectives}-{seed}"
        pairs = arm.choose(scored, config.static_size, seed)
        swapped = {
            p["image"] for p, wrong in zip(scored.pairs, scored.swapped, strict=True) if wrong
        }
        self.results.add([{"kind": "arm", **key, **composition(pairs, swapped)}], kind="arm", **key)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "pairs.json", pairs)
        with self._cost(f"train {name} ({objectives})"):
            self._pretrain(
                folder, folder / "pairs.json", self.folder / "data" / "lmdb_source",
                sampler=arm.sampler, samples=samples, seed=seed, objectives=config.objectives,
                validation=self.folder / "data" / "test.json",
                validation_images=self.folder / "data" / "lmdb_test",
            )  # fmt: skip
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        wanted = ("step", "samples_seen", "txt_r1", "img_r1", "r_mean")
        records = [
            {"kind": "val", **key, "evaluation": number, **{name: record[name] for name in wanted}}
            for number, record in enumerate(r for r in log if r["kind"] == "val")
        ]
        self.results.add(records, kind="val", **key)

    def _pretrain(
        self, output: Path, annotations: Path, images: Path, sampler: str, samples: int, seed: int,
        objectives: Sequence[str], validation: Path, validation_images: Path,
    ) -> None:  # fmt: skip
        """One training from random weights by train/pretrain_gain.py, evaluated on its way."""
        config = self.config
        steps = samples // config.batch_size
        self._program(
            "train/pretrain_gain.py", "--config", ROOT / "scripts/configs/claim_training.yaml",
            "--annotations", annotations, "--images", images, "--sampler", sampler,
            "--max_steps", steps, "--batch_size", config.batch_size, "--seed", seed,
            "--objectives", *objectives, "--image_size", config.image_size,
            "--vocabulary", self.folder / "vocab.txt", "--output_dir", output,
            "--val_annotations", validation, "--val_images", validation_images,
            "--validate_every", max(1, config.validate_every // config.batch_size),
            "--device", config.device,
        )  # fmt: skip

    def _vocabulary(self) -> None:
        if not (self.folder / "vocab.txt").exists():
            self._program(
                "scripts/making/train_vocabulary.py",
                "--annotations", self.folder / "data" / "pretraining.json",
                "--output", self.folder / "vocab.txt",
            )  # fmt: skip

    def _embed(self, images: Path, annotations: Path, output: Path, encoder: Path) -> None:
        self._program(
            "embed", "--lmdb", images, "--annotations", annotations,
            "--encoder", encoder, "--output", output, "--device", self.config.device,
        )  # fmt: skip

    def _program(self, program: str, *arguments: object) -> None:
        """Run a command of infogrowth, or one of the project's programs, in this process.

        Raises:
            UserError: it failed; what it said is on the screen.
        """
        words = [str(argument) for argument in arguments]
        logger.info("$ %s %s", program, " ".join(words))
        if program.endswith(".py"):
            names = runpy.run_path(str(ROOT / program))
            config, run = PROGRAMS[program]
            status = run_script(names[config], names[run], words)
        else:
            status = main([program, *words])
        if status:
            raise UserError(f"{program} failed: mend what it says and start again")

    @contextmanager
    def _cost(self, step: str) -> Iterator[None]:
        """Add the CPU seconds that a step takes, workers included, to its record."""
        before = os.times()
        yield
        spent = sum(os.times()[:4]) - sum(before[:4])
        known = self.results.find(kind="cost", step=step)
        spent += known[0]["cpu_s"] if known else 0.0
        record = {"kind": "cost", "step": step, "cpu_s": round(spent, 1)}
        self.results.add([record], kind="cost", step=step)


if __name__ == "__main__":
    sys.exit(run_script(ClaimConfig, claim))
