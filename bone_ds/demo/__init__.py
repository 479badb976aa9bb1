"""`python -m bone_ds.demo`: two models fine-tuned on questions they have not seen, in a few minutes on a CPU."""
