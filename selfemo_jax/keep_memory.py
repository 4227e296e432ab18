"""Imported by the commands before anything else: the allocator must be set before NumPy starts threads."""

from selfemo_jax.allocator import keep_freed_memory

KEPT = keep_freed_memory()
