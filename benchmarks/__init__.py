"""Experiments, leaderboards, statistics, reports and the command line."""
