"""Bytes to named lazy tensors and back: three containers, the names between them, and the block codecs."""
