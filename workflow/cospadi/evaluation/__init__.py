"""How good is a model: perplexity on held-out text, zero-shot tasks (both by lm-eval), and text it writes."""

# Tasks that are made of the held-out text (`evaluation.heldout`), a file each in `task_files`
HELDOUT_TASKS = ("last_word", "next_sentence", "sentence_order")
