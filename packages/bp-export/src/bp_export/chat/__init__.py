"""Chat with an adapter, a model folder, a GGUF or a model in Ollama; llama.cpp runs in a process of its own."""
