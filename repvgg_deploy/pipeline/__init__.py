"""The lines of the product: each module calls the stages in order and holds no logic of its own."""
