"""The parts of a report: what is read from run folders, what is computed from it, and the page it becomes."""
