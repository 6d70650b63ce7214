"""YAML files as frozen values: volume.yaml, stage.yaml and table.yaml, parsed and checked."""
