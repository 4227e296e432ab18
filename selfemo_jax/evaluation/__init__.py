"""What `evaluate` adds to the scores: samples and votes, calibration, yardsticks, endpoints, published
rows."""
