"""Where tokens come from: text, tokenizer, files of tokens, batches."""
