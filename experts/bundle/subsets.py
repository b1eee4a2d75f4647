"""Which subsets of experts a bundle tabulates, as ascending codes: bit e of a code stands for expert e."""

import numpy as np

ALL_UP_TO = 10  # experts of which all 2^E subsets are tabulated: 128 bytes an input at 10
MAX_EXPERTS = 32  # experts of which single ones and pairs are tabulated: 67 bytes an input at 32


def complete(experts: int) -> bool:
    """Whether all subsets of so many experts are tabulated."""
    return experts <= ALL_UP_TO


def tabulated(experts: int) -> np.ndarray:
    """Codes `[S]` of the tabulated subsets: all, or the empty one, single experts and pairs."""
    if complete(experts):
        return np.arange(2**experts)
    return np.unique(np.append(singles(experts)[:, None] | singles(experts), 0))


def singles(experts: int) -> np.ndarray:
    """Codes `[E]` of the single experts."""
    return 1 << np.arange(experts)


def members(codes: np.ndarray, experts: int) -> np.ndarray:
    """Whether each expert is in the subsets of codes `[...]`, 0 or 1 `[..., E]`."""
    found: np.ndarray = codes[..., None] >> np.arange(experts) & 1
    return found
