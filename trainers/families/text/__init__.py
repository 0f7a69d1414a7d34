"""The text encoders of flow models: finding them in files, loading them, and their tokenizers."""
