"""STAFF: coreset selection for task-specific fine-tuning of language models."""
