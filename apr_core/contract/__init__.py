"""The contract: raw tensors are measured, judged, and either become validated types or are refused."""
