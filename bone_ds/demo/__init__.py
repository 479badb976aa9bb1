"""`python -m bone_ds.demo`: a real model fine-tuned on problems it has not seen, in a few minutes on a CPU."""
