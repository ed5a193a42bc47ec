"""The Engine and its backends. Needs NumPy; a backend is imported when it is opened."""
