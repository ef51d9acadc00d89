"""Job files to runs: configuration, stages, pipelines, tracking, the command line."""
