"""From volume.yaml to a job: layout, digest, dry run; and what an earlier run recorded."""
