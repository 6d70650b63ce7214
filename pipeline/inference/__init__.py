"""Arrays in, arrays out: the network on its device."""
