"""gpt2lib: GPT-2, Adafactor and their training, for a reproduction study that anyone can run again."""
