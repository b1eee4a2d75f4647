"""Decision makers that do not learn by reinforcement: what a learner must beat, and the bounds it cannot."""
