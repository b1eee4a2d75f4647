"""Makes the runs of a matrix, each once, through any kill, and reports them."""
