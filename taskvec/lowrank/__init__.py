"""A task vector as a low-rank adapter: which rank, which factors, and the files that PEFT loads."""
