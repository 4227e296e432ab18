"""Pure array kernels of SELF-GRPO: rewards, consensus, advantages, losses, sampling and scores.

No files, no configuration, no logging: arrays first, settings keyword-only, arrays out. Callers jit-compile
them.

Shape legend: P prompts, G rollouts of one prompt, C emotion classes (the last slot gathers unknown labels), S
sequences, T tokens, R rows of logits, V vocabulary, N scored utterances.
"""
