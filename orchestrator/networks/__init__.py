"""Checkpoints as networks: open, predict, export, import, count."""
