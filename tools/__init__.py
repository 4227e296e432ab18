"""Thin commands; installed as selfemo_jax.tools for the console scripts."""
