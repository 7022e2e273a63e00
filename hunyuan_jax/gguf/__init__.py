"""GGUF, the files of llama.cpp: what is in one, its blocks of few bits, and its vocabulary."""
