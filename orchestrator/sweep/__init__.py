"""Sweeps: many trials of one stage, each an ordinary run, and the log of what was decided."""
