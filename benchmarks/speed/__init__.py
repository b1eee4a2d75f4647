"""How fast: experiments whose figures are measured, not computed."""
