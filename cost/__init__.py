"""What running a model costs: meters, profiles measured on this machine, and the cost model of the reward."""
