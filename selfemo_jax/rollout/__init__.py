"""Rollouts: token ids in, sampled completions out, whichever engine serves them."""
