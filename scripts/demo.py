"""The whole path on the bundled sample, through the same commands that a user types.

Pack, embed, recaption, grow, train on the data as it came and on what was grown, evaluate, report;
then score what growth decided against the planted truth. Prints each command before it runs it;
everything goes to output/demo.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from infogrowth.evaluation.truth import auroc, detection, score_captions
from infogrowth.files import atomic_write_json, read_json
from infogrowth.growth.ledger import read_growth
from infogrowth.report.training_runs import read_run

DATA = Path("processed_data")
CAPTIONS = DATA / "sample_captions.json"  # a trusted list: each concept's names and wordings
OUTPUT = Path("output/demo")
TRAINED = {"as it came": OUTPUT / "trained_as_it_came", "grown": OUTPUT / "trained_grown"}

COMMANDS = f"""
python -m infogrowth run scripts/configs/demo.yaml --until select
python train/pretrain_gain.py --config train/configs/compare_sample.yaml --sampler uniform
    --annotations {OUTPUT}/cc3m_train.json --output_dir {TRAINED["as it came"]}
python train/pretrain_gain.py --config train/configs/compare_sample.yaml
    --annotations {OUTPUT}/sample_grown.json --output_dir {TRAINED["grown"]}
python -m infogrowth run scripts/configs/demo.yaml --only report
"""


def main() -> int:
    """Run the commands, score the result, print and save the summary."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes no options but --help
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)  # a demo starts afresh; real runs resume
    held_out = [read_json(DATA / f"sample_retrieval_{part}.json", part) for part in ("val", "test")]
    atomic_write_json(OUTPUT / "held_out.json", [entry for part in held_out for entry in part])
    truth = [{"image": sample, "caption": right} for sample, right in right_captions().items()]
    atomic_write_json(OUTPUT / "truth.json", truth)
    for command in COMMANDS.replace("\n    ", " ").strip().splitlines():
        print(f"\n$ {command}", flush=True)
        # The same interpreter, whatever `python` means in the caller's shell.
        status = subprocess.run([sys.executable, *shlex.split(command)[1:]]).returncode
        if status:
            print(f"the demo stopped: this command ended with status {status}", file=sys.stderr)
            return status
    summary = score() | {"seconds": round(time.monotonic() - started, 1)}
    atomic_write_json(OUTPUT / "summary.json", summary, indent=2)
    print_summary(summary)
    return 0


def score() -> dict[str, Any]:
    """The figures of the summary: growth's decisions held against the planted truth."""
    growth = read_growth(OUTPUT / "growth")
    truth = read_json(DATA / "sample_truth.json", "the truth file")
    names = ["id", "verdict", "reason", "original_alignment", "caption", "original_caption"]
    decisions = growth.decisions(names).to_pandas()
    swapped = decisions.id.map(lambda sample: truth[sample]["swapped"]).to_numpy(bool)
    captions = score_captions(decisions, right_captions())
    precision, recall = detection(decisions.verdict != "kept", swapped)
    annotations = growth.annotations()
    copied = [truth[entry["image"]]["copy_of"] is not None for entry in annotations]
    gains = np.array([entry["gains"] for entry in annotations]).mean(axis=1)
    in_lowest_tenth = gains.argsort(kind="stable").argsort() < len(gains) // 10
    recalls = {name: read_run(folder).recall_table["r_mean"] for name, folder in TRAINED.items()}
    estimate = growth.estimate()
    assert estimate is not None
    return {
        "pairs": len(decisions),
        "kept": len(annotations),
        "recaptioned": captions.recaptioned,
        "dropped": int((decisions.verdict == "dropped").sum()),
        "noise_precision": round(precision, 4),
        "noise_recall": round(recall, 4),
        "alignment_auroc": round(auroc(decisions.original_alignment.to_numpy(), ~swapped), 4),
        "copies": sum(copied),
        "copies_in_lowest_gain_decile": round(detection(in_lowest_tenth, copied)[1], 4),
        "min_align": round(growth.settings["min_align"], 4),
        "wrong_before": round(captions.wrong_before, 4),
        "wrong_after": round(captions.wrong_after, 4),
        "wrong_before_estimated": round(estimate.noise, 4),
        "right_kept": round(captions.right_kept, 4),
        "recaptions_right": captions.recaptions_right,
        "recall_as_it_came": round(recalls["as it came"], 2),
        "recall_grown": round(recalls["grown"], 2),
    }


def right_captions() -> dict[str, list[str]]:
    """Every right caption of each sample: its own, and the wordings of what it shows."""
    truth = read_json(DATA / "sample_truth.json", "the truth file")
    entries = read_json(CAPTIONS, "the trusted captions")
    wordings = {entry["image"]: entry["caption"] for entry in entries}
    return {
        sample: [known["true_caption"], *wordings[known["concept"]]]
        for sample, known in truth.items()
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The figures in sentences, and where the files are."""
    s = summary
    made = s["recaptioned"]
    print(f"""
{s["pairs"]} pairs in: {s["kept"]} kept, of them {made} recaptioned; {s["dropped"]} dropped
wrong captions: {s["wrong_before"]:.1%} before (estimated without the truth: \
{s["wrong_before_estimated"]:.1%}) → {s["wrong_after"]:.1%} after
right pairs kept: {s["right_kept"]:.1%}; recaptions right: {s["recaptions_right"]} of {made} \
(alignment separates right from swapped with AUROC {s["alignment_auroc"]:.3f})
planted copies in the lowest decile of gain: {s["copies_in_lowest_gain_decile"]:.0%} of \
{s["copies"]} (a random choice: 10%)
mean recall after equally many samples seen: {s["recall_as_it_came"]:.1f} trained on the data as \
it came, {s["recall_grown"]:.1f} on what was grown
{s["seconds"]:.0f} seconds; files written to {OUTPUT}:""")
    for path in sorted(OUTPUT.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")


if __name__ == "__main__":
    sys.exit(main())
