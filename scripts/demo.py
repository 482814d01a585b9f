"""The whole path on the bundled sample, through the same commands that a user types.

Pack, embed, recaption, grow, train with gains, evaluate, report; then score what growth decided
against the planted truth. Prints each command before it runs it; everything goes to output/demo.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from infogrowth.evaluation.truth import auroc, detection, share_in_lowest_decile
from infogrowth.files import atomic_write_json, read_json
from infogrowth.growth.ledger import read_growth

SAMPLE = Path("processed_data/sample")
TRUTH = Path("processed_data/sample_truth.json")
SEEDS = Path("processed_data/sample_seeds.json")
OUTPUT = Path("output/demo")

COMMANDS = f"""
python scripts/cc3m_lmdb_writer.py --image_root {SAMPLE} --output_root {OUTPUT}
python -m infogrowth embed --lmdb {OUTPUT}/lmdb_train --annotations {OUTPUT}/cc3m_train.json
    --encoder tiny --output {OUTPUT}/features
python -m infogrowth recaption --features {OUTPUT}/features --seed-ids {SEEDS} --min-align auto
    --captioner tiny --encoder tiny --output {OUTPUT}/recaptions
python -m infogrowth grow --features {OUTPUT}/features --seed-ids {SEEDS} --min-align auto
    --recaptions {OUTPUT}/recaptions --growth {OUTPUT}/growth --output {OUTPUT}/sample_grown.json
python -m infogrowth select --annotations {OUTPUT}/sample_grown.json --top 1000
    --output {OUTPUT}/sample_top1000.json
python train/pretrain_gain.py --config train/configs/pretrain_sample.yaml --max_epoch 2
    --annotations {OUTPUT}/sample_grown.json --output_dir {OUTPUT}/pretrain
python train/train_retrieval.py --config train/configs/retrieval_sample.yaml
    --output_dir {OUTPUT}/retrieval --pretrained {OUTPUT}/pretrain/model --evaluate
python -m infogrowth report {OUTPUT}/growth --training {OUTPUT}/pretrain
    -o {OUTPUT}/report.html
"""


def main() -> int:
    """Run the commands, score the result, print and save the summary."""
    started = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)  # a demo starts afresh; real runs resume
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


def score() -> dict[str, float]:
    """The figures of the summary: growth's decisions held against the planted truth."""
    growth = read_growth(OUTPUT / "growth")
    truth = read_json(TRUTH, "the truth file")
    decisions = growth.decisions(["id", "verdict", "original_alignment"]).to_pandas()
    swapped = decisions.id.map(lambda sample: truth[sample]["swapped"]).to_numpy(bool)
    noisy = detection(decisions.verdict != "kept", swapped)
    annotations = growth.annotations()
    copied = [truth[entry["image"]]["copy_of"] is not None for entry in annotations]
    gains = np.array([entry["gains"] for entry in annotations]).mean(axis=1)
    counts = decisions.verdict.value_counts()
    return {
        "pairs": len(decisions),
        "kept": len(annotations),
        "recaptioned": int(counts.get("recaptioned", 0)),
        "dropped": int(counts.get("dropped", 0)),
        "noise_precision": round(noisy.precision, 4),
        "noise_recall": round(noisy.recall, 4),
        "alignment_auroc": round(auroc(decisions.original_alignment.to_numpy(), ~swapped), 4),
        "copies": sum(copied),
        "copies_in_lowest_gain_decile": round(share_in_lowest_decile(gains, copied), 4),
        "min_align": round(growth.settings["min_align"], 4),
    }


def print_summary(summary: dict[str, float]) -> None:
    """The figures in sentences, and where the files are."""
    s = summary
    print(f"""
{s["pairs"]} pairs in: {s["kept"]} kept, of them {s["recaptioned"]} recaptioned; \
{s["dropped"]} dropped
swapped captions found: precision {s["noise_precision"]:.2f}, recall {s["noise_recall"]:.2f} \
(alignment tells right from swapped with AUROC {s["alignment_auroc"]:.3f})
planted copies in the lowest decile of gain: {s["copies_in_lowest_gain_decile"]:.0%} of \
{s["copies"]} (a random choice: 10%)
{s["seconds"]:.0f} seconds; files written to {OUTPUT}:""")
    for path in sorted(OUTPUT.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")


if __name__ == "__main__":
    sys.exit(main())
