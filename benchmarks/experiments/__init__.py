"""Questions: each module here is an experiment that `moe-benchmark run NAME` runs and reports."""
