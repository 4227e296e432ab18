"""Studies of runs: what the paper claims, measured with its errors."""
