"""The PyTorch side of the benchmark: torch, transformers, numpy and the standard library, nothing of ours."""
