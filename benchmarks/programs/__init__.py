"""Programs that run in a separate process or Python environment, and what asks them."""
