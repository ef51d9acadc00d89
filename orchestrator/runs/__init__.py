"""Run directories, checkpoints, lineage, and their view in MLflow: all that outlives a process."""
