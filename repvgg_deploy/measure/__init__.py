"""How fast a model is, how fast it could be, and which one to take: times, rooflines, benchmark files, advice. Runs no model itself."""
