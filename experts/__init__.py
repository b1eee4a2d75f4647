"""Data sets, Mixture-of-Experts models, their training and compression, and bundles for environments."""
