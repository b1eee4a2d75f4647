"""Mini-batches drawn from a split, as a stream of inputs would bring them."""

import numpy as np

STREAMS = ("topical", "iid")
TOPIC_CONCENTRATION = 0.15  # of the Dirichlet over classes: most of a topical batch is of one to three classes


def deal(labels: np.ndarray, batch_size: int, stream: str, count: int, seed: int = 0) -> np.ndarray:
    """`count` mini-batches `[count, batch_size]` of indices into `labels`, drawn with replacement.

    "iid": uniformly; "topical": from classes whose shares are drawn for each batch from a Dirichlet distribution. The
    deck belongs to the environment, not to an episode's seed: it is the same for everyone, and another for each split.
    """
    generator = np.random.default_rng(seed)
    if stream == "iid":
        return generator.integers(len(labels), size=(count, batch_size))
    classes, sizes = np.unique(labels, return_counts=True)
    shares = generator.dirichlet(np.full(len(classes), TOPIC_CONCENTRATION), size=count).cumsum(axis=1)
    uniform = generator.random((count, batch_size))
    drawn = np.zeros((count, batch_size), dtype=np.int64)
    for boundary in shares.T[:-1]:
        drawn += uniform > boundary[:, None]
    position = (generator.random((count, batch_size)) * sizes[drawn]).astype(np.int64)
    return np.argsort(labels, kind="stable")[(sizes.cumsum() - sizes)[drawn] + position]
