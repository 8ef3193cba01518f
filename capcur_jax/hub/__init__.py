"""The Hugging Face Hub: checkpoints and data files by their names there, and exports on their way to it."""
