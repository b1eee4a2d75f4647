"""Experiments: `moe-benchmark run NAME` runs and reports the module NAME."""
