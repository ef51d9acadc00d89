"""The network of the paper, its losses and metrics; torch and nothing above it."""
