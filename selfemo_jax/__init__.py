"""Emotions and persona-true replies in conversation, learned by self-play GRPO (arXiv:2604.18003)."""

__version__ = "0.1.0"
