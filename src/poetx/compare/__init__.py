"""One recipe under many methods: the same model, text, tokens and seeds, and what each cost."""
