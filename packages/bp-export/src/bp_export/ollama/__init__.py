"""Ollama over its HTTP API: register a GGUF or an adapter, list and remove models."""
