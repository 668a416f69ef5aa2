"""T against delta, element by element and direction by direction, for one analysis script."""
