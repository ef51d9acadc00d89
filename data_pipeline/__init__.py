"""From raw data sets to batches: preparation, manifest, plan, loading."""
