"""Labelled images → accuracy; two models side by side; the pictures of both."""
