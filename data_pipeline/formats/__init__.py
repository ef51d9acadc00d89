"""Original on-disk layouts of data sets, one module each."""
