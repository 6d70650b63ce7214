"""What `emsr evaluate` needs beside models.evaluation: volumes, metrics, scores, and the picture of them."""
