"""Reinforcement learning of language models with DAPO on Megatron-Core.

Importing the package imports nothing heavy: reward workers start in milliseconds because of it.
"""

__version__ = "0.1.0"
