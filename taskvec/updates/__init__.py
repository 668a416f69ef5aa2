"""The kinds of adapter, one class for each: what a kind does to one parameter."""
