"""What one does with task vectors: put them together, prune them, apply them, compare them."""
