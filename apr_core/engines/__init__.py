"""Other forwards of the same model, and the one place where a path becomes a running model (``load_model``)."""
