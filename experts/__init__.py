"""What is controlled: data sets, Mixture-of-Experts models, their training, and the bundles of environments."""
