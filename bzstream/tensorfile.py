"""The safetensors format: strict parsing and exact building of file heads, as pure functions."""
