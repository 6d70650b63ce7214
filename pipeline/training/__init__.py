"""What `emsr train` needs beside models.training: volumes, stages, checkpoints."""
