"""tunix's side of the benchmark: google-tunix with what it brings, and nothing of ours."""
