"""What a worker does with a trial, until its first epoch is trained; then it waits for a line.

    python trial.py '{"data.image_size": 512, …}'
"""

from __future__ import annotations

import json
import sys

import torch

from autoenc.config import make_config
from autoenc.data import prepare
from autoenc.train import train

torch.set_num_threads(1)
config = make_config(json.loads(sys.argv[1]), "the trial")
steps = train(config, prepare(config.data))
next(steps)
print("trained", flush=True)
sys.stdin.readline()
