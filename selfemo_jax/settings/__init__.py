"""The sections of the configuration, by theme; `selfemo_jax.config` puts them together."""
