"""An Engine behind HTTP: an example to start from. See README.md."""
