"""The ground truth: one readable Qwen2 in torch float32, its tokens, its trace and its decoding."""
