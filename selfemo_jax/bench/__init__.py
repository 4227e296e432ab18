"""The throughput benchmark: the same work in JAX and in PyTorch, each in a process of its own."""
