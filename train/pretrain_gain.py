"""Pretrain BLIP on a grown dataset, drawing the samples of every epoch by their gains.

    python train/pretrain_gain.py --config train/configs/pretrain_cc3m_gain.yaml
    python3 -m torch.distributed.run --nproc_per_node=8 train/pretrain_gain.py --config …

One process, several Gloo processes, several GPUs and several nodes run this same file. It goes on
from the last checkpoint of --output_dir; see train/README.md for every word.
"""

import sys

from infogrowth.cli import run_script
from infogrowth.training.pretrain import pretrain
from infogrowth.training.settings import PretrainConfig

if __name__ == "__main__":
    sys.exit(run_script(PretrainConfig, pretrain))
