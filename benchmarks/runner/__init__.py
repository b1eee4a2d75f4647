"""Runner: executes each run of a matrix once, survives kills, and reports the results."""
