"""The system of "The Llama 3 Herd of Models" in JAX and Flax."""
