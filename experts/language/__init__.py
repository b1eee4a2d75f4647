"""A Mixture-of-Experts language model: its text, its training, its use."""
