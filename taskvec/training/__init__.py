"""Fine-tuning: texts, models, methods, the loop and its checkpoints."""
