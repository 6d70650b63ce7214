"""Networks that the paper's one is compared with."""
