"""Experts that do not fit into memory: a budget of bytes, eviction, and replays of recorded routing."""

from experts.offload.demand import Probable
from experts.offload.model import OffloadedModel
from experts.offload.replay import Hits, replay
from experts.offload.store import ExpertFile, OffloadError
from experts.offload.traces import Trace

__all__ = ["ExpertFile", "Hits", "OffloadError", "OffloadedModel", "Probable", "Trace", "replay"]
