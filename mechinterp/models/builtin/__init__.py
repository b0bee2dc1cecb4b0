"""The built-in model: its weights and tokenizer, and everything they were made with. See ``MODEL_CARD.md``."""
