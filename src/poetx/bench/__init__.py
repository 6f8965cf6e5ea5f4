"""``poetx bench``: speed against ``nn.Linear``, plain PyTorch and AdamW, in one run, right before it is timed."""
