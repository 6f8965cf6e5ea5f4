"""Layers that stand in place of nn.Linear."""
