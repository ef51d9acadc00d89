"""From a job file to running stages: preflight, pipelines, clusters, submission."""
