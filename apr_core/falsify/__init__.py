"""Claims, evidence, verdicts, rounds, score: pure records that know neither torch nor any architecture."""
