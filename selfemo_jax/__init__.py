"""Emotion recognition in conversation and persona-true replies, learned by self-play, in JAX."""
