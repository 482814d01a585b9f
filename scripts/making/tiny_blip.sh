#!/usr/bin/env bash
# Make the bundled tiny BLIP from nothing: other artists' drawings than the sample's, their LMDB, a
# vocabulary, the four stages of its training, the weights in float16, and the figures.
#
#   PYTHON=.venv/bin/python scripts/making/tiny_blip.sh [FOLDER]     (default: output/tiny_blip)
#
# Needs npm and `pip install resvg-py fonttools`. About an hour on one core of a CPU with AVX-512 BF16.
# Started again after an interruption it goes on where it was. The model ends in FOLDER/tiny_blip; copy
# its files to infogrowth/assets/tiny_blip to bundle it.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
folder=${1:-output/tiny_blip}
making=scripts/making
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -f "$folder/vocab.txt" ]; then
  "$python" $making/make_sample.py --training_set "$folder"
  "$python" scripts/cc3m_lmdb_writer.py --image_root "$folder/shards" --output_root "$folder"
  "$python" $making/train_vocabulary.py --annotations "$folder/train.json" --output "$folder/vocab.txt"
fi

# stage NAME OPTIONS…: one run of the pretraining, the next one starting from its last checkpoint.
stage() {
  local name=$1
  shift
  echo "== $name: $(date -u +%H:%M:%S)"
  "$python" train/pretrain_gain.py --config train/configs/pretrain_tiny.yaml \
    --annotations "$folder/train.json" --images "$folder/lmdb_train" \
    --vocabulary "$folder/vocab.txt" --output_dir "$folder/$name" "$@"
}
last() { echo "$folder/$1/checkpoints/$(cat "$folder/$1/checkpoints/latest")"; }

stage contrastive
stage longer --pretrained "$(last contrastive)" --max_epoch 30 --init_lr 1e-3 --seed 1
# Late, at a low rate, on images as they are: captions and matching learn to read good image tokens.
stage all --pretrained "$(last longer)" --objectives ita itm lm --max_epoch 5 \
  --init_lr 5e-4 --seed 2 --augment none --min_crop 0.75
stage last --pretrained "$(last all)" --objectives ita itm lm --max_epoch 6 --init_lr 5e-4 --seed 3

"$python" $making/half_weights.py --models "$folder/all/model" "$folder/last/model" \
  --output "$folder/tiny_blip"
"$python" $making/score_tiny_blip.py --encoder "$folder/tiny_blip" --captioner "$folder/tiny_blip" \
  --concepts "$folder/train.json" --output "$folder/score.json"
echo "== done: $(date -u +%H:%M:%S)"
