"""Cost of running a model: meters, profiles measured on this machine, and the cost model of the reward."""
