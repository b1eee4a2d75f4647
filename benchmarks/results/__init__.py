"""Statistics, Pareto fronts, scores and tables of results."""
