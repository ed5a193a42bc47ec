"""What crosses a stage: frozen dataclasses with their validation, JSON, the variants and the cards of published checkpoints.

Standard library only.
"""
