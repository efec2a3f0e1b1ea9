"""Bundles in the format of BK.Synapse."""

from __future__ import annotations

from support.processes import ROOT

TUTORIAL = ROOT / "tests/bundles/mnist_bks"  # the tutorial's own

DATASET = """
from torch.utils.data import Dataset, default_collate

class UserDataset(Dataset):
    def __init__(self, data_path):
        self.path = data_path
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return index
    def collate(self, batch):
        return default_collate(batch)
"""
