"""From files of dialogues to training inputs, prompts and batches. No JAX in here."""
