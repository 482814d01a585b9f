"""Does a grown dataset train BLIP to the same recall with fewer samples seen? The experiment.

    python scripts/claim.py --config scripts/configs/claim.yaml [--seeds 0 1 2] [--arms full …]

Data, scoring encoder, growth in portions, arms, trainings, figures: each step is kept when it is
done, a stopped one goes on, and what was measured is appended to the results file, from which the
figures can be drawn at any time (--figures_only). docs/claim.md says what came out.

Needs npm and `pip install resvg-py` (to draw the icons).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import pandas as pd
from claim_parts.arms import ARMS, Scored, quality, right_given_alignment
from claim_parts.figures import draw_figures
from claim_parts.parts import draw_parts, pack, swap_source
from claim_parts.programs import ROOT, run_program, run_programs

from infogrowth.annotations import load_annotations
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json, read_json
from infogrowth.growth.ledger import read_growth
from infogrowth.training.options import PrecisionName

TRAINING = "train/pretrain_gain.py"


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
    encoder_epochs: int = option(11, "epochs of the scoring encoder on its pretraining part")
    min_align: str = option("auto:0.9", "threshold of the growth")
    k: int = option(4, "neighbors of the gain")
    static_size: int = option(16_000, "pairs of every static subset")
    batch_size: int = option(128, "pairs per step, all arms")
    init_lr: float = option(3e-4, "learning rate of the arms after warm-up; it does not decay")
    full_samples: int = option(500_000, "samples that the full arm sees")
    samples: int = option(170_000, "samples that the other arms see")
    validate_every: int = option(10_000, "samples between two evaluations")
    device: str = option("auto", "auto, cpu or cuda")
    precision: PrecisionName = option("bf16", "of the trainings")
    jobs: int = option(1, "arms that are trained at once; those on a CPU share its threads")
    travel: str | None = option(
        None, "do all but train: a folder to train elsewhere, with --output FOLDER"
    )
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


@dataclass(frozen=True)
class Run:
    """One training: an arm and the seed of its weights, its order and its random choices."""

    arm: str
    seed: int


class Experiment:
    """The steps in their order; each is a no-op when its result is there."""

    def __init__(self, config: ClaimConfig, results: Results) -> None:
        self.config, self.results = config, results
        self.folder = Path(config.output)
        self.drawings = self.folder / "drawings"
        self.source = self.folder / f"swapped_{config.swapped:g}"  # captions and their features
        self.grown = self.source / f"{config.min_align}_k{config.k}"  # what is kept, and trained

    def run(self) -> None:
        """Everything that is missing."""
        self.data()
        self.grow()
        runs = [Run(name, seed) for seed in self.config.seeds for name in self.config.arms]
        self.choose(runs)
        if self.config.travel:
            pack(self.folder, self.drawings, self.source, self.grown, Path(self.config.travel))
            return
        self.train(sorted(runs, key=lambda run: run.arm != "full"))  # the longest first

    def data(self) -> None:
        """Draw the icons, plant the noise."""
        config = self.config
        sets = {
            "source": config.source_sets,
            "pretraining": config.pretraining_sets,
            "seeds": config.seed_sets,
            "test": config.test_sets,
        }
        before = os.times()
        counts = draw_parts(
            self.drawings, Path(config.packages),
            (config.package_version, config.package_sha512), sets,
            config.pairs, config.test_names, config.image_size, seed=0,
        )  # fmt: skip
        self._cost({"step": "draw"}, sum(os.times()[:4]) - sum(before[:4]))
        self.results.add([{"kind": "parts", **counts}], kind="parts")
        noise = swap_source(self.drawings, self.source, config.swapped, config.portions, seed=0)
        key = {"kind": "noise", "swapped": config.swapped}
        self.results.add([{**key, **noise}], **key)

    def encoder(self) -> Path:
        """Pretrain the encoder that scores, on other artists' icons."""
        data, output = self.drawings, self.folder / "encoder"
        if not (output / "done.json").exists():
            if not (self.folder / "vocab.txt").exists():
                run_program(
                    "scripts/making/train_vocabulary.py",
                    "--annotations", data / "pretraining.json",
                    "--output", self.folder / "vocab.txt",
                )  # fmt: skip
            arguments = self._training(
                output, data / "pretraining.json", data / "lmdb_pretraining",
                data / "seeds_val.json", data / "lmdb_seeds",
                "--seed", 1234, "--max_epoch", self.config.encoder_epochs,
                "--lr_decay", "cosine", "--min_lr", 1e-5,
            )  # fmt: skip
            self._cost({"step": "encoder"}, run_program(TRAINING, *arguments))
            atomic_write_json(output / "done.json", True)
        return output / "model"

    def grow(self) -> None:
        """Embed and grow, portion by portion, each onto the last."""
        config, drawings = self.config, self.drawings
        grown = [self._grown(number) for number in range(config.portions)]
        if all(path.exists() for path in grown):
            return
        encoder, seeds = self.encoder(), self.folder / "features_seeds"
        self._embed(drawings / "lmdb_seeds", drawings / "seeds.json", seeds, encoder)
        for number, output in enumerate(grown):
            features = self.source / f"features_{number:02d}"
            portion = self.source / f"source_{number:02d}.json"
            self._embed(drawings / "lmdb_source", portion, features, encoder)
            if not output.exists():
                spent = run_program(
                    "grow", "--features", features, "--growth", self.grown / "growth",
                    "--seed-features", seeds, "--k", config.k,
                    "--min-align", config.min_align, "--device", config.device,
                    "--output", output,
                )  # fmt: skip
                self._cost(self._key("cost", step="grow"), spent)
                self._note_portion(number, portion, output)

    def _note_portion(self, number: int, portion: Path, grown: Path) -> None:
        """What the growth kept of a portion, against the planted truth."""
        truth = read_json(self.source / "truth.json")
        arrived = {pair["image"] for pair in read_json(portion)}
        kept = [pair["image"] for pair in load_annotations(grown) if pair["image"] in arrived]
        estimate = read_growth(self.grown / "growth").estimate()
        record = {
            **self._key("portion"),
            "portion": number,
            "pairs": len(arrived),
            "kept": len(kept),
            "wrong_kept": sum(image in truth for image in kept) / max(1, len(kept)),
            "noise_true": sum(image in truth for image in arrived) / len(arrived),
            "noise_so_far": estimate and estimate.noise,
        }
        self.results.add([record], **self._key("portion"), portion=number)

    def choose(self, runs: Sequence[Run]) -> None:
        """Write the pairs of every run; what they are goes into the results."""
        missing = [run for run in runs if not self._pairs(run).exists()]
        if not missing:
            return
        scored = self.scored()
        key = self._key("scores")
        self.results.add([{**key, **quality(scored)}], **key)
        for run in missing:
            chosen = ARMS[run.arm].choose(scored, self.config.static_size, run.seed)
            key = self._run_key("arm", run)
            self.results.add([{**key, **scored.composition(chosen)}], **key)
            entries = [scored.entry(row, ARMS[run.arm]) for row in chosen]
            atomic_write_json(self._pairs(run), entries)

    def scored(self) -> Scored:
        """The source with its scores, in the order of its arrival."""
        portions = range(self.config.portions)
        pairs = [p for n in portions for p in read_json(self.source / f"source_{n:02d}.json")]
        at = {pair["image"]: row for row, pair in enumerate(pairs)}
        decisions = pd.read_parquet(self.grown / "growth" / "decisions").set_index("id")
        images = np.zeros((len(pairs), 0), np.float32)
        for number in portions:
            stream = open_features(self.source / f"features_{number:02d}", ("image",))
            for batch in stream.batches(4096):
                assert batch.image is not None
                if not images.size:
                    images = np.zeros((len(pairs), batch.image.shape[1]), np.float32)
                images[[at[name] for name in batch.ids]] = batch.image
        images /= np.maximum(np.linalg.norm(images, axis=1, keepdims=True), 1e-12)
        last = load_annotations(self._grown(self.config.portions - 1))
        truth = read_json(self.source / "truth.json")
        found = decisions.loc[[pair["image"] for pair in pairs]]
        alignment = found["original_alignment"].to_numpy()
        estimate = read_growth(self.grown / "growth").estimate()
        if estimate is None:
            raise UserError("too few seeds to estimate the noise: name more seed_sets")
        return Scored(
            pairs=pairs,
            alignment=alignment,
            right=right_given_alignment(alignment, estimate),
            images=images,
            gains={at[pair["image"]]: pair["gains"] for pair in last if pair["image"] in at},
            min_align=read_json(self.grown / "growth" / "growth.json")["min_align"],
            swapped=np.array([pair["image"] in truth for pair in pairs]),
        )

    def train(self, runs: Sequence[Run]) -> None:
        """Train each run from random weights; the evaluations on its way go into the results."""
        for run in runs:
            self._note_evaluations(run)
        missing = [run for run in runs if not self._is_trained(run)]
        lines = [self._arm_training(run) for run in missing]

        def done(line: int, cpu_seconds: float) -> None:
            run = missing[line]
            self._cost({**self._evaluations(run), "kind": "cost", "step": "train"}, cpu_seconds)
            self._note_evaluations(run)

        run_programs(TRAINING, lines, self.config.jobs, done)

    def _note_evaluations(self, run: Run) -> None:
        log = self._output(run) / "log.jsonl"
        if not log.exists():
            return
        key = self._evaluations(run)
        wanted = ("step", "samples_seen", "txt_r1", "img_r1", "r_mean")
        made = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        records = [
            {
                **key,
                "device": self.config.device,
                "evaluation": number,
                **{n: record[n] for n in wanted},
            }
            for number, record in enumerate(r for r in made if r["kind"] == "val")
        ]
        if len(records) > len(self.results.find(**key)):
            self.results.add(records, **key)

    def _is_trained(self, run: Run) -> bool:
        known = self.results.find(**self._evaluations(run))
        return bool(known) and known[-1]["step"] >= self._steps(run)

    def _key(self, kind: str, **more: Any) -> dict[str, Any]:
        """What a record is found by: results of several settings stand in one file."""
        config = self.config
        setting = {"swapped": config.swapped, "min_align": config.min_align, "k": config.k}
        return {"kind": kind, **setting, **more}

    def _run_key(self, kind: str, run: Run) -> dict[str, Any]:
        size = {"static_size": self.config.static_size} if ARMS[run.arm].static else {}
        return self._key(kind, arm=run.arm, **size, seed=run.seed)

    def _evaluations(self, run: Run) -> dict[str, Any]:
        objectives, rate = "+".join(self.config.objectives), self.config.init_lr
        return {**self._run_key("val", run), "objectives": objectives, "init_lr": rate}

    def _steps(self, run: Run) -> int:
        """So many steps that the last one is evaluated."""
        samples = self.config.full_samples if run.arm == "full" else self.config.samples
        every = self._steps_between_evaluations()
        return max(1, samples // self.config.batch_size // every) * every

    def _steps_between_evaluations(self) -> int:
        return max(1, self.config.validate_every // self.config.batch_size)

    def _grown(self, portion: int) -> Path:
        return self.grown / f"grown_{portion:02d}.json"

    def _name(self, run: Run) -> str:
        return f"{run.arm}_{self.config.static_size}" if ARMS[run.arm].static else run.arm

    def _pairs(self, run: Run) -> Path:
        return self.grown / "arms" / f"{self._name(run)}-{run.seed}.json"

    def _output(self, run: Run) -> Path:
        objectives, rate = "+".join(self.config.objectives), self.config.init_lr
        return self.grown / "runs" / f"{self._name(run)}-{objectives}-{rate:g}-{run.seed}"

    def _arm_training(self, run: Run) -> list[object]:
        drawings = self.drawings
        return self._training(
            self._output(run), self._pairs(run), drawings / "lmdb_source",
            drawings / "test.json", drawings / "lmdb_test",
            "--seed", run.seed, "--max_steps", self._steps(run),
            "--sampler", ARMS[run.arm].sampler, "--objectives", *self.config.objectives,
            "--init_lr", self.config.init_lr, "--min_lr", self.config.init_lr,
        )  # fmt: skip

    def _training(
        self, output: Path, annotations: Path, images: Path, validation: Path,
        validation_images: Path, *more: object,
    ) -> list[object]:  # fmt: skip
        """What train/pretrain_gain.py is given: a training from random weights."""
        config = self.config
        return [
            "--config", ROOT / "scripts/configs/claim_training.yaml",
            "--annotations", annotations, "--images", images, "--output_dir", output,
            "--val_annotations", validation, "--val_images", validation_images,
            "--validate_every", self._steps_between_evaluations(),
            "--batch_size", config.batch_size, "--image_size", config.image_size,
            "--vocabulary", self.folder / "vocab.txt",
            "--device", config.device, "--precision", config.precision, *more,
        ]  # fmt: skip

    def _embed(self, images: Path, annotations: Path, output: Path, encoder: Path) -> None:
        spent = run_program(
            "embed", "--lmdb", images, "--annotations", annotations,
            "--encoder", encoder, "--output", output, "--device", self.config.device,
        )  # fmt: skip
        self._cost({"step": "embed", "swapped": self.config.swapped}, spent)

    def _cost(self, step: dict[str, Any], cpu_seconds: float) -> None:
        """Add CPU seconds to a step's record."""
        key = {**step, "kind": "cost", "device": self.config.device}
        known = self.results.find(**key)
        total = round(cpu_seconds + (known[0]["cpu_s"] if known else 0.0), 1)
        self.results.add([{**key, "cpu_s": total}], **key)


if __name__ == "__main__":
    sys.exit(run_script(ClaimConfig, claim))
