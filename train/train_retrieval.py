"""Fine-tune BLIP for image–text retrieval, or evaluate a checkpoint, and print the recall table.

    python train/train_retrieval.py --config train/configs/retrieval_coco.yaml --pretrained MODEL
    python train/train_retrieval.py --config … --pretrained MODEL --evaluate

MODEL is a BLIP folder or checkpoint of ours, an official .pth, or a Hugging Face folder or
name. Under torch.distributed.run the same file uses all GPUs of all nodes.
"""

import sys

from infogrowth.cli import run_script
from infogrowth.training.retrieval import fine_tune_or_evaluate
from infogrowth.training.settings import RetrievalConfig

if __name__ == "__main__":
    sys.exit(run_script(RetrievalConfig, fine_tune_or_evaluate))
