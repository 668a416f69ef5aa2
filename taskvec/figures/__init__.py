"""The figures: each a function from a written result, never from tensors."""
