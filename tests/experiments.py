"""An experiment file of ImgiNav for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoenc.yamlfile import parse_yaml

F3 = """
experiment: {name: phase1_4_AE_F3, phase: phase1_4_loss_tuning, save_path: /scratch/phase1_4_AE_F3}
dataset:
  manifest: layouts.csv
  outputs: {rgb: layout_path, segmentation: layout_path, label: type}
  filters: {is_empty: [false]}
  return_path: false
autoencoder:
  encoder: {in_channels: 3, latent_channels: 16, base_channels: 32, downsampling_steps: 4, activation: SiLU,
            norm_groups: 8, variational: false}
  decoder:
    latent_channels: 16
    base_channels: 32
    upsampling_steps: 4
    activation: SiLU
    norm_groups: 8
    heads:
      - {type: RGBHead, name: rgb, out_channels: 3, final_activation: tanh}
      - {type: SegmentationHead, name: segmentation, num_classes: 11}
      - {type: ClassificationHead, name: classification, num_classes: 2}
training:
  seed: 42
  train_split: 0.8
  split_seed: 7
  batch_size: 16
  num_workers: 8
  shuffle: true
  epochs: 10
  learning_rate: 1e-4
  optimizer: AdamW
  weight_decay: 0.01
  save_interval: 5
  sample_interval: 5
  early_stopping_patience: 3
  early_stopping_min_delta: 0.0001
  early_stopping_restore_best: true
  loss:
    type: CompositeLoss
    losses:
      - {type: MSELoss, key: rgb, target: rgb, weight: 1.0}
      - {type: CrossEntropyLoss, key: segmentation, target: segmentation, weight: 0.05}
      - {type: CrossEntropyLoss, key: classification, target: label, weight: 0.01}
"""
FILE = Path("/data/phase1_4_AE_F3.yaml")


def f3(**changes: Any) -> dict[str, Any]:
    """The example with other values; dots in keys are written ``__``; ``...`` takes a key out."""
    content = parse_yaml(F3, "F3")
    for key, value in changes.items():
        *place, last = key.split("__")
        section = content
        for part in place:
            section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
        if value is ...:
            del section[last]
        else:
            section[int(last) if isinstance(section, list) else last] = value
    return content
