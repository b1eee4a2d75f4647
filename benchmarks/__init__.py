"""Experiments: who is better, by how much, at what cost; statistics, reports and the command line."""
