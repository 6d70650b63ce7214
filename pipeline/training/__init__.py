"""What `emsr train` needs beside models.training: volumes, a stage's networks and weights, the run and its log."""
