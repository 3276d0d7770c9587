"""The public operators: one file each, from the checks to the ``torch.library`` registration."""
