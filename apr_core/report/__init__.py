"""Evidence files in, tables, figures and pages out: shows what falsify concluded, never concludes."""
