"""Self-play: the best rollouts become new labelled inputs."""
