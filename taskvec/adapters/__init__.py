"""The files of a PEFT adapter: read, bound to a base's parameters, and checked."""
