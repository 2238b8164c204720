"""Tokenizers as GGUF holds them: the vocabulary, and llama.cpp's names of splitting rules."""
