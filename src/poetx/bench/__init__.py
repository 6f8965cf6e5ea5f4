"""``poetx bench``: speed against ``nn.Linear``, plain PyTorch and AdamW in one run; results are checked first."""
