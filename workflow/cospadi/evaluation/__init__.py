"""How good is a model: perplexity on held-out text, zero-shot tasks (both by lm-eval), and text it writes."""
