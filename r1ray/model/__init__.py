"""What a model is: import, load, chat template pair, reasoning, adapters."""
