"""A Mixture-of-Experts language model: its text, its training, its use."""

from experts.language.huggingface import load_huggingface, save_huggingface
from experts.language.model import LanguageModel, find, load
from experts.language.transformer import ModelSettings, Transformer

__all__ = ["LanguageModel", "ModelSettings", "Transformer", "find", "load", "load_huggingface", "save_huggingface"]
