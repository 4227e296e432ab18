"""What a run needs of its devices before it has any: compiled where possible, by formula elsewhere."""
