"""The command line: parse, gate, dispatch, exit code; nothing here computes what the rooms below do not."""
