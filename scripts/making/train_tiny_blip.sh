#!/usr/bin/env bash
# Train the bundled tiny BLIP again, from nothing: other artists' drawings than the sample's, their
# LMDB, a vocabulary, the project's own pretraining, and the figure on the sample.
#
#   PYTHON=.venv/bin/python scripts/making/train_tiny_blip.sh [FOLDER]     (default: output/tiny_blip)
#
# Needs npm and `pip install resvg-py`. About half an hour on 2 CPU cores. The model ends in
# FOLDER/run/model; copy it to infogrowth/assets/tiny_blip to bundle it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
folder=${1:-output/tiny_blip}

"$python" scripts/making/make_sample.py --training_set "$folder"
"$python" scripts/cc3m_lmdb_writer.py --image_root "$folder/shards" --output_root "$folder"
"$python" scripts/making/train_vocabulary.py --annotations "$folder/train.json" --output "$folder/vocab.txt"
"$python" train/pretrain_gain.py --config train/configs/pretrain_tiny.yaml \
    --annotations "$folder/train.json" --images "$folder/lmdb_train" \
    --vocabulary "$folder/vocab.txt" --output_dir "$folder/run"
"$python" scripts/making/score_tiny_blip.py --encoder "$folder/run/model" --captioner "$folder/run/model"
