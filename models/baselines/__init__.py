"""Networks that the paper's network is compared with."""
