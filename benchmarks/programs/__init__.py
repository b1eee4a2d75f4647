"""Programs that run in a process, or a Python, of their own."""
